"""What the machine itself can do: the bounds that a load is held against, in bytes a second."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dsv4.formats.store.specs import ALIGNMENT, FileSpec

BUS_BYTES = 64 << 20
PIECE = 8 << 20
MEMORY_BYTES = 64 << 20  # of a thread: more than its share of any cache
MEMORY_ROUNDS = 8


@dataclasses.dataclass(frozen=True)
class Machine:
    """Measured now. disk: O_DIRECT, None where files have no disk. page_cache: reads from it, and
    memory: plain copies, both by as many threads as there are readers.
    """

    device: str
    cores: int
    bus: float
    disk: float | None
    page_cache: float
    memory: float


def bus_rate(device: torch.device) -> float:
    """From pinned memory to a GPU; to the CPU, from memory to memory."""
    pinned = torch.empty(BUS_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(BUS_BYTES, dtype=torch.uint8, device=device)
    pinned.fill_(1)
    best = 0.0
    for _ in range(4):
        settle(device)
        begin = time.perf_counter()
        for _ in range(8):
            for at in range(0, BUS_BYTES, PIECE):
                piece = slice(at, at + PIECE)
                target[piece].copy_(pinned[piece], non_blocking=True)
        settle(device)
        best = max(best, 8 * BUS_BYTES / (time.perf_counter() - begin))
    return best


def file_rate(
    root: Path, files: Sequence[FileSpec], threads: int, piece: int, *, direct: bool
) -> float | None:
    """Reads of the files' whole blocks, and nothing else; None when O_DIRECT is not possible."""
    pieces = [
        (root / file.key, at, min(piece, end - at))
        for file in files
        if (end := file.payload_nbytes // ALIGNMENT * ALIGNMENT)
        for at in range(0, end, piece)
    ]
    flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    left, failed = iter(pieces), threading.Event()

    def read(number: int) -> None:
        memory = memoryview(mmap.mmap(-1, piece))
        for path, at, nbytes in left:
            try:
                descriptor = os.open(path, flags)
            except OSError:
                failed.set()
                return
            try:
                os.preadv(descriptor, [memory[:nbytes]], at)
            finally:
                os.close(descriptor)

    seconds = _together(threads, read)
    return None if failed.is_set() else sum(nbytes for *_, nbytes in pieces) / seconds


def disk_rate(root: Path, files: Sequence[FileSpec], threads: int, piece: int) -> float | None:
    """O_DIRECT reads of the files; None where there is no disk."""
    rate = file_rate(root, files, threads, piece, direct=True)
    return None if _in_memory(root) else rate


def memory_rate(threads: int) -> float:
    """Plain copies by several threads."""
    memory = [mmap.mmap(-1, 2 * MEMORY_BYTES) for _ in range(threads)]
    at = [ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in memory]

    def copy(number: int) -> None:
        for _ in range(MEMORY_ROUNDS):
            ctypes.memmove(at[number] + MEMORY_BYTES, at[number], MEMORY_BYTES)

    _together(threads, copy)  # the memory is there
    return threads * MEMORY_ROUNDS * MEMORY_BYTES / _together(threads, copy)


def _together(threads: int, work: Callable[[int], None]) -> float:
    """Seconds until `work` is done by all threads; it is given the thread's number."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, number) for number in range(threads)]:
            done.result()
    return time.perf_counter() - begin


def settle(device: torch.device) -> None:
    """Wait for all that was queued on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _in_memory(root: Path) -> bool:
    """Whether the folder lies in a file system that is memory: files there are never cold."""
    best, kind = "", ""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, what, *_ = line.split(" ")
        if str(root.resolve()).startswith(where) and len(where) >= len(best):
            best, kind = where, what
    return kind in ("tmpfs", "ramfs")


def drop(paths: Sequence[Path]) -> None:
    """Let files leave the page cache, as far as they are on disk."""
    for path in paths:
        with path.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch(paths: Sequence[Path], threads: int) -> None:
    """Bring files into the page cache."""

    def one(path: Path) -> None:
        buffer = bytearray(PIECE)
        with contextlib.closing(path.open("rb", buffering=0)) as opened:
            while opened.readinto(buffer):
                pass

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, paths))
