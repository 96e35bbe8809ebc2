"""A repository's files are accounted for from its listing, as those of a directory are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load

from dsv4.convert.sources.base import INDEX_FILE
from dsv4.convert.sources.hub import HubSource
from dsv4.formats.errors import NetworkError, SourceError
from dsv4.formats.model.safetensors_header import TensorEntry
from tests.convert.hub.conftest import Open
from tests.convert.hub.loopback import Loopback
from tests.formats.test_file_kinds import KINDS

SHARD = "model-00002-of-00004.safetensors"
LAST = "model-00004-of-00004.safetensors"


def _put(hub: Loopback, name: str, data: bytes = b"x") -> None:
    """Other content, or another file, and a listing that says so."""
    hub.contents[name] = data
    hub.listing = [listed for listed in hub.listing if listed["rfilename"] != name]
    hub.listing.append(hub._listed(name))


def _only(hub: Loopback, *names: str) -> None:
    hub.listing = []
    for name in names:
        _put(hub, name, hub.contents.get(name, b"{}"))


def _unlist(hub: Loopback, shard: str) -> None:
    index = json.loads(hub.contents[INDEX_FILE])
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != shard}
    _put(hub, INDEX_FILE, json.dumps(index).encode())


def test_known_files_are_not_mentioned_and_not_fetched(hub: Loopback, opened: Open) -> None:
    for name in (".gitattributes", "README.md", "inference/model.py", "original/x.safetensors"):
        _put(hub, name)
    assert opened().notices == ()
    _put(hub, "weights.xyz")
    _put(hub, "draft/model.safetensors")
    assert opened().notices == (
        "dsv4 does not know these files and does not read them: draft/, weights.xyz",
    )
    for name in ("README.md", "inference/model.py", "draft/model.safetensors", "weights.xyz"):
        assert hub.bytes_served(name) == 0


def test_unlisted_files_are_opened_by_their_headers(hub: Loopback, opened: Open) -> None:
    _put(hub, "copy.safetensors", hub.contents[SHARD])
    _put(hub, "pointer.safetensors", KINDS["LFS"][0])
    source = opened()
    assert len(source.sizes) == 4
    copied, pointer = source.notices
    assert "does not list copy.safetensors, which is not read: all of its tensors" in copied
    assert "which is not read: pointer.safetensors is a Git LFS pointer, expected" in pointer
    _unlist(hub, LAST)
    with pytest.raises(SourceError, match=rf"does not list {LAST}, but 5 of the") as refusal:
        opened()
    assert str(refusal.value).endswith("; choose another revision, or tell its owner")
    assert "head.weight" in load(hub.contents[LAST])


def test_a_mark_in_a_repository_is_refused(hub: Loopback, opened: Open) -> None:
    _put(hub, f"{SHARD}.aria2")
    with pytest.raises(SourceError, match=f"the download of {SHARD} did not finish: {SHARD}.aria2"):
        opened()


@pytest.mark.parametrize("kind", ["LFS", "GGUF", "HTML", "torch.save", "zeros", "an error"])
def test_a_shard_of_another_kind_is_told(hub: Loopback, opened: Open, kind: str) -> None:
    content, what = KINDS[kind]
    _put(hub, SHARD, content)
    with pytest.raises(SourceError) as refusal:
        opened()
    assert f"{SHARD} is {what}, expected a safetensors file; " in str(refusal.value)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "is an adapter .*; merge it into"),
        (["README.md", "a-Q4.gguf", "a-Q8.gguf"], r"has GGUF files \(a-Q4.gguf, a-Q8.gguf\)"),
        (["config.json", "pytorch_model.bin"], "has its weights in pickles"),
        (["dsv4.complete", "zarr.json", "config.json"], "is a packed checkpoint already"),
        (["config.json", "model0-mp8.safetensors"], "was split for 8 GPUs"),
        (["fp8/config.json", "fp8/model.safetensors"], "its folder fp8 has one; give a folder"),
        (["data.parquet"], "is not a checkpoint: it has no config.json"),
    ],
)
def test_each_wrong_repository_gets_one_true_sentence(
    hub: Loopback, opened: Open, names: list[str], sentence: str
) -> None:
    _only(hub, *names)
    with pytest.raises(SourceError, match=f"^some-org/some-model@c0ffee000000.* {sentence}"):
        opened()


def test_a_cached_snapshot_is_accounted_for_offline(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    commit, repo = "c0ffee" + "0" * 34, tmp_path / "cache" / "models--some-org--some-model"
    snapshot = repo / "snapshots" / commit
    (snapshot / "draft").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for path in checkpoint.iterdir():
        (snapshot / path.name).symlink_to(path)
    (snapshot / "weights.xyz").write_text("x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    source = HubSource("some-org/some-model", cache=tmp_path / "cache")
    assert source.notices == (
        "dsv4 does not know these files and does not read them: draft/, weights.xyz",
    )
    (snapshot / SHARD).unlink()
    (snapshot / SHARD).symlink_to("nowhere")
    with pytest.raises(SourceError, match=f"1 of 4 safetensors files are missing .{SHARD}"):
        HubSource("some-org/some-model", cache=tmp_path / "cache")


def test_a_network_that_fails_is_not_taken_for_a_file(
    hub: Loopback, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put(hub, "extra.safetensors", hub.contents[SHARD])
    inner = HubSource._header

    def header(source: HubSource, name: str) -> dict[str, TensorEntry]:
        if name == "extra.safetensors":
            raise NetworkError("the hub does not answer")
        return inner(source, name)

    monkeypatch.setattr(HubSource, "_header", header)
    with pytest.raises(NetworkError, match="the hub does not answer"):
        opened()
