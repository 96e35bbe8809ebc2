"""An unfinished conversion that is another one: what differs, and the command that goes on."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import dsv4
from dsv4.cli import cli
from dsv4.convert import engine, resume
from dsv4.formats.errors import ConflictError, Dsv4Error
from tests.formats.store.golden import unpack


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one layer."""
    return unpack(tmp_path_factory.mktemp("golden")) / "source"


class StoppedError(Exception):
    """The conversion ends here."""


@pytest.fixture
def begun(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Begins a conversion and stops it before its metadata."""

    def begin(**how: Any) -> Path:
        with monkeypatch.context() as patch, pytest.raises(StoppedError):
            patch.setattr(engine, "_complete", _stop)
            dsv4.convert(source, tmp_path / "packed", **how)
        return tmp_path / "packed"

    return begin


def _stop(*args: object) -> None:
    raise StoppedError


def _continues(sentence: str) -> None:
    """The command in the sentence, run as it stands, finishes the conversion."""
    (command,) = re.findall("`(dsv4 convert [^`]*)`", sentence)
    done = CliRunner().invoke(cli, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output


def test_another_recipe(source: Path, begun: Callable[..., Path]) -> None:
    out = begun(recipe="nvfp4", keep=["*.wq_b.weight", "*.wkv.weight"])
    with pytest.raises(ConflictError) as caught:
        dsv4.convert(source, out, recipe="native")
    sentence = str(caught.value)
    there = "recipe nvfp4 --keep '*.wkv.weight' --keep '*.wq_b.weight'"
    assert f"it was begun by {there}, now it is native; go on with" in sentence
    _continues(sentence)
    assert dsv4.open(out).store.manifest["recipe"]["name"] == "nvfp4"


def test_another_source(source: Path, begun: Callable[..., Path], tmp_path: Path) -> None:
    out = begun()
    other = Path(shutil.copytree(source, tmp_path / "other"))
    (other / "LICENSE").write_text("another\n")
    with pytest.raises(ConflictError, match="files of the source are not those it was begun from"):
        dsv4.convert(other, out)
    dsv4.convert(source, out)


def test_another_tool(
    source: Path, begun: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = begun()
    monkeypatch.setattr(resume, "TOOL", "dsv4 99")
    with pytest.raises(ConflictError, match=r"by dsv4 0\S+, this is dsv4 99; go on with dsv4 0"):
        dsv4.convert(source, out)


def test_no_digest_is_shown(source: Path, begun: Callable[..., Path], tmp_path: Path) -> None:
    out = begun(recipe="native")
    other = Path(shutil.copytree(source, tmp_path / "other"))
    (other / "LICENSE").write_text("another\n")
    with pytest.raises(ConflictError) as caught:
        dsv4.convert(other, out)
    assert not re.search("[0-9a-f]{64}", str(caught.value))


PLACES: dict[str, tuple[str, Callable[[Path], str]]] = {
    "a file": ("is not a directory; choose another place", lambda p: _file(p / "afile")),
    "below a file": ("cannot be created: Not a directory", lambda p: _file(p / "file") + "/x"),
    "a link to nothing": ("is a link to nothing", lambda p: _dangling(p / "link")),
    "in /proc": ("/proc/x cannot be created", lambda p: "/proc/x"),
    "empty": ("--out is empty", lambda p: ""),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_place_that_cannot_be_one(source: Path, tmp_path: Path, case: str) -> None:
    match, make = PLACES[case]
    out = make(tmp_path)
    with pytest.raises(Dsv4Error, match=match) as caught:
        dsv4.convert(source, out)
    assert "finished files are kept" not in str(caught.value)
    assert CliRunner().invoke(cli, ["convert", "--hf", str(source), "--out", out]).exit_code != 0
    assert list(Path.cwd().glob("journal*")) == []


def _file(path: Path) -> str:
    path.write_text("x")
    return str(path)


def _dangling(path: Path) -> str:
    path.symlink_to(path.parent / "nowhere")
    return str(path)
