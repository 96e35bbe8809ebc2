"""What a user gives: a directory, a hub id, or something that is told what it could have been."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from safetensors.torch import save

from dsv4.convert.sources import hub
from dsv4.convert.sources.local import LocalSource
from dsv4.convert.sources.open import hub_name, open_source
from dsv4.formats.errors import SourceError

Asked = list[tuple[str, str | None]]


def _heard(sentence: str) -> None:
    raise AssertionError(sentence)


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Asked:
    """Hub ids and revisions that would have been opened; the working directory is empty."""
    seen: Asked = []

    def opened(repo: str, revision: str | None, on_wait: object) -> None:
        assert on_wait in (None, _heard)
        seen.append((repo, revision))

    monkeypatch.setattr(hub, "HubSource", opened)
    monkeypatch.chdir(tmp_path)
    return seen


def test_a_directory_is_local(checkpoint: Path) -> None:
    for given in (checkpoint, str(checkpoint)):
        assert isinstance(open_source(given), LocalSource)
        with pytest.raises(SourceError, match="--revision main has no meaning for the directory"):
            open_source(given, "main")
    (Path.cwd() / "org").mkdir()
    (Path.cwd() / "org" / "name").symlink_to(checkpoint)
    assert isinstance(open_source("org/name"), LocalSource)


@pytest.mark.parametrize("given", ["deepseek-ai/DeepSeek-V4-Flash", "a/b", "_a/b.c_d-e", "1/2"])
def test_a_hub_id_is_the_hub_s(given: str, asked: Asked) -> None:
    open_source(given)
    open_source(given, "v1")
    assert asked == [(given, None), (given, "v1")]


@pytest.mark.parametrize(
    "given",
    ["./x", "../x", "/x", "~/x", "~x", "a/b/c", "x/y/", "/nonexistent/a" * 500, Path("a/b")],
)
def test_a_path_that_leads_nowhere_is_no_directory(given: str | Path, asked: Asked) -> None:
    with pytest.raises(SourceError) as refusal:
        open_source(given)
    expected = f"there is no directory {given}; give one, or a hub id such as org/name"
    assert str(refusal.value) == expected
    assert asked == []


@pytest.mark.parametrize(
    "given", ["x", "", "a b/c", "a/", "https:x", "é/b", "a/b?c", "a/-b", "a/b\0"]
)
def test_anything_else_is_neither(given: str, asked: Asked) -> None:
    with pytest.raises(SourceError, match="is neither a directory nor a hub id such as org/name"):
        open_source(given)
    assert asked == []


FILES = {
    "x.safetensors": (save({}), "x.safetensors is one file of a checkpoint"),
    "y.safetensors": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        "y.safetensors is a Git LFS pointer",
    ),
    "x.gguf": (b"GGUF\3\0\0\0", "x.gguf is a GGUF file"),
    "x.bin": (pickle.dumps({"a": 1}), "x.bin is a pickle, which is never opened"),
    "config.json": (b"{}", "config.json is a file"),
    "README.md": (b"# A model", "README.md is a file"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_no_checkpoint(name: str) -> None:
    content, sentence = FILES[name]
    (Path.cwd() / name).write_bytes(content)
    with pytest.raises(SourceError) as refusal:
        open_source(name)
    assert str(refusal.value) == f"{sentence}; give the directory of a checkpoint"


ADDRESSES = {
    "https://huggingface.co/org/name": None,
    "https://huggingface.co/org/name/": None,
    "http://www.huggingface.co/org/name?library=x#files": None,
    "HTTPS://HuggingFace.co/org/name": None,
    "huggingface.co/org/name": None,
    "https://hf.co/org/name/tree/v1": "v1",
    "https://huggingface.co/org/name/tree/refs%2Fpr%2F3": "refs/pr/3",
    "https://huggingface.co/org/name/tree/refs/pr/3": "refs/pr/3",
    "https://hub.example:8/org/name": None,
    "hf://org/name": None,
}


@pytest.mark.parametrize("given", ADDRESSES)
def test_the_address_of_a_repository_is_its_id(
    given: str, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example:8")
    open_source(given)
    assert asked == [("org/name", ADDRESSES[given])]
    named = ADDRESSES[given] or "beta"
    open_source(given, named)
    assert asked[1:] == [("org/name", named)]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            "https://huggingface.co/org/name/blob/main/config.json",
            "of something in .*; give org/name",
        ),
        (
            "https://huggingface.co/org/name/tree/main/inference",
            "of something in .*; give org/name",
        ),
        ("https://huggingface.co/datasets/org/name", "is not the address of a model on the hub"),
        ("https://huggingface.co/org", "is not the address of a model on the hub"),
        ("https://huggingface.co/../..", "is not the address of a model on the hub"),
        ("https://[x", "is not an address"),
        ("https://mirror.example/org/name", "is not on huggingface.co; give org/name, with HF_END"),
        ("org/name@v1", "give org/name and --revision v1"),
        ("hf://org/name@v1", "give a hub id such as org/name"),
    ],
)
def test_other_addresses_are_refused(given: str, sentence: str, asked: Asked) -> None:
    with pytest.raises(SourceError, match=sentence) as refusal:
        open_source(given)
    assert "\n" not in str(refusal.value)
    assert asked == []


def test_two_revisions_are_refused(asked: Asked) -> None:
    with pytest.raises(SourceError, match=r"--revision v2 contradicts https://.*tree/v1"):
        open_source("https://huggingface.co/org/name/tree/v1", "v2")
    assert asked == []


@pytest.mark.parametrize("name", ["nonsense", "./here/it/is", ""])
def test_where_no_directory_can_be_given_none_is_asked_for(name: str) -> None:
    with pytest.raises(SourceError, match=r"is not a hub id; give one such as org/name$"):
        hub_name(name)
