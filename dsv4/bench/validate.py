"""`dsv4 bench validate`: the full pass beside a plain read of the same files, in turns.

Cold: the files leave the page cache before each run, so that the disk is the bound. Hot: all bytes
are in the page cache, and what remains is the work on them. The plain read does nothing with the
bytes; it uses as many threads as the pass, and half as many, and the faster of the two counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dsv4
from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.model.releases import MODELS
from dsv4.formats.store.specs import FileSpec
from dsv4.synthetic.disk_space import require_space
from dsv4.synthetic.real_shapes import (
    SMALL_VOCABULARY,
    checkpoint_bytes,
    fresh_layers,
    write_checkpoint,
)
from dsv4.validate.checks.content import (
    PIECE_BYTES,
    THREADS_A_CORE,
    Checksums,
    check_content,
    default_workers,
)
from dsv4.validate.report import Report

ROOM = 2.25  # of the checkpoint's bytes: itself and its store


@dataclasses.dataclass(frozen=True)
class Pass:
    """One kind of run. rates: bytes a second, turn by turn; of_read: the median fraction."""

    name: str
    cold: bool
    rates: tuple[float, ...]
    of_read: float
    cpu_seconds_per_gb: float
    correct: bool


@contextlib.contextmanager
def real_store(model: str, directory: Path, experts: int) -> Iterator[Path]:
    """A store of one layer of `model` below `directory`, removed afterwards."""
    whole = MODELS[model]
    config = fresh_layers(whole, 1, experts or whole.n_routed_experts, SMALL_VOCABULARY)
    require_space(directory, int(ROOM * checkpoint_bytes(config)))
    with tempfile.TemporaryDirectory(prefix="dsv4-bench-", dir=directory) as scratch:
        source, store = Path(scratch, "source"), Path(scratch, "store")
        write_checkpoint(source, config)
        dsv4.convert(source, store)
        os.sync()  # writing it back is nobody's business here
        yield store


def full_pass(store: Path, turns: int) -> list[Pass]:
    """Measure plain read, full pass and full pass with XXH3 alone, cold and hot.

    Raises StoreError when `store` cannot be opened; a finding makes a pass incorrect.
    """
    packed = PackedCheckpoint.open(store)
    files = sorted(packed.store.files_under(None), key=lambda file: -file.nbytes)
    lanes: dict[str, Callable[[], bool]] = {
        "plain read": lambda: _read(store, files, default_workers() * THREADS_A_CORE),
        "plain read, half the threads": lambda: _read(
            store, files, default_workers() * THREADS_A_CORE // 2
        ),
        "full pass": lambda: _check(packed, "blake3"),
        "full pass, XXH3 alone": lambda: _check(packed, "xxh3"),
    }
    total = sum(file.nbytes for file in files)
    states = (_state(store, files, lanes, total, turns, cold) for cold in (True, False))
    return [one for state in states for one in state]


def _state(
    store: Path,
    files: list[FileSpec],
    lanes: dict[str, Callable[[], bool]],
    total: int,
    turns: int,
    cold: bool,
) -> list[Pass]:
    """All lanes in turns. Without `cold` a first turn fills the page cache and does not count."""
    rates: dict[str, list[float]] = {name: [] for name in lanes}
    cpu: dict[str, list[float]] = {name: [] for name in lanes}
    correct = dict.fromkeys(lanes, True)
    for turn in range(turns if cold else turns + 1):
        for name, work in lanes.items():
            if cold:
                _drop(store, files)
            begin, begin_cpu = time.perf_counter(), time.process_time()
            correct[name] &= work()
            seconds, busy = time.perf_counter() - begin, time.process_time() - begin_cpu
            if cold or turn:
                rates[name].append(total / seconds)
                cpu[name].append(busy / (total / 1e9))
    reads = [rates[name] for name in lanes if name.startswith("plain read")]
    best = [max(pair) for pair in zip(*reads, strict=True)]
    return [
        Pass(
            name,
            cold,
            tuple(rates[name]),
            statistics.median(r / b for r, b in zip(rates[name], best, strict=True)),
            statistics.median(cpu[name]),
            correct[name],
        )
        for name in lanes
    ]


def _check(packed: PackedCheckpoint, checksums: Checksums) -> bool:
    report = Report(packed.store.root)
    check_content(packed, report, workers=default_workers(), checksums=checksums)
    return report.ok


def _read(store: Path, files: list[FileSpec], threads: int) -> bool:
    def one(file: FileSpec) -> int:
        buffer = bytearray(PIECE_BYTES)
        with (store / file.key).open("rb", buffering=0) as opened:
            return sum(iter(lambda: opened.readinto(buffer) or 0, 0))

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, files)) == [file.nbytes for file in files]


def _drop(store: Path, files: list[FileSpec]) -> None:
    for file in files:
        with (store / file.key).open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
