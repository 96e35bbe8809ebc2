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
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

from dsv4.convert.memory import Budget
from dsv4.convert.outputs.base import Unit
from dsv4.convert.outputs.results import Result
from dsv4.convert.sources.base import Source
from dsv4.convert.sources.hashing_reader import (
    Evidence,
    FilePass,
    Fingerprints,
    RangeReads,
    Schedule,
    entries_of,
    is_inline,
)
from dsv4.formats.errors import Dsv4Error, SourceError
from dsv4.formats.model.safetensors_header import TensorEntry
from dsv4.formats.store.extents import Batch, Sink
from dsv4.formats.store.specs import FileSpec
from dsv4.formats.threads import one_torch_thread

COMMIT_BYTES = 128 << 20

Finished = Callable[[Unit, Result], None]


@dataclasses.dataclass(frozen=True)
class Part:
    """A source file, the units that become ready in it, and what other files' units read of it."""

    file: str
    units: tuple[Unit, ...]
    watched: tuple[TensorEntry, ...]


class Keeper(Protocol):
    """Keeps what units have written; the store's writer is one."""

    out: Path

    def commit(self, batch: Batch, notes: Mapping[str, Any]) -> list[FileSpec]:
        """Record what is durable, with notes; -> files to `complete`, since they are covered."""

    def complete(self, file: FileSpec) -> None:
        """Make a covered file whole."""

    def covers(self, file: FileSpec, begin: int, end: int) -> bool:
        """Whether bytes `[begin, end)` of the payload are durable."""


class Workshop:
    """Runs parts. Errors of any thread are raised by `run`, once all threads have stopped."""

    def __init__(
        self,
        source: Source,
        keeper: Keeper,
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
        self._ledger = _Ledger(keeper)
        self._tasks: list[Future[None]] = []
        self._committing: Future[None] | None = None
        self._lock = threading.Lock()

    def run(self, parts: Iterable[Part]) -> None:
        """Run every part to its end. Raises what the first failure raised."""
        self._readers = ThreadPoolExecutor(self._budget.streams, "reader")
        self._workers = ThreadPoolExecutor(self._budget.workers, "worker")
        self._committer = ThreadPoolExecutor(1, "ledger")
        with one_torch_thread():  # a unit is short work, and other units keep the cores busy
            self._run_parts(parts)

    def _run_parts(self, parts: Iterable[Part]) -> None:
        try:
            passes = [self._readers.submit(self._read, part) for part in parts]
            self._wait(passes)
            self._wait(self._take_tasks())
            self._committer.submit(self._commit).result()
            self._wait(self._take_tasks())
        except BaseException as error:
            self._stop.set()
            self._source.give_up()
            # After a failure to read, what has been read well is still worth finishing.
            self._close(cancel=not isinstance(error, SourceError))
            raise
        else:
            self._close(cancel=False)

    def _close(self, *, cancel: bool) -> None:
        """Finish, or `cancel`, what is in flight; keep what is finished."""
        for pool in (self._readers, self._workers, self._committer):
            pool.shutdown(wait=True, cancel_futures=cancel)
        with contextlib.suppress(Dsv4Error):  # after a failure
            self._ledger.commit()
        self._ledger.close()

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
        schedule = Schedule(part.file, part.units, part.watched, self._budget.hold_bytes)
        walk = FilePass(self._source, part.file, schedule, known)
        sha256 = walk.run(self._ready, self._stop.is_set)
        if sha256 is not None:
            watched = [[entry.begin, entry.end, known.passed[entry]] for entry in part.watched]
            self._ledger.note(file_note(part.file), {"sha256": sha256, "watched": watched})

    def _ready(self, unit: Unit, reader: RangeReads) -> None:
        if is_inline(unit):
            self._run(unit, reader)
            return
        self._room.enter(unit.input_bytes)
        self._submit(self._run_and_leave, unit, reader)

    def _run_and_leave(self, unit: Unit, reader: RangeReads) -> None:
        try:
            self._run(unit, reader)
        finally:
            self._room.leave(unit.input_bytes)

    def _run(self, unit: Unit, reader: RangeReads) -> None:
        result = unit.run(reader, self._ledger.sink)
        if self._ledger.finished(unit.key, result, reader.evidence()):
            before, self._committing = self._committing, self._committer.submit(self._commit)
            if before is not None:  # the disk may lag behind by one commit, not more
                before.result()
        self._finished(unit, result)

    def _commit(self) -> None:
        """On one thread: what was written becomes durable, covered files become whole."""
        for file in self._ledger.commit():
            self._submit(self._ledger.complete, file)


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

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._lock = threading.Lock()
        self._notes: dict[str, Any] = {}
        self._failure: BaseException | None = None
        self.sink = Sink(keeper.out, keeper.covers)

    def finished(self, key: str, result: Result, read: Evidence) -> bool:
        """A unit has written all its targets; whether it is time to commit."""
        self.note(key, {"result": result.to_json(), "read": read})
        return self.sink.unsynced_bytes >= COMMIT_BYTES

    def note(self, key: str, value: Any) -> None:
        """A note for the next commit."""
        with self._lock:
            self._notes[key] = value

    def commit(self) -> list[FileSpec]:
        """Make everything noted so far durable; returns files that are covered now.

        Fails for good: after a failed sync nobody knows what of the unsynced bytes the disk has.
        """
        if self._failure is not None:
            raise self._failure
        with self._lock:  # notes first: what they speak of is written already
            notes, self._notes = self._notes, {}
        try:
            return self._keeper.commit(self.sink.sync(), notes)
        except BaseException as error:
            self._failure = error
            raise

    def complete(self, file: FileSpec) -> None:
        """Make a covered file whole."""
        self.sink.release(file)
        self._keeper.complete(file)

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
        entries = entries_of(unit)
        home = max((entry.file for entry in entries), key=order.__getitem__)
        by_file[home].append(unit)
        for entry in entries:
            if entry.file != home:
                watched[entry.file].append(entry)
    return [Part(file, tuple(by_file[file]), tuple(watched[file])) for file in order]
