"""The threads of a conversion: readers, workers, and one ledger that makes their work durable.

    reader   one pass over a source file: read, hash, hand over units    (back-pressure: `_Room`)
    worker   a unit: transform, write into partial files
    ledger   every COMMIT_BYTES: fdatasync, journal; files that are covered become whole

All stages overlap. Whatever fails first stops the rest; what is in the journal stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from dsv4.convert.budget import Budget
from dsv4.convert.file_pass import FilePass, Fingerprints, is_inline
from dsv4.convert.outputs import Result, Unit
from dsv4.convert.source import Reader, Source
from dsv4.formats.errors import Dsv4Error
from dsv4.formats.safetensors_header import TensorEntry
from dsv4.formats.store.extents import Sink
from dsv4.formats.store.schema import FileSpec
from dsv4.formats.store.writer import StoreWriter

COMMIT_BYTES = 128 << 20

Finished = Callable[[Unit], None]


@dataclasses.dataclass(frozen=True)
class Part:
    """A source file, the units that become ready in it, and what other files' units read of it."""

    file: str
    units: tuple[Unit, ...]
    watched: tuple[TensorEntry, ...]


class Workshop:
    """Runs parts. Errors of any thread are raised by `run`, once all threads have stopped."""

    def __init__(
        self,
        source: Source,
        writer: StoreWriter,
        budget: Budget,
        fingerprints: Fingerprints,
        finished: Finished,
    ) -> None:
        self._source = source
        self._budget = budget
        self._fingerprints = fingerprints
        self._finished = finished
        self._stop = threading.Event()
        self._room = _Room(budget.flight_bytes, self._stop)
        self._ledger = _Ledger(writer)
        self._tasks: list[Future[None]] = []
        self._committing: Future[None] | None = None
        self._lock = threading.Lock()

    def run(self, parts: Iterable[Part]) -> None:
        """Run every part to its end. Raises what the first failure raised."""
        self._readers = ThreadPoolExecutor(self._budget.streams, "reader")
        self._workers = ThreadPoolExecutor(self._budget.workers, "worker")
        self._keeper = ThreadPoolExecutor(1, "ledger")
        torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a unit's operations are short, and other units keep cores busy
        try:
            passes = [self._readers.submit(self._read, part) for part in parts]
            self._wait(passes)
            self._wait(self._take_tasks())
            self._keeper.submit(self._commit).result()
            self._wait(self._take_tasks())
        except BaseException:
            self._stop.set()
            raise
        finally:
            for pool in (self._readers, self._workers, self._keeper):
                pool.shutdown(wait=True, cancel_futures=True)
            with contextlib.suppress(Dsv4Error):  # after a failure, what is finished is kept
                self._ledger.commit()
            self._ledger.close()
            torch.set_num_threads(torch_threads)

    def _wait(self, futures: Sequence[Future[None]]) -> None:
        """Until all are done or one of them, or of the units meanwhile, has failed."""
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            with self._lock:
                failed = [task for task in self._tasks if task.done()]
                self._tasks = [task for task in self._tasks if not task.done()]
            for task in failed:
                task.result()

    def _take_tasks(self) -> list[Future[None]]:
        with self._lock:
            tasks, self._tasks = self._tasks, []
        return tasks

    def _submit(self, work: Callable[..., None], *arguments: Any) -> None:
        with self._lock:
            self._tasks.append(self._workers.submit(work, *arguments))

    def _read(self, part: Part) -> None:
        """A reader's whole work on one part."""
        known = self._fingerprints
        walk = FilePass(
            self._source, part.file, part.units, part.watched, self._budget.hold_bytes, known
        )
        sha256 = walk.run(self._ready, self._stop.is_set)
        if sha256 is not None:
            watched = [[entry.begin, entry.end, known.passed[entry]] for entry in part.watched]
            self._ledger.note(file_note(part.file), {"sha256": sha256, "watched": watched})

    def _ready(self, unit: Unit, reader: Reader) -> None:
        if is_inline(unit):
            self._run(unit, reader)
            return
        self._room.enter(unit.input_bytes)
        self._submit(self._run_and_leave, unit, reader)

    def _run_and_leave(self, unit: Unit, reader: Reader) -> None:
        try:
            self._run(unit, reader)
        finally:
            self._room.leave(unit.input_bytes)

    def _run(self, unit: Unit, reader: Reader) -> None:
        if self._stop.is_set():
            return
        try:
            result = unit.run(reader, self._ledger.sink)
        except BaseException:
            self._stop.set()
            raise
        if self._ledger.finished(unit.key, result):
            before, self._committing = self._committing, self._keeper.submit(self._commit)
            if before is not None:  # the disk may lag behind by one commit, not more
                before.result()
        self._finished(unit)

    def _commit(self) -> None:
        """On the keeper's thread: what was written becomes durable, covered files become whole."""
        try:
            for file in self._ledger.commit():
                self._submit(self._ledger.complete, file)
        except BaseException:
            self._stop.set()
            raise


class _Room:
    """Bytes that may be in flight between readers and workers."""

    def __init__(self, limit: int, stop: threading.Event) -> None:
        self._limit = limit
        self._stop = stop
        self._used = 0
        self._changed = threading.Condition()

    def enter(self, nbytes: int) -> None:
        """Wait until there is room, or nothing else in flight."""
        with self._changed:
            while self._used and self._used + nbytes > self._limit and not self._stop.is_set():
                self._changed.wait(timeout=0.5)
            self._used += nbytes

    def leave(self, nbytes: int) -> None:
        """Make room."""
        with self._changed:
            self._used -= nbytes
            self._changed.notify_all()


class _Ledger:
    """What was written and is not in the journal yet."""

    def __init__(self, writer: StoreWriter) -> None:
        self._writer = writer
        self._lock = threading.Lock()
        self._notes: dict[str, Any] = {}
        self.sink = Sink(writer.out)

    def finished(self, key: str, result: Result) -> bool:
        """A unit has written all its targets; whether it is time to commit."""
        self.note(key, result)
        return self.sink.unsynced_bytes >= COMMIT_BYTES

    def note(self, key: str, value: Any) -> None:
        """A note for the next commit."""
        with self._lock:
            self._notes[key] = value

    def commit(self) -> list[FileSpec]:
        """Make everything noted so far durable; returns files that are covered now."""
        with self._lock:  # notes first: what they speak of is written already
            notes, self._notes = self._notes, {}
        return self._writer.commit(self.sink.sync(), notes)

    def complete(self, file: FileSpec) -> None:
        """Make a covered file whole."""
        self.sink.release(file)
        self._writer.complete(file)

    def close(self) -> None:
        """Close what is open; what was not committed is done again by the next run."""
        self.sink.close()


def file_note(file: str) -> str:
    """The journal's key of what is known of a source file that has been read to its end."""
    return f"source {file}"


def make_parts(units: Sequence[Unit], files: Iterable[str]) -> list[Part]:
    """Parts for `files`, in their order; a unit belongs to the last file that it reads."""
    order = {file: index for index, file in enumerate(files)}
    by_file: dict[str, list[Unit]] = {file: [] for file in order}
    watched: dict[str, list[TensorEntry]] = {file: [] for file in order}
    for unit in units:
        entries = [entry for tensor in unit.inputs for entry in tensor.entries.values()]
        home = max((entry.file for entry in entries), key=order.__getitem__)
        by_file[home].append(unit)
        for entry in entries:
            if entry.file != home:
                watched[entry.file].append(entry)
    return [Part(file, tuple(by_file[file]), tuple(watched[file])) for file in order]
