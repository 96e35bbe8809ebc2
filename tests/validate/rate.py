"""The full pass beside a plain read of the same files by as many threads, in turns.

    python -m tests.validate.rate STORE [cold]

`cold` drops the files from the page cache before each turn. Prints GB/s and the ratio to the read.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.validate.content import PIECE_BYTES, Checksums, check_content, default_workers
from dsv4.validate.report import Report

TURNS = 5


def rates(store: Path, *, cold: bool) -> list[tuple[float, float, float]]:
    """-> bytes per second of each turn: plain read, full pass, full pass with XXH3 alone."""
    packed, workers = PackedCheckpoint.open(store), default_workers()
    files = sorted(packed.store.files_under(None), key=lambda file: -file.nbytes)
    paths = [store / file.key for file in files]

    def read() -> None:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(_read, paths))

    def check(checksums: Checksums) -> Callable[[], None]:
        def run() -> None:
            report = Report(store)
            check_content(packed, report, workers=workers, checksums=checksums)
            assert report.ok

        return run

    def rate(work: Callable[[], None]) -> float:
        for path in paths if cold else ():
            _drop(path)
        begin = time.perf_counter()
        work()
        return sum(file.nbytes for file in files) / (time.perf_counter() - begin)

    return [(rate(read), rate(check("blake3")), rate(check("xxh3"))) for _ in range(TURNS)]


def _read(path: Path) -> None:
    buffer = bytearray(PIECE_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _drop(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    for plain, full, fast in rates(Path(sys.argv[1]), cold="cold" in sys.argv[2:]):
        print(
            f"read {plain / 1e9:.2f} GB/s, full {full / 1e9:.2f} ({full / plain:.2f}), "
            f"xxh3 {fast / 1e9:.2f} ({fast / plain:.2f})"
        )
