"""Interruptions of every kind: the same bytes in the end, and nothing valid before."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from dsv4.formats.errors import OutOfSpaceError, StoreError
from dsv4.formats.store import durable
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import JOURNAL
from dsv4.formats.store.writer import StoreWriter
from tests.formats.store import packing


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, bytes]]:
    """Root and bytes of the sample written in one go."""
    out = tmp_path_factory.mktemp("reference") / "packed"
    return packing.write(out), packing.tree(out)


Reference = tuple[str, dict[str, bytes]]


_KILLED = """
import os, signal, sys
from pathlib import Path
from tests.formats.store import packing
from dsv4.formats.store.writer import StoreWriter

def parts_then_death(parts):
    yield from parts[:-1]
    yield parts[-1][:1]
    os.kill(os.getpid(), signal.SIGKILL)

with StoreWriter(Path(sys.argv[1]), packing.IDENTITY) as writer:
    for number, (file, parts) in enumerate(packing.sample().files()):
        writer.write(file, parts_then_death(parts) if number == int(sys.argv[2]) else parts)
"""


@pytest.mark.parametrize("survivors", [0, 3, 17])
def test_resume_after_sigkill(tmp_path: Path, reference: Reference, survivors: int) -> None:
    out = tmp_path / "packed"
    run = subprocess.run([sys.executable, "-c", _KILLED, str(out), str(survivors)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert list(out.rglob("*.partial"))
    with pytest.raises(StoreError, match="unfinished"):
        PackedStore.open(out)
    with StoreWriter(out, packing.IDENTITY) as writer:
        kept = [file.key for file, _ in packing.sample().files() if writer.has(file)]
    assert len(kept) == survivors
    assert (packing.write(out), packing.tree(out)) == reference


class _PowerLossError(BaseException):
    """Not an Exception: nothing may catch it and go on."""


@pytest.mark.parametrize("operation", ["fsync", "replace", "write", "mkdir"])
def test_resume_after_a_crash_at_any_step(
    tmp_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """Crash at the n-th call, for n over the whole conversion, each time going on from there."""
    out, calls, crash_at = tmp_path / "packed", 0, 0
    original = getattr(os, operation)

    def crash(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == crash_at:
            raise _PowerLossError
        return original(*args, **kwargs)

    monkeypatch.setattr(os, operation, crash)
    steps = iter([1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233])
    crashes = 0
    while True:
        calls, crash_at = 0, next(steps, 0)
        try:
            root = packing.write(out)
            break
        except _PowerLossError:
            crashes += 1
            with pytest.raises(StoreError, match=r"unfinished|not a packed|no directory"):
                PackedStore.open(out)
    monkeypatch.undo()
    assert crashes >= 3
    assert (root, packing.tree(out)) == reference


def test_a_torn_last_line_of_the_journal_is_forgotten(tmp_path: Path, reference: Reference) -> None:
    files = list(packing.sample().files())
    with StoreWriter(tmp_path, packing.IDENTITY) as writer:
        for file, parts in files[:5]:
            writer.write(file, parts)
    journal = tmp_path / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-9])
    with StoreWriter(tmp_path, packing.IDENTITY) as writer:
        assert [writer.has(file) for file, _ in files[:6]] == [True] * 4 + [False] * 2
    assert (packing.write(tmp_path), packing.tree(tmp_path)) == reference


def test_a_torn_first_line_is_a_fresh_start(tmp_path: Path, reference: Reference) -> None:
    (tmp_path / JOURNAL).write_bytes(b'{"dsv4_jour')
    assert (packing.write(tmp_path), packing.tree(tmp_path)) == reference


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, packing.IDENTITY) as writer:
        for file, parts in list(packing.sample().files())[:3]:
            writer.write(file, parts)
    lines = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
    for broken in (b"{]\n", b"7\n", b'{"path": "x", "bytes": true}\n'):
        (tmp_path / JOURNAL).write_bytes(b"".join([*lines[:2], broken, *lines[3:]]))
        with pytest.raises(StoreError, match=r"journal|malformed"):
            StoreWriter(tmp_path, packing.IDENTITY)


def test_a_file_that_lost_bytes_is_written_again(tmp_path: Path, reference: Reference) -> None:
    files = list(packing.sample().files())
    with StoreWriter(tmp_path, packing.IDENTITY) as writer:
        for file, parts in files:
            writer.write(file, parts)
    os.truncate(tmp_path / files[2][0].key, 1)
    (tmp_path / files[4][0].key).unlink()
    with StoreWriter(tmp_path, packing.IDENTITY) as writer:
        assert [f.key for f, _ in files if not writer.has(f)] == [files[i][0].key for i in (2, 4)]
    assert (packing.write(tmp_path), packing.tree(tmp_path)) == reference


def test_notes_survive(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, packing.IDENTITY) as writer:
        writer.note("a", {"x": [1, 0.1]})
        writer.note("b", 1)
        writer.note("b", 2)
        with pytest.raises(StoreError, match="note c"):
            writer.note("c", float("inf"))
    with StoreWriter(tmp_path, packing.IDENTITY) as writer:
        assert writer.notes() == {"a": {"x": [1, 0.1]}, "b": 2}


def test_ctrl_c_leaves_a_resumable_state(tmp_path: Path, reference: Reference) -> None:
    files = list(packing.sample().files())

    def interrupted() -> Iterator[torch.Tensor]:
        yield files[1][1][0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path, packing.IDENTITY) as writer:
        writer.write(*files[0])
        writer.write(files[1][0], interrupted())
    assert not list(tmp_path.rglob("*.partial"))
    assert (packing.write(tmp_path), packing.tree(tmp_path)) == reference


# --- no space, I/O errors -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "error", "hint"),
    [
        (errno.ENOSPC, OutOfSpaceError, "run the same command again"),
        (errno.EDQUOT, OutOfSpaceError, "run the same command again"),
        (errno.EIO, StoreError, "run the same command again"),
        (errno.EFBIG, StoreError, "lift the limit on the size of a file"),
        (errno.EACCES, StoreError, "permission to write there, or choose another directory$"),
        (errno.EROFS, StoreError, "permission to write there, or choose another directory$"),
    ],
)
def test_a_failing_disk(
    tmp_path: Path,
    reference: Reference,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    error: type[Exception],
    hint: str,
) -> None:
    original, budget = os.write, 300_000

    def limited(descriptor: int, data: Any) -> int:
        nonlocal budget
        budget -= len(data)
        if budget < 0:
            raise OSError(code, os.strerror(code))
        return original(descriptor, data)

    monkeypatch.setattr(os, "write", limited)
    with pytest.raises(error, match=hint) as caught:
        packing.write(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert not list(tmp_path.rglob("*.partial"))
    monkeypatch.undo()
    with StoreWriter(tmp_path, packing.IDENTITY) as writer:
        assert any(writer.has(file) for file, _ in packing.sample().files())
    assert (packing.write(tmp_path), packing.tree(tmp_path)) == reference


def test_a_really_full_disk(tmp_path: Path) -> None:
    """/dev/full: the kernel's own ENOSPC through the same path."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        with (
            pytest.raises(OutOfSpaceError, match="disk is full"),
            durable.storage_errors(tmp_path, "x"),
        ):
            durable.write_all(descriptor, b"x")
    finally:
        os.close(descriptor)


def test_space_is_asked_for_before_writing(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, packing.IDENTITY) as writer:
        writer.require_space(1)
        with pytest.raises(OutOfSpaceError, match=r"1152921\.50 TB are still .* are free"):
            writer.require_space(1 << 60)


def test_a_small_want_of_space_is_said_in_small_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StoreWriter(tmp_path, packing.IDENTITY) as writer:
        nothing = list(os.statvfs(tmp_path))
        nothing[0], nothing[1], nothing[4] = 4096, 4096, 75  # f_bsize, f_frsize, f_bavail
        monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(nothing))
        with pytest.raises(OutOfSpaceError, match=r"1\.4 MB are still .*, 307\.2 kB are free"):
            writer.require_space(1_400_000)


def test_errors_of_the_source_are_not_blamed_on_the_disk(tmp_path: Path) -> None:
    def failing(part: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "from the source")

    file, _ = next(packing.sample().files())
    with StoreWriter(tmp_path, packing.IDENTITY) as writer, pytest.raises(OSError, match="source"):
        writer.write(file, map(failing, [0]))
