"""What travels along, from the source to the answer: told before weights move, and obeyed."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import dsv4
from dsv4.cli import cli
from dsv4.convert.engine import convert
from dsv4.convert.sources.open import open_source
from dsv4.convert.travelling import NO_TOKENIZER, make_whole_plan
from dsv4.formats.errors import SourceError, StoreError
from dsv4.formats.model.recipes import make_recipe
from dsv4.formats.store.text_files import stored_text_files
from dsv4.runtime.text.tokenizer import Text

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"c" * 64 + b"\nsize 9\n"
PROMPT = ("--prompt", "hello", "--device", "cpu", "--json")


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """`run` answers SIGTERM in a way of its own, for good."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def changed(source: Path, target: Path, **files: bytes | None) -> Path:
    """A copy of a source (weights linked) with `name_json` replaced or left out."""
    shutil.copytree(source, target, copy_function=_link)
    for key, raw in files.items():
        path = target / f"{key.removesuffix('_json')}.json"
        path.unlink(missing_ok=True)
        if raw is not None:
            path.write_bytes(raw)
    return target


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def settings_store(store: Path, target: Path, settings: dict[str, Any]) -> Path:
    """A store that carries other generation settings, as if its source had had them.

    Sizes are held to the manifest on opening, so the document is padded to the old size.
    """
    shutil.copytree(store, target, copy_function=_link)
    path = target / "assets" / "generation_config.json"
    size = path.stat().st_size
    raw = json.dumps(settings).encode()
    assert len(raw) <= size
    path.unlink()
    path.write_bytes(raw.ljust(size))
    return target


