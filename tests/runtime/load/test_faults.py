"""Whatever is wrong with the files, a load ends with one sentence and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest

from dsv4.formats.errors import StoreError
from dsv4.formats.store.integrity import verify
from dsv4.formats.store.reader import PackedStore
from dsv4.runtime.load import Settings, load_weights
from dsv4.runtime.load import files as reading
from tests.formats.store import packing

CODES = "layers/0/ffn/experts/w2/codes/c/1/0/0"
SMALL = "norm/weight/c/0"


def _flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 0x10
    path.write_bytes(raw)


def _lengthen(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"\0")


def _link(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def _directory_link(path: Path) -> None:
    elsewhere = path.parents[2] / "elsewhere"
    path.parents[1].rename(elsewhere)
    path.parents[1].symlink_to(elsewhere)


# Each happens after the store was opened: what is wrong before, opening refuses.
FAULTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "missing": (f"{CODES}: it cannot be opened: No such file", lambda s: (s / CODES).unlink()),
    "truncated": (f"{CODES}: it has 4096 bytes", lambda s: os.truncate(s / CODES, 4096)),
    "longer": (f"{CODES}: it has", lambda s: _lengthen(s / CODES)),
    "a link": (f"{CODES}: it cannot be opened", lambda s: _link(s / CODES)),
    "below a link": ("is a symbolic link, not a directory", lambda s: _directory_link(s / CODES)),
    "flipped, first chunk": (
        rf"{CODES}: chunk 0 \(bytes 0 to 8192\) does not match.*dsv4 repair",
        lambda s: _flip(s / CODES, 5),
    ),
    "flipped, last chunk": (f"{CODES}: chunk 3 ", lambda s: _flip(s / CODES, 4 * 8192 - 1)),
    "flipped, small": (f"{SMALL}: chunk 0 ", lambda s: _flip(s / SMALL, 3)),
}


@pytest.mark.parametrize("verify", ["readers", "device"])
@pytest.mark.parametrize("slot", [4096, 1 << 20])  # chunks exceed the first
@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_named(
    mutable: Path, case: str, slot: int, verify: Literal["readers", "device"]
) -> None:
    message, damage = FAULTS[case]
    store = PackedStore.open(mutable)
    damage(mutable)
    before = threading.active_count()
    with pytest.raises(StoreError, match=message):
        load_weights(store, "cpu", settings=Settings(3, slot, verify=verify))
    assert threading.active_count() == before


def test_without_checksums_a_flipped_bit_is_loaded(mutable: Path) -> None:
    """So it is the checksum that finds it."""
    store = PackedStore.open(mutable)
    _flip(mutable / CODES, 5)
    weights = load_weights(store, "cpu", settings=Settings(verify="off"))
    raw = weights.array("layers/0/ffn/experts/w2/codes").row(2)
    assert raw.numpy().tobytes()[5] == (mutable / CODES).read_bytes()[5]


def test_a_store_of_another_layout_is_refused(mutable: Path) -> None:
    def edit(document: dict[str, object]) -> None:
        nodes = document["consolidated_metadata"]["metadata"]  # type: ignore[index]
        nodes["head"]["attributes"]["dsv4"]["layout"] = "nvfp4.nmajor"

    packing.edit_metadata(mutable, edit)
    with pytest.raises(StoreError, match=r"head: format 'nvfp4' with layout 'nvfp4\.nmajor'"):
        PackedStore.open(mutable)


def test_a_file_that_ends_early_while_it_is_read(
    sample: PackedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.preadv

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return 0 if offset else real(descriptor, [buffers[0][:100]], offset)

    monkeypatch.setattr(os, "preadv", short)
    with pytest.raises(StoreError, match="it ends at byte 100"):
        load_weights(sample, "cpu", settings=Settings(readers=1))


def test_short_reads_are_continued(sample: PackedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, bufs, at: real(fd, [bufs[0][:1000]], at))
    load_weights(sample, "cpu", settings=Settings(readers=2))  # verified


def test_a_failing_disk_is_named(sample: PackedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(StoreError, match=r"reading bytes 0 to \d+ failed: Input/output error"):
        load_weights(sample, "cpu")


def test_a_progress_hook_that_fails_ends_the_load(sample: PackedStore) -> None:
    def hook(done: int) -> None:
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        load_weights(sample, "cpu", progress=hook)


INTERRUPTED = """
import os, signal, sys, threading, time
from dsv4.formats.store.reader import PackedStore
from dsv4.runtime.load import Settings, load_weights
store = PackedStore.open(sys.argv[1])
def hook(done):
    if not hook.sent:
        hook.sent = True
        os.kill(os.getpid(), int(sys.argv[2]))
hook.sent = False
try:
    load_weights(store, "cpu", settings=Settings(readers=2, slot_nbytes=4096), progress=hook)
except KeyboardInterrupt:
    time.sleep(0.1)  # a thread that was just being started sees the stop and ends
    print("interrupted", threading.active_count())
"""


def test_interrupted_and_killed_half_way(sample_path: Path) -> None:
    def run(which: signal.Signals) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", INTERRUPTED, str(sample_path), str(int(which))]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    done = run(signal.SIGINT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted 1\n", "")
    assert run(signal.SIGKILL).returncode == -signal.SIGKILL
    verify(PackedStore.open(sample_path))  # nothing was written


def test_files_that_do_not_say_what_is_cached_are_read_plainly(
    sample: PackedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "SMALLEST_DIRECT", 4096)
    monkeypatch.setattr(reading, "_CACHESTAT", 100_000)  # no such system call
    report = load_weights(sample, "cpu", settings=Settings(direct=True)).reports[0]
    assert report.spent.direct_bytes == 0


def test_a_file_system_without_direct_reads(
    sample: PackedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "SMALLEST_DIRECT", 4096)
    monkeypatch.setattr(reading, "cached_share", lambda *a: 0.0)
    real = os.open

    def refuse(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    report = load_weights(sample, "cpu", settings=Settings(direct=True)).reports[0]
    assert report.spent.direct_bytes == 0 and report.spent.bytes == report.nbytes


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EFAULT])
def test_memory_that_does_not_go_with_direct_reads(
    sample: PackedStore, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(reading, "SMALLEST_DIRECT", 4096)
    monkeypatch.setattr(reading, "cached_share", lambda *a: 0.0)
    real_open, real_read = os.open, os.preadv
    direct: set[int] = set()
    refused: list[int] = []

    def opened(path: Path, flags: int, *mode: int) -> int:
        descriptor = real_open(path, flags & ~os.O_DIRECT, *mode)
        (direct.add if flags & os.O_DIRECT else direct.discard)(descriptor)
        return descriptor

    def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if descriptor in direct:
            refused.append(offset)
            raise OSError(code, "refused")
        return real_read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "preadv", read)
    report = load_weights(sample, "cpu", settings=Settings(direct=True)).reports[0]
    assert refused
    assert report.spent.direct_bytes == 0 and report.spent.verified_bytes == report.nbytes
