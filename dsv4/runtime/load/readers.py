"""The readers: threads that take jobs, fill slots, and start the copies.

Each thread has slots of its own and uses them in turn, so nothing is handed over. What takes time
(`preadv`, XXH3 of a chunk, waiting for a copy) happens outside the interpreter's lock, and there is
little else: with 16 threads at 50 GB/s every turn for that lock counts.

Chunks are hashed on the device (see `check`), or here, where a job is copied only when all of its
chunks were right. Nobody gets to see the arena unless every job ended well and every chunk was
right.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import xxhash

from dsv4.formats.store.digest import Digests
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import FileSpec
from dsv4.runtime.load.arena import Arena, Slot
from dsv4.runtime.load.check import DeviceCheck, damaged
from dsv4.runtime.load.files import FileTable
from dsv4.runtime.load.jobs import Job
from dsv4.runtime.load.plan import Span


@dataclasses.dataclass
class Spent:
    """Seconds of all readers together, and bytes by the way they came."""

    read: float = 0.0
    verify: float = 0.0
    copy: float = 0.0  # starting copies, and waiting for slots whose copy is under way
    bytes: int = 0
    direct_bytes: int = 0  # of them, past the page cache
    verified_bytes: int = 0
    chunks: int = 0

    def add(self, other: Spent) -> None:
        """Sum up."""
        for field in dataclasses.fields(self):
            name = field.name
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Readers:
    """Runs jobs of one store into one arena. spent: what it took, once `run` returned.

    hashes: whether the readers hash the chunks of a file. check: who hashes those of the others.
    """

    def __init__(
        self,
        store: PackedStore,
        arena: Arena,
        *,
        hashes: Callable[[FileSpec], bool],
        check: DeviceCheck | None = None,
        direct: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.arena, self.hashes, self.check = arena, hashes, check
        self._store, self._direct, self._progress = store, direct, progress
        self._digests: dict[str, Digests] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._done = 0
        self.spent = Spent()

    def run(self, jobs: Sequence[Job], rings: Sequence[Sequence[Slot]]) -> None:
        """Do all jobs with a thread for each ring of slots. Raises what a reader raised first.

        When it raises, or is interrupted, no thread is left and no copy is under way.
        """
        self.files = FileTable(
            self._store.root,
            (span.file for job in jobs for span in job.spans),
            direct=self._direct,
        )
        left = iter(jobs)  # `next` of an iterator over a list is atomic
        threads: list[tuple[threading.Thread, threading.Event]] = []
        try:
            for number, ring in enumerate(rings):
                ended = threading.Event()
                thread = threading.Thread(
                    target=self._work, args=(left, ring, ended), name=f"dsv4-load-{number}"
                )
                threads.append((thread, ended))
                thread.start()
            # Not `join`: interrupted, it takes the thread for ended (Python 3.11 and 3.12).
            for _, ended in threads:
                ended.wait()
        finally:
            self._stop.set()
            for thread, ended in threads:
                if thread.ident is not None:  # else it sees the stop before it does anything
                    ended.wait()
                    thread.join()
            self.files.close()
            self.arena.settle()
        if self._failure is not None:
            raise self._failure

    def _work(self, left: Iterator[Job], ring: Sequence[Slot], ended: threading.Event) -> None:
        reader = _Reader(self, ring)
        try:
            self.arena.enter()
            for job in left:
                if self._stop.is_set():
                    break
                reader.do(job)
                if self._progress is not None:
                    self._tell(job.nbytes, self._progress)
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            self._stop.set()
        finally:
            with self._lock:
                self.spent.add(reader.spent)
            ended.set()

    def _tell(self, nbytes: int, progress: Callable[[int], None]) -> None:
        with self._lock:
            self._done += nbytes
            progress(self._done)

    def verify(self, file: FileSpec, chunk: int, digest: int) -> None:
        """Compare a chunk's XXH3-64. Raises StoreError."""
        found = self._digests.get(file.key)
        if found is None:
            found = self._digests[file.key] = self._store.chunk_digests(file.key)
        if digest != int(found[chunk]):
            raise damaged(self._store, file, chunk)


class _Reader:
    """What one thread has: its slots, and what it spent."""

    def __init__(self, readers: Readers, ring: Sequence[Slot]) -> None:
        self._readers, self._arena, self._check = readers, readers.arena, readers.check
        self._slots = itertools.cycle(ring)
        self._room = len(ring[0].memory)
        self.spent = Spent()

    def do(self, job: Job) -> None:
        """One job. Raises StoreError."""
        files = self._readers.files
        if job.nbytes > self._room:
            self._large(job.spans[0])
        else:
            slot = self._next()
            whole = self._arena.target(slot, job.nbytes, job.at)
            for span in job.spans:
                place = span.at - job.at
                memory = whole[place : place + span.nbytes]
                self._read(span.file, span.begin, memory)
                if self._readers.hashes(span.file):
                    self._hash(span, memory)
            self._copy(slot, job.nbytes, job.at)
        if self._check is not None:
            self._check.copied(job)
        for span in job.spans:
            files.release(span.file)

    def _next(self) -> Slot:
        begin = time.perf_counter()
        slot = next(self._slots)
        self._arena.reuse(slot)
        self.spent.copy += time.perf_counter() - begin
        return slot

    def _copy(self, slot: Slot, nbytes: int, at: int) -> None:
        begin = time.perf_counter()
        self._arena.copy(slot, nbytes, at)
        self.spent.copy += time.perf_counter() - begin

    def _read(self, file: FileSpec, begin: int, memory: memoryview) -> None:
        start = time.perf_counter()
        self.spent.direct_bytes += self._readers.files.get(file).read(begin, memory)
        self.spent.read += time.perf_counter() - start
        self.spent.bytes += len(memory)

    def _hash(self, span: Span, memory: memoryview) -> None:
        """Check the whole chunks of a span."""
        start = time.perf_counter()
        size = span.file.chunk_nbytes
        first = span.begin // size
        for index in range(len(memory) // size):
            chunk = memory[index * size : (index + 1) * size]
            self._readers.verify(span.file, first + index, xxhash.xxh3_64_intdigest(chunk))
        self._verified(start, len(memory), len(memory) // size)

    def _large(self, span: Span) -> None:
        """One chunk that is larger than a slot, in pieces."""
        hashes = self._readers.hashes(span.file)
        checksum = xxhash.xxh3_64()
        for begin in range(0, span.nbytes, self._room):
            slot = self._next()
            count = min(self._room, span.nbytes - begin)
            memory = self._arena.target(slot, count, span.at + begin)
            self._read(span.file, span.begin + begin, memory)
            if hashes:
                start = time.perf_counter()
                checksum.update(memory)
                self._verified(start, len(memory), 0)
            self._copy(slot, len(memory), span.at + begin)
        if hashes:
            chunk = span.begin // span.file.chunk_nbytes
            self._readers.verify(span.file, chunk, checksum.intdigest())
            self.spent.chunks += 1

    def _verified(self, start: float, nbytes: int, chunks: int) -> None:
        self.spent.verify += time.perf_counter() - start
        self.spent.verified_bytes += nbytes
        self.spent.chunks += chunks
