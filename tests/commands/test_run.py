"""`dsv4 run` as a program: what it refuses, when, and where its text goes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dsv4
from dsv4.convert.engine import convert
from dsv4.formats.model.inventory import DraftKind
from dsv4.formats.store.reader import PackedStore
from dsv4.runtime.text.chat import Template, Turn
from dsv4.runtime.text.tokenizer import Text
from dsv4.runtime.threads import SMALL_STEP, step_nbytes
from dsv4.synthetic.tiny import TINY_DSPARK
from tests.conftest import MakeSource
from tests.support import warm_commands

TIMEOUT = 240
NO_TORCH = "raise RuntimeError('torch was imported')\n"


def run(
    *arguments: str | Path, stdin: bytes = b"", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """`dsv4 run` in a process of its own; with another environment, from the interpreter on."""
    if not environment:
        return warm_commands.run("run", *arguments, stdin=stdin, seconds=TIMEOUT)
    return subprocess.run(
        [sys.executable, "-m", "dsv4", "run", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
        env=os.environ | environment,
    )


@pytest.fixture
def torchless(tmp_path: Path) -> str:
    """A PYTHONPATH under which importing torch fails."""
    place = tmp_path / "torchless"
    place.mkdir()
    (place / "torch.py").write_text(NO_TORCH)
    return os.pathsep.join([str(place), str(Path(dsv4.__file__).parent.parent)])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--tokens", "abc"), "'abc', expected token ids separated by commas"),
        (("--tokens", "1,,2"), "'', expected token ids"),
        (("--tokens", "1,²"), "'²', expected token ids"),
        (("--prompt", "a", "--temperature", "-1"), "-1.0 is not a finite number from 0 up"),
        (("--prompt", "a", "--temperature", "nan"), "nan is not a finite number"),
        (("--prompt", "a", "--temperature", "hot"), "'hot' is not a number"),
        (("--prompt", "a", "--top-p", "2"), "2.0 is not a finite number above 0, to 1"),
        (("--prompt", "a", "--top-p", "0"), "0.0 is not a finite number above 0, to 1"),
        (("--prompt", "a", "--min-p", "1.5"), "1.5 is not a finite number from 0 to 1"),
        (("--prompt", "a", "--top-k", "-1"), "-1 is not in the range"),
        (("--prompt", "a", "--seed", "-1"), "-1 is not in the range"),
        (("--prompt", "a", "--seed", str(1 << 63)), "is not in the range"),
        (("--prompt", "a", "--max-new-tokens", "0"), "0 is not in the range"),
        (("--prompt", "a", "--max-seq-len", "0"), "0 is not in the range"),
        (("--prompt", "a", "--effort", "medium"), "'medium' is not one of"),
        (("--prompt", "a", "--device", "tpu"), "'tpu' is not one of"),
        (("--prompt", "a", "--stop", ""), "'--stop': the text is empty"),
        (("--prompt", "a", "--draft", "8"), "'8' is not auto, off or 0 to 7: a step has 8 rows"),
        (("--prompt", "a", "--draft", "٣"), "'٣' is not auto, off or 0 to 7"),
        (("--prompt", "a", "--draft", "03"), "'03' is not auto, off or 0 to 7"),
        (("--prompt", "a", "--draft", "on"), "'on' is not auto, off or 0 to 7"),
        (("--prompt", "a", "--tokens", "1"), "--prompt and --tokens exclude each other"),
        (("--tokens", "1", "--system", "a"), "--system and --think need the chat template"),
        (("--prompt", "a", "--raw", "--think"), "--system and --think need the chat template"),
        (("--raw",), "--raw and --json need --prompt or --tokens"),
        (("--json",), "--raw and --json need --prompt or --tokens"),
        (("--prompt", ""), "the text is empty"),
        (("--prompt", " \n"), "the text is empty"),
        (("--prompt", "", "--raw"), "the text is empty"),
        (("--prompt", "-"), "stdin is empty"),
        (("--prompt", "@nowhere.txt"), "'nowhere.txt' cannot be read: No such file or directory"),
        (("--system", "@nowhere.txt"), "'nowhere.txt' cannot be read: No such file or directory"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_torch_is_imported(
    standard_store: Path, torchless: str, arguments: tuple[str, ...], sentence: str
) -> None:
    done = run(standard_store, *arguments, PYTHONPATH=torchless)
    assert (done.returncode, done.stdout) == (2, b"")
    assert sentence in done.stderr.decode().splitlines()[-1]


def test_the_torchless_path_is_torchless(standard_store: Path, torchless: str) -> None:
    done = run(standard_store, "--prompt", "a", PYTHONPATH=torchless)
    assert b"torch was imported" in done.stderr


def test_what_is_not_a_store_is_refused_before_torch_is_imported(
    tiny_source: Path, torchless: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    for place, sentence in (
        (tmp_path / "nosuch", "there is no directory"),
        (tmp_path / "file", "is a file; give the directory of a packed checkpoint"),
        (tmp_path, "is not a packed checkpoint"),
        (tiny_source, "is a checkpoint that is not packed; pack it first: dsv4 convert --hf"),
    ):
        done = run(place, "--prompt", "a", PYTHONPATH=torchless)
        assert done.returncode == 2 and sentence in done.stderr.decode(), done.stderr


def test_bytes_that_are_not_utf8_are_refused(standard_store: Path, torchless: str) -> None:
    done = run(standard_store, "--prompt", "-", stdin=b"ab\xff", PYTHONPATH=torchless)
    assert b"stdin is not UTF-8 at byte 2" in done.stderr


def asked(store: Path, *arguments: str, stdin: bytes = b"") -> dict[str, Any]:
    """The document of a greedy answer of one token."""
    bounds = ("--max-new-tokens", "1", "--temperature", "0", "--json")
    done = run(store, *bounds, *arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def tokenizer(store: Path) -> Text:
    return Text.from_file(dsv4.open(store).store.assets["tokenizer.json"])


def test_a_prompt_comes_from_stdin_and_from_files(standard_store: Path, tmp_path: Path) -> None:
    text = tokenizer(standard_store)
    (tmp_path / "q.txt").write_text("Why?\n")
    (tmp_path / "system.txt").write_text("Be brief.")
    why = Template().encode([Turn("Why?")], text)
    assert asked(standard_store, "--prompt", "-", stdin=b"Why?\n")["prompt_tokens"] == why
    assert asked(standard_store, "--prompt", f"@{tmp_path}/q.txt")["prompt_tokens"] == why
    at = asked(standard_store, "--prompt", "@@q", "--system", f"@{tmp_path}/system.txt", "--think")
    assert at["prompt_tokens"] == Template("Be brief.", True).encode([Turn("@q")], text)
    raw = asked(standard_store, "--prompt", "-", "--raw", stdin=b"Why?\n")
    assert raw["prompt_tokens"] == text.encode("Why?\n")


def test_an_answer_that_is_cut_says_what_allows_a_longer_one(standard_store: Path) -> None:
    greedy = ("--tokens", "5,6,7", "--temperature", "0")
    short = run(standard_store, *greedy, "--max-new-tokens", "3")
    assert b"cut after 3 tokens; --max-new-tokens N raises the limit" in short.stderr
    full = run(standard_store, *greedy, "--max-seq-len", "7")
    assert b"cut after 4 tokens; --max-seq-len N makes room, which is 7 now" in full.stderr
    told = run(standard_store, *greedy, "--max-seq-len", "7", "--json")
    document = json.loads(told.stdout)
    assert (len(document["generated_tokens"]), document["finish"]) == (4, "length")
    assert told.stderr == b"", "the document says it"
    small = run(standard_store, *greedy, "--max-seq-len", "3")
    assert small.returncode == 2
    assert b"the prompt has 3 tokens, and --max-seq-len 3 leaves no room" in small.stderr
    limit = dsv4.open(standard_store).config.max_position_embeddings
    large = run(standard_store, *greedy, "--max-seq-len", str(limit + 1))
    assert large.returncode == 2 and f"expected 1 to {limit}".encode() in large.stderr


def test_quiet_says_nothing_and_verbose_says_what_starting_took(standard_store: Path) -> None:
    one = ("--tokens", "5,6", "--temperature", "0", "--max-new-tokens", "2")
    assert run(standard_store, *one, "--quiet").stderr.count(b"\n") == 1  # the cut
    normal = run(standard_store, *one).stderr.decode()
    assert "tokens/s" in normal and "interpreter" not in normal
    assert "interpreter" in run(standard_store, *one, "--verbose").stderr.decode()


def test_drafts_change_what_is_said_of_an_answer_and_not_the_answer(standard_store: Path) -> None:
    """A prompt that repeats itself has something to look up, at whatever is drawn."""
    ask = ("--tokens", ",".join(["7,8,9,10"] * 6), "--seed", "2", "--max-new-tokens", "12")
    plain = json.loads(run(standard_store, *ask, "--json", "--draft", "off").stdout)
    drafted = json.loads(run(standard_store, *ask, "--json", "--draft", "3").stdout)
    assert plain["generated_tokens"] == drafted["generated_tokens"]
    assert plain["timings"]["drafts"] is None
    drafts = drafted["timings"]["drafts"]
    assert drafts["proposer"] == "draft layers" and len(drafts["proposed"]) <= 3
    assert drafts["rounds"] + drafts["steps"] == drafted["timings"]["decode_steps"]
    assert drafted["timings"]["decode_tokens"] == plain["timings"]["decode_steps"]
    shown = run(standard_store, *ask, "--draft", "7").stderr.decode()
    assert shown.count("7 drafts were asked for; the draft layers propose 3 at most") == 1
    stderr = run(standard_store, *ask, "--draft", "3").stderr.decode()
    assert "asked for" not in stderr
    line = stderr.splitlines()[-1]
    assert ("; drafts by draft layers: " in line) == (drafts["rounds"] > 0)


def test_without_draft_layers_that_can_draft_auto_looks_up_and_says_so(
    make_source: MakeSource, tmp_path: Path
) -> None:
    source = make_source(TINY_DSPARK, DraftKind.DSPARK)
    config = json.loads((source / "config.json").read_text())
    del config["dspark_noise_token_id"]
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "source", tmp_path / "packed", recipe="native")
    ask = ("--tokens", "5,6", "--temperature", "0", "--max-new-tokens", "2")
    auto, off = (run(tmp_path / "packed", *ask, "--draft", wish) for wish in ("auto", "off"))
    assert auto.returncode == off.returncode == 0 and auto.stdout == off.stdout
    sentence = b"the draft layers cannot be used: there are DSpark layers, but config.json"
    assert sentence in auto.stderr and sentence not in off.stderr
    two = run(tmp_path / "packed", *ask, "--draft", "2")
    assert two.returncode == 2 and b"(--draft off," in two.stderr


def test_stdout_holds_the_answer_alone_while_the_model_thinks(standard_store: Path) -> None:
    ask = ("--prompt", "def f():", "--think", "--temperature", "0", "--max-new-tokens", "12")
    document = json.loads(run(standard_store, *ask, "--json").stdout)
    plain = run(standard_store, *ask, "--quiet")
    assert document["finish"] == "length" and document["text"] == ""
    text = tokenizer(standard_store)
    assert document["reasoning"] == text.spoken(document["generated_tokens"]) != ""
    assert plain.stdout in (b"", b"\n")
    reasoning = plain.stderr.decode()
    assert reasoning.startswith(f"<think>\n{document['reasoning']}\n</think>\n")


def test_a_stop_string_ends_the_answer(standard_store: Path) -> None:
    ask = ("--prompt", "def f():", "--raw", "--temperature", "0", "--max-new-tokens", "12")
    whole = json.loads(run(standard_store, *ask, "--json").stdout)["text"]
    stop = whole.strip()[3:5]
    document = json.loads(run(standard_store, *ask, "--json", "--stop", stop).stdout)
    assert document["finish"] == "stop"
    assert document["text"] == whole[: whole.find(stop)]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_text_that_stdout_cannot_encode_comes_out_escaped(
    standard_store: Path, encoding: str
) -> None:
    ask = ("--prompt", "hi", "--seed", "1", "--max-new-tokens", "40", "--quiet")
    document = json.loads(run(standard_store, *ask, "--json").stdout)
    assert not document["text"].isascii(), "the test needs a text that ASCII lacks"
    done = run(standard_store, *ask, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (document["text"] + "\n").encode(encoding, "backslashreplace")


def test_small_models_take_one_thread_unless_the_user_says_otherwise(
    standard_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from dsv4.runtime import threads

    store = PackedStore.open(standard_store)
    whole = sum(array.nbytes for array in store.hierarchy.arrays.values())
    assert 0 < step_nbytes(store) < whole < SMALL_STEP
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    threads.choose_threads(store)
    assert asked == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads.choose_threads(store)
    assert asked == [1]
    monkeypatch.setattr(threads, "SMALL_STEP", step_nbytes(store))
    threads.choose_threads(store)
    assert asked == [1], "a large model takes all cores"


def test_a_store_without_a_tokenizer_takes_token_ids_alone(
    tiny_source: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_source, tmp_path / "source"))
    (source / "tokenizer.json").unlink()
    dsv4.convert(source, tmp_path / "packed")
    packed = tmp_path / "packed"
    assert b"carries no tokenizer.json" in run(packed, "--prompt", "a").stderr
    done = run(packed, "--tokens", "5,6", "--max-new-tokens", "2", "--temperature", "0")
    assert done.returncode == 0 and done.stdout.count(b",") == 2
