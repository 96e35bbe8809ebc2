"""Every file of a directory accounted for; each kind of wrong directory told by one sentence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub._local_folder import get_local_download_paths, write_download_metadata
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dsv4.cli import cli
from dsv4.convert.plan import make_plan
from dsv4.convert.sources.base import AUX_FILES, INDEX_FILE
from dsv4.convert.sources.files import SourceFiles
from dsv4.convert.sources.foreign import top_level
from dsv4.convert.sources.local import LocalSource
from dsv4.convert.sources.open import open_source
from dsv4.formats.errors import SourceError
from dsv4.formats.model.recipes import make_recipe
from dsv4.synthetic.tiny import HF_TINY, write_tiny
from tests.formats.test_file_kinds import KINDS

SHARD = "model-00002-of-00004.safetensors"
LAST = "model-00004-of-00004.safetensors"

# What lies at the top level of released checkpoints, besides what is read.
RELEASED = [
    ".gitattributes",
    "LICENSE",
    "README.md",
    "DeepSeek_V4.pdf",
    "assets/architecture.png",
    "encoding/encoding_dsv4.py",
    "inference/model.py",
    "inference/config.json",
    "inference/requirements.txt",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "hf_quant_config.json",
    "chat_template.jinja",
    "recipe.yaml",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "configuration_deepseek.py",
    "modeling_deepseek.py",
    "preprocessor_config.json",
    "USAGE_POLICY.md",
    "NOTICE",
    "figures/benchmark.jpg",
    "original/model0.safetensors",
    "metal/model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model-00001-of-00002.bin",
    ".cache/huggingface/CACHEDIR.TAG",
    ".git/config",
    ".DS_Store",
    "additional_chat_templates/tool.jinja",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("files") / "checkpoint"
    write_tiny(out, HF_TINY)
    return out


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def _unlist(directory: Path, *shards: str) -> dict[str, str]:
    """Take the tensors of `shards` out of the index."""
    path = directory / INDEX_FILE
    index = json.loads(path.read_text())
    gone = {n: f for n, f in index["weight_map"].items() if f in shards}
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f not in shards}
    path.write_text(json.dumps(index))
    return gone


def test_what_releases_hold_is_known(copy: Path) -> None:
    assert LocalSource(copy).notices == ()
    for name in RELEASED[:-1]:
        path = copy / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text("x")
    assert LocalSource(copy).notices == ()
    names = [*RELEASED, "config.json", "a.safetensors"]
    assert SourceFiles.of(names, "x").unknown == ("additional_chat_templates/",)


def test_what_is_unknown_is_named(copy: Path) -> None:
    for name in ("weights.xyz", "engram.json", "model-00001-of-00002 (1).safetensors", "a\x1b[2Jb"):
        (copy / name).write_text("x")
    (copy / "draft").mkdir()
    (sentence,) = LocalSource(copy).notices
    assert sentence == (
        "dsv4 does not know these files and does not read them: a\\x1b[2Jb, draft/, engram.json, "
        "model-00001-of-00002 (1).safetensors, weights.xyz"
    )
    planned = make_plan(LocalSource(copy), make_recipe("native"))
    assert planned.notices == (sentence,)
    told = CliRunner().invoke(cli, ["plan", str(copy), "--json"])
    assert sentence in json.loads(told.stdout)["notices"]
    assert f"note: {sentence}" in told.stderr


@given(
    st.lists(
        st.sampled_from([*RELEASED, SHARD, LAST, f"{SHARD}.part", "consolidated.safetensors"])
        | st.text(min_size=1).filter(lambda name: not name.startswith("/")),
        max_size=12,
    )
)
def test_every_name_is_in_one_class(names: list[str]) -> None:
    names = [*names, "config.json", "model.safetensors"]
    files = SourceFiles.of(names, "x")
    classes = [files.shards, files.aside, files.documents, files.not_needed, files.unknown]
    classed = [name for of in classes for name in of] + sorted(files.marks.values())
    assert sorted(classed) == sorted({top_level(name) for name in names})


MARKS = [
    *(f"{{}}.{suffix}" for suffix in ("aria2", "incomplete", "part", "crdownload", "download")),
    *(f"{{}}.{suffix}" for suffix in ("tmp", "partial", "1a2b3c4d.partial", "st", "aria2__temp")),
    ".{}.Ab3dE6",
]


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("file", [SHARD, INDEX_FILE, "config.json", "tokenizer.json"])
def test_a_file_with_a_mark_beside_it_is_refused(copy: Path, mark: str, file: str) -> None:
    mark = mark.format(file)
    (copy / mark).write_bytes(b"\0\1\0\0")
    there = (copy / file).exists()
    for _ in range(2):
        with pytest.raises(SourceError) as refusal:
            LocalSource(copy)
        assert str(refusal.value) == (
            f"{copy}: the download of {file} did not finish: {mark} is there; finish it"
            + (f", or remove {mark} if {file} is whole" if there else "")
        )
        (copy / file).unlink(missing_ok=True)
        there = False


@pytest.mark.parametrize("mark", [f"{LAST}.aria2", "README.md.part", "x.safetensors.part.zip"])
def test_a_mark_matters_for_its_file_alone(copy: Path, mark: str) -> None:
    _unlist(copy, LAST)
    (copy / LAST).unlink()
    (copy / mark).write_bytes(b"\0")
    assert LAST not in LocalSource(copy).sizes


def test_without_an_index_a_mark_stands_for_a_shard(tmp_path: Path, copy: Path) -> None:
    only = tmp_path / "only"
    only.mkdir()
    shutil.copy(copy / "config.json", only)
    (only / "model.safetensors.crdownload").write_bytes(b"\0")
    with pytest.raises(SourceError, match=r"download of model\.safetensors did not finish"):
        LocalSource(only)


def test_the_hub_s_own_client_leaves_its_mark_elsewhere(copy: Path) -> None:
    """Judge: huggingface_hub, which chooses the paths and writes the records."""
    commit, old, new = "c" * 40, "a" * 64, "b" * 64
    write_download_metadata(copy, SHARD, commit, old)
    paths = get_local_download_paths(copy, SHARD)
    stale, begun = paths.incomplete_path(old), paths.incomplete_path(new)
    stale.write_bytes(b"x")
    other = get_local_download_paths(copy, "README.md").incomplete_path(new)
    other.write_bytes(b"x")
    assert LocalSource(copy).notices == ()  # what was finished has the same hash; no shard's
    suffixed = begun.with_name(f"{begun.stem}.12345678.incomplete")
    for path in (begun, suffixed):
        path.write_bytes(b"x")
        with pytest.raises(SourceError, match=f"download of {SHARD} did not finish: .cache/hugg"):
            LocalSource(copy)
        path.unlink()
    paths.metadata_path.unlink()
    with pytest.raises(SourceError, match=f"or remove .*incomplete if {SHARD} is whole"):
        LocalSource(copy)


def test_an_unlisted_file_that_is_needed_is_refused(copy: Path) -> None:
    missing = sorted(_unlist(copy, LAST))
    with pytest.raises(SourceError) as refusal:
        LocalSource(copy)
    said = str(refusal.value)
    assert said.startswith(f"{INDEX_FILE} does not list {LAST}, but {len(missing)} of the tensors")
    assert f"({', '.join(missing[:3])}, ...)" in said
    assert "or remove it and every safetensors file is read" in said
    (copy / INDEX_FILE).unlink()
    assert LAST in LocalSource(copy).sizes


def test_a_scale_alone_in_an_unlisted_file_is_needed(copy: Path) -> None:
    path = copy / SHARD
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(".scale"))
    save_file({name: tensors.pop(name)}, copy / "scale.safetensors")
    save_file(tensors, path)
    index = json.loads((copy / INDEX_FILE).read_text())
    del index["weight_map"][name]
    (copy / INDEX_FILE).write_text(json.dumps(index))
    weight = name.removesuffix("scale") + "weight"
    with pytest.raises(SourceError, match=rf"not list scale\.safetensors, but 1 of .*\({weight}\)"):
        LocalSource(copy)


def test_unlisted_files_that_are_not_needed_are_named(copy: Path) -> None:
    shutil.copy(copy / SHARD, copy / "copy.safetensors")
    save_file({"ghost.weight": torch.ones(2)}, copy / "ghost.safetensors")
    (copy / "pointer.safetensors").write_bytes(KINDS["LFS"][0])
    save_file({"base_model.x.lora_A.weight": torch.ones(2)}, copy / "adapter_model.safetensors")
    source = LocalSource(copy)
    assert len(source.sizes) == 4
    aside, copied, ghost, pointer = source.notices
    assert aside.endswith("are not read: adapter_model.safetensors")
    unlisted = f"{INDEX_FILE} does not list"
    assert copied == (
        f"{unlisted} copy.safetensors, which is not read: all of its tensors are in files that "
        "are listed"
    )
    assert ghost == (
        f"{unlisted} ghost.safetensors, which is not read: the model does not need its tensors "
        "(ghost.weight)"
    )
    assert pointer.startswith(
        f"{unlisted} pointer.safetensors, which is not read: pointer.safetensors is a Git LFS "
    )


def test_without_an_index_what_is_another_format_s_is_left_out(copy: Path) -> None:
    (copy / INDEX_FILE).unlink()
    names = ["adapter_model.safetensors", "consolidated.safetensors", "model0-mp2.safetensors"]
    for name in names:
        save_file({"embed.weight": torch.ones(2)}, copy / name)
    source = LocalSource(copy)
    assert len(source.sizes) == 4
    assert source.notices[0].endswith(f"not read: {', '.join(names)}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [SHARD, INDEX_FILE, "config.json"])
def test_a_file_of_another_kind_is_told(copy: Path, name: str, kind: str) -> None:
    content, what = KINDS[kind]
    (copy / name).write_bytes(content)
    with pytest.raises(SourceError) as refusal:
        LocalSource(copy)
    assert f"{name} is {what}, expected a" in str(refusal.value)


def _holds(*names: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        for name in names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(b"{}")

    return make


COMMIT = "0" * 40

WRONG: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "nothing": ("x", _holds(), "is not a checkpoint: it has no config.json; give the directory"),
    "some folder": ("x", _holds("a.txt", "b/c"), "is not a checkpoint: it has no config.json"),
    "code only": ("x", _holds("inference/config.json"), "is not a checkpoint"),
    "a store": ("x", _holds("dsv4.complete", "zarr.json"), "is a packed checkpoint already"),
    "a store begun": ("x", _holds("journal.jsonl", "config.json"), "is a packed checkpoint alread"),
    "a cached repository": (
        "models--some-org--some-model",
        _holds("refs/main", "blobs/a", f"snapshots/{COMMIT}/config.json"),
        "in the hub's cache, with the checkpoint further down; give the hub id "
        "some-org/some-model, or a directory in .*models--some-org--some-model/snapshots",
    ),
    "the cache": ("hub", _holds("models--a--b/refs/main"), "is the hub's cache; .* such as a/b"),
    "snapshots": ("snapshots", _holds(f"{COMMIT}/config.json"), f"give one, such as .*/{COMMIT}"),
    "one level too high": (
        "x",
        _holds("flash/config.json", "inference/config.json"),
        "has no config.json, but its folder flash has one; give a folder",
    ),
    "an adapter": (
        "x",
        _holds("adapter_config.json", "adapter_model.safetensors"),
        r"is an adapter \(adapter_model.safetensors\), .*; merge it into its base model",
    ),
    "an adapter with a config": (
        "x",
        _holds("config.json", "adapter_config.json", "adapter_model.safetensors"),
        "is an adapter .*; merge it",
    ),
    "GGUF": ("x", _holds("DeepSeek-V4-Flash-Q4_K.gguf"), "has GGUF files .*-Q4_K.gguf"),
    "GGUF and config": ("x", _holds("config.json", "a.gguf"), r"has GGUF files \(a.gguf\)"),
    "pickles": (
        "x",
        _holds("config.json", "pytorch_model.bin"),
        r"its weights in pickles \(pytorch_model.bin\), which are never opened",
    ),
    "consolidated": (
        "x",
        _holds("params.json", "consolidated.safetensors", "tekken.json"),
        r"consolidated files \(consolidated.safetensors\), which are not in the hub's format",
    ),
    "for inference": (
        "x",
        _holds("config.json", "model0-mp2.safetensors", "model1-mp2.safetensors"),
        r"was split for 2 GPUs by DeepSeek's own inference code \(model0-mp2.safetensors, model1",
    ),
    "no config": ("x", _holds("model.safetensors"), "has safetensors files but no config.json"),
    "no weights": ("x", _holds("config.json"), "has no safetensors files and no model.safetensors"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_each_wrong_directory_gets_one_true_sentence(tmp_path: Path, kind: str) -> None:
    name, make, sentence = WRONG[kind]
    directory = tmp_path / name
    directory.mkdir()
    make(directory)
    with pytest.raises(SourceError, match=sentence) as refusal:
        open_source(directory)
    assert "again" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_link_to_nothing_is_told(copy: Path) -> None:
    for name in ("config.json", INDEX_FILE, "LICENSE"):
        kept = (copy / name).read_bytes()
        (copy / name).unlink()
        (copy / name).symlink_to("../../blobs/0")
        with pytest.raises(SourceError, match=f"{name} is a link to a file that does not exist"):
            LocalSource(copy)
        (copy / name).unlink()
        (copy / name).write_bytes(kept)


def test_no_pickle_is_opened(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "pytorch_model.bin").write_bytes(KINDS["torch.save"][0])
    (copy / "pytorch_model.bin").chmod(0)
    opened: list[str] = []
    inner = Path.open

    def noted(path: Path, *args: Any, **options: Any) -> Any:
        opened.append(path.name)
        return inner(path, *args, **options)

    monkeypatch.setattr(Path, "open", noted)
    source = LocalSource(copy)
    source.fingerprint()
    assert source.notices == ()
    assert SHARD in opened
    assert set(opened) <= {*source.sizes, *AUX_FILES, INDEX_FILE}


def test_what_cannot_be_looked_at_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in /tmp, where services keep folders for themselves."""
    (tmp_path / "private" / "config.json").mkdir(parents=True)
    inner = os.stat

    def denied(path: Any, *args: Any, **options: Any) -> Any:
        if "private/" in os.fspath(path):
            raise PermissionError(13, "Permission denied")
        return inner(path, *args, **options)

    monkeypatch.setattr(os, "stat", denied)
    with pytest.raises(SourceError, match=f"^{tmp_path} is not a checkpoint: it has no config"):
        open_source(tmp_path)
