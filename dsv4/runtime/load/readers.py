"""The readers: threads that take jobs, fill slots, check what they read, and start the copies.

Each thread has slots of its own and uses them in turn, so nothing is handed over and nothing is
locked but the list of jobs. What takes time (`preadv`, XXH3 of a chunk, waiting for a copy) happens
outside the interpreter's lock.

A chunk is hashed right after it was read, while it is in the core's cache, and a job is copied only
when all of its chunks were right. Of a chunk larger than a slot the first pieces are on the device
before the last is known; nobody gets to see the arena unless every job ended well.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import xxhash

from dsv4.formats.errors import StoreError
from dsv4.formats.store import integrity
from dsv4.formats.store.digest import Digests
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.schema import FileSpec
from dsv4.runtime.load.arena import Arena, Slot
from dsv4.runtime.load.files import OpenFile
from dsv4.runtime.load.jobs import Job
from dsv4.runtime.load.plan import Span

HOT_BYTES = 1 << 20  # read at once when it is hashed next: stays in a core's own cache


@dataclasses.dataclass
class Spent:
    """Seconds of all readers together, and bytes by the way they came."""

    read: float = 0.0
    verify: float = 0.0
    wait: float = 0.0  # for a slot whose copy is under way
    plain_bytes: int = 0
    direct_bytes: int = 0
    verified_bytes: int = 0
    chunks: int = 0

    def add(self, other: Spent) -> None:
        """Sum up."""
        for field in dataclasses.fields(self):
            name = field.name
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Readers:
    """Runs jobs of one store into one arena. spent: what it took, once `run` returned."""

    def __init__(
        self,
        store: PackedStore,
        arena: Arena,
        *,
        verify: bool,
        direct: bool,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._store, self._arena = store, arena
        self._verify, self._direct = verify, direct
        self._progress = progress
        self._digests: dict[str, Digests] = {}
        self._directories: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._done = 0
        self.spent = Spent()

    def run(self, jobs: Sequence[Job], rings: Sequence[Sequence[Slot]]) -> None:
        """Do all jobs with a thread for each ring of slots. Raises what a reader raised first.

        When it raises, or is interrupted, no thread is left and no copy is under way.
        """
        left = iter(jobs)  # `next` of an iterator over a list is atomic
        threads = [
            threading.Thread(target=self._work, args=(left, ring), name=f"dsv4-load-{n}")
            for n, ring in enumerate(rings)
        ]
        started: list[threading.Thread] = []
        try:
            for thread in threads:
                thread.start()
                started.append(thread)
            for thread in threads:
                thread.join()
        finally:
            self._stop.set()
            for thread in started:
                thread.join()
            self._arena.settle()
        if self._failure is not None:
            raise self._failure

    def _work(self, left: Iterator[Job], ring: Sequence[Slot]) -> None:
        reader = _Reader(self, ring)
        try:
            with self._arena.thread():
                for job in left:
                    if self._stop.is_set():
                        break
                    reader.do(job)
                    if self._progress is not None:
                        with self._lock:
                            self._done += job.nbytes
                            self._progress(self._done)
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            self._stop.set()
        finally:
            with self._lock:
                self.spent.add(reader.spent)

    def digests(self, file: FileSpec) -> Digests:
        """The checksums of its chunks."""
        found = self._digests.get(file.key)
        if found is None:
            found = self._digests[file.key] = self._store.chunk_digests(file.key)
        return found

    def open(self, file: FileSpec) -> OpenFile:
        """The file, unless a directory on its way is a symbolic link."""
        directory = file.key.rpartition("/")[0]
        if link := integrity.symbolic_link(self._store.root, directory, self._directories):
            raise StoreError(f"{self._store.root}: {link} is a symbolic link, expected a directory")
        return OpenFile(self._store.root, file, direct=self._direct)

    @property
    def arena(self) -> Arena:
        """Where bytes go."""
        return self._arena

    @property
    def verify(self) -> bool:
        """Whether chunks are hashed."""
        return self._verify

    def damaged(self, file: FileSpec, chunk: int) -> StoreError:
        """What to say of a chunk that is not what was written."""
        size = file.chunk_nbytes
        return StoreError(
            f"{self._store.root}: {file.key}: chunk {chunk} (bytes {chunk * size} to "
            f"{(chunk + 1) * size}) does not match its checksum; `dsv4 repair` mends it"
        )


class _Reader:
    """What one thread has: its slots, and what it spent."""

    def __init__(self, readers: Readers, ring: Sequence[Slot]) -> None:
        self._readers, self._arena = readers, readers.arena
        self._slots = itertools.cycle(ring)
        self._room = len(ring[0].memory)
        self.spent = Spent()

    def do(self, job: Job) -> None:
        """One job. Raises StoreError."""
        if job.nbytes > self._room:
            self._large(job.spans[0])
            return
        slot = self._next()
        for span in job.spans:
            with self._readers.open(span.file) as file:
                file.choose(span.begin, span.nbytes)
                place = span.at - job.at
                self._fill(file, span, slot.memory[place : place + span.nbytes])
                self._count(file)
        self._arena.copy(slot, job.nbytes, job.at)

    def _next(self) -> Slot:
        begin = time.perf_counter()
        slot = next(self._slots)
        self._arena.reuse(slot)
        self.spent.wait += time.perf_counter() - begin
        return slot

    def _fill(self, file: OpenFile, span: Span, memory: memoryview) -> None:
        """Read a span of whole chunks, and check each."""
        if not self._readers.verify:
            self._read(file, span.begin, memory)
            return
        size = span.file.chunk_nbytes
        step = max(HOT_BYTES // size, 1) * size
        digests = self._readers.digests(span.file)
        for begin in range(0, len(memory), step):
            piece = memory[begin : begin + step]
            self._read(file, span.begin + begin, piece)
            start = time.perf_counter()
            first = (span.begin + begin) // size
            for index in range(len(piece) // size):
                chunk = piece[index * size : (index + 1) * size]
                if xxhash.xxh3_64_intdigest(chunk) != int(digests[first + index]):
                    raise self._readers.damaged(span.file, first + index)
            self._verified(start, len(piece), len(piece) // size)

    def _large(self, span: Span) -> None:
        """One chunk that is larger than a slot, in pieces."""
        verify = self._readers.verify
        checksum = xxhash.xxh3_64()
        step = HOT_BYTES if verify else self._room
        with self._readers.open(span.file) as file:
            file.choose(span.begin, span.nbytes)
            for begin in range(0, span.nbytes, self._room):
                slot = self._next()
                whole = slot.memory[: min(self._room, span.nbytes - begin)]
                for hot in range(0, len(whole), step):
                    piece = whole[hot : hot + step]
                    self._read(file, span.begin + begin + hot, piece)
                    if verify:
                        start = time.perf_counter()
                        checksum.update(piece)
                        self._verified(start, len(piece), 0)
                self._arena.copy(slot, len(whole), span.at + begin)
            self._count(file)
        chunk = span.begin // span.file.chunk_nbytes
        if verify and checksum.intdigest() != int(self._readers.digests(span.file)[chunk]):
            raise self._readers.damaged(span.file, chunk)
        self.spent.chunks += int(verify)

    def _read(self, file: OpenFile, begin: int, memory: memoryview) -> None:
        start = time.perf_counter()
        file.read(begin, memory)
        self.spent.read += time.perf_counter() - start

    def _verified(self, start: float, nbytes: int, chunks: int) -> None:
        self.spent.verify += time.perf_counter() - start
        self.spent.verified_bytes += nbytes
        self.spent.chunks += chunks

    def _count(self, file: OpenFile) -> None:
        self.spent.plain_bytes += file.plain_bytes
        self.spent.direct_bytes += file.direct_bytes
