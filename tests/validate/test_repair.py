"""Repair: the published bytes again, nothing worse on the way, and refusals that say why."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dsv4
from dsv4.convert.engine import convert
from dsv4.convert.sources.local import LocalSource
from dsv4.formats.errors import ConflictError, Dsv4Error, SourceError, StoreError
from dsv4.formats.model.inventory import DraftKind
from dsv4.formats.store.durable import DirectoryLock
from dsv4.synthetic.tiny import TINY, write_tiny
from tests.commands.test_cli import dsv4_command, refused
from tests.formats.store.packing import tree
from tests.validate.small import SMALL

W13 = "layers/0/ffn/experts/w13"
CODES = f"{W13}/codes/c/0/0/0"
SCALES = f"{W13}/scales/c/0/0/0/0"
WQ_B = "layers/1/attn/wq_b/codes/c/0/0"


def _flip(path: Path, *offsets: int) -> None:
    raw = bytearray(path.read_bytes())
    for offset in offsets:
        raw[offset] ^= 0x10
    path.write_bytes(raw)


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 7)


def _flip_all(store: Path, *keys: str) -> None:
    for key in keys:
        _flip(store / key, 0, -100)


def _remove_folders(store: Path) -> None:
    for path in store.iterdir():
        if path.is_dir():
            shutil.rmtree(path)


def _as_link(path: Path) -> None:
    elsewhere = path.parents[1] / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


LOST: dict[str, tuple[int, Callable[[Path], object]]] = {
    "one chunk of codes": (1, lambda s: _flip(s / CODES, 40000)),
    "three files": (3, lambda s: _flip_all(s, CODES, SCALES, WQ_B)),
    "global scales": (1, lambda s: _flip(s / W13 / "global_scale/c/0/0", 3)),
    "lineage": (1, lambda s: (s / W13 / "lineage/c/0/0/0").unlink()),
    "a whole stack": (4, lambda s: shutil.rmtree(s / W13)),
    "short file": (1, lambda s: os.truncate(s / WQ_B, 9000)),
    "empty file": (1, lambda s: os.truncate(s / WQ_B, 0)),
    "missing file": (1, lambda s: (s / "embed/weight/c/0/0").unlink()),
    "rounded matrix": (1, lambda s: _flip(s / "head/codes/c/0/0", 5)),
    "rounded scales": (1, lambda s: _flip(s / "layers/0/ffn/gate/scales/c/0/0/0", 5)),
    "norm": (1, lambda s: _flip(s / "norm/weight/c/0", 5)),
    "asset": (1, lambda s: (s / "assets/tokenizer.json").unlink()),
    "empty asset": (1, lambda s: os.truncate(s / "assets/config.json", 0)),
    "a link in the place of a file": (2, lambda s: _as_link(s / CODES)),
    "everything": (200, lambda s: _remove_folders(s)),
}


@pytest.mark.parametrize("case", LOST)
def test_lost_bytes_come_from_the_source(
    small_source: Path, small_standard: Path, small_copy: Path, case: str
) -> None:
    count, harm = LOST[case]
    harm(small_copy)
    assert not dsv4.validate(small_copy).ok
    report = dsv4.repair(small_copy, source=small_source)
    (small_copy / W13 / "codes/c/0/elsewhere").unlink(missing_ok=True)
    assert tree(small_copy) == tree(small_standard)
    assert len(report.files) >= count
    assert report.ok == (case != "a link in the place of a file")  # what it led to is a stranger
    assert report.root == dsv4.open(small_standard).store.manifest["root"]
    assert json.loads(json.dumps(report.to_dict()))["ok"] == report.ok
    assert dsv4.validate(small_copy, source=small_source).ok


NOTHING_LOST: dict[str, Callable[[Path], object]] = {
    "grown file": lambda s: _grow(s / WQ_B),
    "sharding index": lambda s: _flip(s / WQ_B, -1),
    "cut within the index": lambda s: os.truncate(s / WQ_B, (s / WQ_B).stat().st_size - 5),
    "missing document": lambda s: (s / "head/zarr.json").unlink(),
    "altered document": lambda s: (s / W13 / "codes/zarr.json").write_text("{}"),
    "nothing": lambda s: None,
}


@pytest.mark.parametrize("case", NOTHING_LOST)
def test_what_is_known_needs_no_source(small_standard: Path, small_copy: Path, case: str) -> None:
    NOTHING_LOST[case](small_copy)
    report = dsv4.repair(small_copy)
    assert (report.ok, report.source) == (True, None)
    assert len(report.files) == (case != "nothing")
    assert tree(small_copy) == tree(small_standard)


@pytest.mark.parametrize("flavour", ["modelopt", "bf16"])
@pytest.mark.parametrize("recipe", ["native", "nvfp4"])
def test_every_dialect_and_recipe(tmp_path: Path, flavour: str, recipe: str) -> None:
    hub, packed = tmp_path / "hub", tmp_path / "packed"
    write_tiny(hub, SMALL, draft=DraftKind.NONE, flavour=flavour)
    convert(hub, packed, recipe=recipe, keep=["layers.0.attn.*"] if recipe == "nvfp4" else [])
    published = tree(packed)
    for file in dsv4.open(packed).store.files_under(None):
        _flip(packed / file.key, file.nbytes // 3)
    assert dsv4.repair(packed, source=hub).ok
    assert tree(packed) == published


def test_only_what_is_needed_is_read(
    small_source: Path, small_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    honest = LocalSource.read_into

    def watched(self: LocalSource, file: str, at: int, view: memoryview, what: str) -> None:
        read.append(what)
        honest(self, file, at, view, what)

    monkeypatch.setattr(LocalSource, "read_into", watched)
    _flip(small_copy / CODES, 2 * 32768 + 5)
    report = dsv4.repair(small_copy, source=small_source)
    assert [(file.key, file.made_bytes) for file in report.files] == [(CODES, 32768)]
    assert {name.rpartition(".")[0] for name in read} == {
        "layers.0.ffn.experts.2.w1",
        "layers.0.ffn.experts.2.w3",
    }


def _unchanged(store: Path, source: Path | None, error: type[Dsv4Error], match: str) -> None:
    before = tree(store)
    with pytest.raises(error, match=match):
        dsv4.repair(store, source=source)
    assert tree(store) == before


def test_another_source_is_refused(small_copy: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path / "seed", SMALL, seed=1, draft=DraftKind.NONE)
    write_tiny(tmp_path / "model", TINY)
    _flip(small_copy / CODES, 5)
    _grow(small_copy / "norm/weight/c/0")
    match = f"{CODES}: .*the source is not the one this store was made from"
    _unchanged(small_copy, tmp_path / "seed", SourceError, match)
    _unchanged(
        small_copy,
        tmp_path / "model",
        SourceError,
        "the source does not have it",
    )
    _unchanged(small_copy, tmp_path / "nowhere", SourceError, "there is no directory")
    _unchanged(small_copy, None, SourceError, "local directory; give it with --source")


def test_a_source_damaged_in_one_place_still_repairs_the_others(
    small_source: Path, small_standard: Path, small_copy: Path, tmp_path: Path
) -> None:
    wrong = Path(shutil.copytree(small_source, tmp_path / "wrong"))
    entry = LocalSource(wrong).entries["norm.weight"]
    _flip(wrong / entry.file, entry.begin)
    _flip(small_copy / CODES, 5)
    _flip(small_copy / "norm/weight/c/0", 5)
    report = dsv4.repair(small_copy, source=wrong)
    assert {file.key: file.failure is None for file in report.files} == {
        CODES: True,
        "norm/weight/c/0": False,
    }
    assert (small_copy / CODES).read_bytes() == (small_standard / CODES).read_bytes()
    assert not list(small_copy.rglob("*.partial"))


PINS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "root document": ("cannot be repaired: convert", lambda s: _flip(s / "zarr.json", 500)),
    "marker": ("cannot be repaired: convert", lambda s: _flip(s / "dsv4.complete", 60)),
    "no root document": ("cannot be repaired", lambda s: (s / "zarr.json").unlink()),
    "no marker": ("complete is missing", lambda s: (s / "dsv4.complete").unlink()),
    "no store": ("there is no directory", lambda s: shutil.rmtree(s)),
}


@pytest.mark.parametrize("case", PINS)
def test_what_pins_the_rest_cannot_be_repaired(
    small_source: Path, small_copy: Path, case: str
) -> None:
    match, harm = PINS[case]
    harm(small_copy)
    _unchanged(small_copy, small_source, StoreError, match)


def test_strangers_are_named_and_left(small_source: Path, small_copy: Path) -> None:
    (small_copy / "head/extra.partial").write_bytes(b"mine")
    report = dsv4.repair(small_copy, source=small_source)
    assert [file.key for file in report.files] == ["head/extra.partial"]
    assert "move it away" in report.files[0].problem
    assert (small_copy / "head/extra.partial").read_bytes() == b"mine"


def test_what_lies_in_the_way_is_named(
    small_source: Path, small_copy: Path, tmp_path: Path
) -> None:
    (small_copy / WQ_B).unlink()
    (small_copy / WQ_B).mkdir()
    shutil.move(small_copy / "head", tmp_path / "head")
    (small_copy / "head").symlink_to(tmp_path / "head")
    elsewhere = tree(tmp_path / "head")
    report = dsv4.repair(small_copy, source=small_source)
    failed = {file.key: file.failure for file in report.files if file.failure}
    assert "directory lies in its place" in str(failed[WQ_B])
    assert "is no directory" in str(failed["head/codes/c/0/0"])
    assert "head" in failed
    assert tree(tmp_path / "head") == elsewhere


def test_two_at_once_are_refused(small_copy: Path) -> None:
    lock = DirectoryLock(small_copy)
    assert dsv4.repair(small_copy).ok  # a whole store is only read
    _flip(small_copy / CODES, 5)
    with pytest.raises(ConflictError, match="another process is writing"):
        dsv4.repair(small_copy)
    lock.release(remove=True)


def test_a_whole_store_needs_no_permission_to_write(
    small_source: Path, small_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a read-only file system does, to whom permissions do not matter as well."""

    def read_only(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return opened(path, flags, *args, **kwargs)

    opened = os.open
    monkeypatch.setattr(os, "open", read_only)
    report = dsv4.repair(small_copy)
    assert (report.ok, report.files) == (True, [])
    _flip(small_copy / CODES, 5)
    with pytest.raises(StoreError, match="Read-only file system; give yourself the permission"):
        dsv4.repair(small_copy, source=small_source)


KILLED = """
import os, signal, sys
from dsv4.validate import repair
honest, calls = repair._prove, []
def prove(*args):
    calls.append(args)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return honest(*args)
repair._prove = prove
repair.repair(sys.argv[1], sys.argv[2])
"""


def test_a_killed_repair_leaves_nothing_worse(
    small_source: Path, small_standard: Path, small_copy: Path
) -> None:
    for key in (CODES, SCALES, WQ_B, "norm/weight/c/0"):
        _flip(small_copy / key, 5)
    good, before = tree(small_standard), tree(small_copy)
    done = subprocess.run([sys.executable, "-c", KILLED, small_copy, small_source], check=False)
    assert done.returncode == -signal.SIGKILL
    left = tree(small_copy)
    partials = {key for key in left if key.endswith(".partial")}
    assert partials
    assert all(left[key] in (before[key], good[key]) for key in good)
    assert sum(left[key] != good[key] for key in good) == 2
    named = {finding.where for finding in dsv4.validate(small_copy).findings}
    assert partials <= named
    assert dsv4.repair(small_copy, source=small_source).ok
    assert tree(small_copy) == good


def test_the_command(small_source: Path, small_standard: Path, small_copy: Path) -> None:
    _flip(small_copy / CODES, 5)
    assert "give it with --source" in refused("repair", small_copy)
    done = dsv4_command("repair", small_copy, "--source", small_source)
    assert done.returncode == 0
    assert all(line.endswith("  examining") for line in done.stderr.splitlines())
    assert CODES in done.stdout
    assert dsv4.open(small_standard).store.manifest["root"] in done.stdout
    (small_copy / "extra").write_bytes(b"")
    done = dsv4_command("repair", small_copy, "--json")
    document: dict[str, Any] = json.loads(done.stdout)
    assert (done.returncode, done.stderr, document["ok"]) == (1, "", False)
    assert [file["key"] for file in document["files"]] == ["extra"]
