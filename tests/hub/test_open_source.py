"""What a user gives: a directory, a hub id, or something that is told what it could have been."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4.convert import hub_source
from dsv4.convert.local_source import LocalSource
from dsv4.convert.open_source import open_source
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

    monkeypatch.setattr(hub_source, "HubSource", opened)
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


def test_a_file_is_no_checkpoint() -> None:
    (Path.cwd() / "x.safetensors").write_text("")
    with pytest.raises(SourceError, match=r"x\.safetensors is a file; give the directory"):
        open_source("x.safetensors")