def run(store: Path, *args: str) -> tuple[dict[str, Any], str]:
    done = CliRunner().invoke(cli, ["run", str(store), *PROMPT, *args])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize(
    ("file", "raw"),
    [
        ("tokenizer_json", POINTER),
        ("tokenizer_json", b""),
        ("tokenizer_config_json", b"<html></html>"),
        ("generation_config_json", b'{"temperature": "hot"}'),
    ],
)
def test_what_run_would_refuse_is_refused_of_the_source(
    tiny_source: Path, tmp_path: Path, file: str, raw: bytes
) -> None:
    source = changed(tiny_source, tmp_path / "hub", **{file: raw})
    name = f"{file.removesuffix('_json')}.json"
    with pytest.raises(SourceError, match=rf"^{name}.* correct it in the source"):
        make_whole_plan(open_source(source), make_recipe("standard"))
    with pytest.raises(SourceError, match=rf"^{name}"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "before anything is written"


def test_notices_come_before_the_weights(tiny_source: Path, tmp_path: Path) -> None:
    settings = json.dumps({"do_sample": True, "num_beams": 3, "top_k": None}).encode()
    source = changed(
        tiny_source,
        tmp_path / "hub",
        tokenizer_json=None,
        tokenizer_config_json=None,
        generation_config_json=settings,
    )
    said: list[str] = []

    def first_unit(event: object) -> None:
        assert said[0] == NO_TOKENIZER and "num_beams 3" in said[1] and len(said) == 2

    summary = convert(source, tmp_path / "out", progress=first_unit, notice=said.append)
    assert summary.plan.notices == tuple(said)
    done = CliRunner().invoke(cli, ["plan", str(source), "--json"])
    assert json.loads(done.stdout)["notices"] == said
    assert f"note: {NO_TOKENIZER}" in done.stderr
    done = CliRunner().invoke(cli, ["run", str(tmp_path / "out"), "--prompt", "a"])
    assert done.exit_code != 0 and "--tokens" in str(done.exception)
    tokens = ["--tokens", "5", "--max-new-tokens", "2", "--device", "cpu", "--json"]
    done = CliRunner().invoke(cli, ["run", str(tmp_path / "out"), *tokens])
    assert done.exit_code == 0 and "num_beams 3" in done.stderr


def test_a_damaged_copy_is_repaired_and_a_faithful_one_is_not(
    tiny_source: Path, standard_store: Path, tmp_path: Path
) -> None:
    bad = settings_store(standard_store, tmp_path / "bad", {"temperature": "hot"})
    with pytest.raises(StoreError, match="not what was packed: `dsv4 repair`") as caught:
        stored_text_files(dsv4.open(bad))
    assert 'temperature is "hot"' in str(caught.value) and "copy it again" not in str(caught.value)
    found = dsv4.validate(bad, quick=True).findings
    assert [(one.check, str(caught.value) == one.message) for one in found] == [("text", True)]
    done = CliRunner().invoke(cli, ["run", str(bad), *PROMPT])
    assert done.exception is not None and str(done.exception) == str(caught.value)

    def as_the_source(packed: Any) -> Any:
        """The manifest lists the very bytes that the store has."""

        raw = packed.store.assets["generation_config.json"].read_bytes()
        for one in packed.store.manifest["source"]["files"]:
            if one["name"] == "generation_config.json":
                one["sha256"] = hashlib.sha256(raw).hexdigest()
        return packed

    with pytest.raises(StoreError, match="the source had the same file") as caught:
        stored_text_files(as_the_source(dsv4.open(bad)))
    assert "dsv4 repair" not in str(caught.value)


def test_settings_of_the_checkpoint_are_obeyed(standard_store: Path, tmp_path: Path) -> None:
    greedy, _ = run(standard_store, "--temperature", "0", "--max-new-tokens", "4")
    sampled, _ = run(standard_store, "--max-new-tokens", "4", "--seed", "3")
    assert sampled["generated_tokens"] != greedy["generated_tokens"]
    alike: list[dict[str, Any]] = [
        {"do_sample": True, "top_k": 1},
        {"do_sample": True, "top_p": 0, "temperature": None},
        {"do_sample": True, "min_p": 1},
        {"do_sample": False},
        {},
    ]
    for number, settings in enumerate(alike):
        store = settings_store(standard_store, tmp_path / str(number), settings)
        found, said = run(store, "--max-new-tokens", "4", "--seed", "3")
        assert found["generated_tokens"] == greedy["generated_tokens"], settings
        assert said == ""


def test_bounds_and_ends_of_the_checkpoint_hold(standard_store: Path, tmp_path: Path) -> None:
    greedy, _ = run(standard_store, "--temperature", "0", "--max-new-tokens", "6")
    tokens = greedy["generated_tokens"]
    store = settings_store(standard_store, tmp_path / "bound", {"max_new_tokens": 3})
    assert run(store)[0]["generated_tokens"] == tokens[:3]
    assert len(run(store, "--max-new-tokens", "5")[0]["generated_tokens"]) == 5
    prompt = len(greedy["prompt_tokens"])
    store = settings_store(standard_store, tmp_path / "length", {"max_length": prompt + 2})
    assert run(store)[0]["generated_tokens"] == tokens[:2]
    store = settings_store(standard_store, tmp_path / "full", {"max_length": prompt})
    done = CliRunner().invoke(cli, ["run", str(store), *PROMPT])
    assert "give --max-new-tokens" in str(done.exception)
    end = tokens[4]
    store = settings_store(standard_store, tmp_path / "end", {"eos_token_id": [end]})
    found, _ = run(store, "--max-new-tokens", "6")
    assert found["generated_tokens"] == tokens[: tokens.index(end)] and found["finish"] == "stop"


def test_a_penalty_of_the_checkpoint_changes_the_greedy_text(
    standard_store: Path, tmp_path: Path
) -> None:
    store = settings_store(standard_store, tmp_path / "p", {"repetition_penalty": 1e9})
    found, _ = run(store, "--max-new-tokens", "5")
    tokens = found["generated_tokens"]
    text = Text.from_file(store / "assets" / "tokenizer.json")
    assert len(set(tokens)) == len(tokens) and not set(tokens) & set(found["prompt_tokens"])
    assert max(tokens) < text.vocab_size
