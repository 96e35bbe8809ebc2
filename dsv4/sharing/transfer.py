"""The threads of a pull: readers of ranges, and the main thread, which makes their work durable.

A reader compares every chunk with the manifest before it writes it. The main thread syncs, journals
and completes files meanwhile. Readers are threads that a process does not wait for at its end: one
that hangs in a network read holds up neither a failure nor Ctrl-C.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

import torch
import xxhash

from dsv4.convert.sources.base import ByteStream, bytes_of
from dsv4.formats.errors import ChangedSourceError, Dsv4Error, SourceError
from dsv4.formats.store.digest import Digests
from dsv4.formats.store.extents import Sink
from dsv4.formats.store.specs import FileSpec
from dsv4.formats.store.writer import StoreWriter
from dsv4.sharing.published import PublishedStore

STREAMS = 8
PIECE_BYTES = 8 << 20
SEGMENT_BYTES = 256 << 20  # of a file, by one reader: as much as one request brings
COMMIT_BYTES = 64 << 20
COMMIT_SEGMENTS = 256  # of small files, each of which is open until it is committed
LOOK_SECONDS = 0.2
PARTING_SECONDS = 1.0  # for readers to notice that it is over


@dataclasses.dataclass(frozen=True)
class Moved:
    """How many of the bytes that are to be there are, and of these, from an earlier run."""

    file: str
    done_bytes: int
    total_bytes: int
    resumed_bytes: int


@dataclasses.dataclass(frozen=True)
class Segment:
    """Bytes `[begin, end)` of a file's payload, to be fetched by one reader."""

    file: FileSpec
    begin: int
    end: int


class _StoppedError(Exception):
    """A reader ends because the transfer is over; nobody gets to see it."""


class Transfer:
    """Fetches what a writer does not have. fetched: bytes that came over the network."""

    def __init__(
        self,
        published: PublishedStore,
        writer: StoreWriter,
        progress: Callable[[Moved], None] | None,
    ) -> None:
        self._published = published
        self._writer = writer
        self._progress = progress
        self._sink = Sink(writer.out)
        self._stop = threading.Event()
        self._left: queue.SimpleQueue[Segment] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._readers: list[threading.Thread] = []
        self._counting = threading.Lock()
        self._total = self._resumed = self.fetched = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        if error is not None:
            self._published.give_up()
            deadline = time.monotonic() + PARTING_SECONDS
            for reader in self._readers:
                reader.join(max(deadline - time.monotonic(), 0))
            with contextlib.suppress(Dsv4Error):  # after a failure
                self._commit()
        if isinstance(error, ChangedSourceError):
            self._writer.forget(self._published.store.files_under(error.file))
        if not any(reader.is_alive() for reader in self._readers):
            self._sink.close()

    def run(self, files: Sequence[FileSpec], streams: int) -> None:
        """Fetch every gap of `files`. Raises what the first failure raised."""
        segments = [
            part for file in files for gap in self._writer.gaps(file) for part in cut(file, *gap)
        ]
        self._total = sum(file.payload_nbytes for file in files)
        self._resumed = self._total - sum(part.end - part.begin for part in segments)
        for segment in segments:
            self._left.put(segment)
        for number in range(min(streams, len(segments))):
            reader = threading.Thread(target=self._read, name=f"pull-{number}", daemon=True)
            self._readers.append(reader)
            reader.start()
        ended = committed = 0
        while ended < len(segments):
            with contextlib.suppress(queue.Empty):
                failure = self._ended.get(timeout=LOOK_SECONDS)
                if failure is not None:
                    raise failure
                ended += 1
            full = self._sink.unsynced_bytes >= COMMIT_BYTES
            if full or ended - committed >= COMMIT_SEGMENTS:
                self._commit()
                committed = ended
        self._commit()

    def _commit(self) -> None:
        """What was written becomes durable, covered files become whole."""
        for file in self._writer.commit(self._sink.sync()):
            self._sink.release(file)
            self._writer.complete(file, self._published.store.records[file.key])

    def _read(self) -> None:
        """A reader's whole life."""
        with contextlib.suppress(queue.Empty, _StoppedError):
            while True:
                segment = self._left.get_nowait()
                try:
                    self._fetch(segment)
                except _StoppedError:
                    raise
                except BaseException as error:
                    self._ended.put(error)
                    return
                self._ended.put(None)

    def _fetch(self, segment: Segment) -> None:
        file = segment.file
        digests = self._published.store.chunk_digests(file.key)
        proof = _Proof(self._published, file, digests)
        buffer = torch.empty(min(PIECE_BYTES, segment.end - segment.begin), dtype=torch.uint8)
        with self._published.stream(file.key, segment.begin, segment.end) as stream:
            for begin, end in pieces(segment):
                part = buffer[: end - begin]
                self._check()
                proof.read(stream, begin, bytes_of(part))
                self._check()
                self._sink.write_at(file, begin, [part])
                self._count(file.key, end - begin)

    def _check(self) -> None:
        if self._stop.is_set():
            raise _StoppedError

    def _count(self, key: str, nbytes: int) -> None:
        with self._counting:
            self.fetched += nbytes
            if self._progress is not None:
                done = self._resumed + self.fetched
                self._progress(Moved(key, done, self._total, self._resumed))


class _Proof:
    """Compares what arrives of one file, in order, with the manifest's checksums.

    Whole chunks that do not match are asked for once more. A chunk longer than a piece is compared
    at its end; where its beginning came with an earlier run, the file's BLAKE3 is left to tell.
    """

    def __init__(self, published: PublishedStore, file: FileSpec, digests: Digests) -> None:
        self._published = published
        self._file = file
        self._digests = digests
        self._long: xxhash.xxh3_64 | None = None

    def read(self, stream: ByteStream, begin: int, view: memoryview) -> None:
        """Fill `view` from the stream, which is at `begin`. Raises SourceError."""
        stream.readinto(view)
        if self._file.chunk_nbytes > PIECE_BYTES:
            self._follow(begin, view)
        elif self._wrong(begin, view) is not None:
            self._published.read_into(self._file.key, begin, view)
            if (chunk := self._wrong(begin, view)) is not None:
                raise SourceError(f"{self._sentence(chunk)}, twice; {AGAIN}")

    def _wrong(self, begin: int, view: memoryview) -> int | None:
        """The first of the chunks in `view` that does not match."""
        nbytes = self._file.chunk_nbytes
        for at in range(-begin % nbytes, len(view) - nbytes + 1, nbytes):
            chunk = (begin + at) // nbytes
            if xxhash.xxh3_64_intdigest(view[at : at + nbytes]) != int(self._digests[chunk]):
                return chunk
        return None

    def _follow(self, begin: int, view: memoryview) -> None:
        """Piece by piece through a long chunk. Raises ChangedSourceError at its end."""
        chunk, within = divmod(begin, self._file.chunk_nbytes)
        if within == 0:
            self._long = xxhash.xxh3_64()
        if self._long is None:
            return
        self._long.update(view)
        if within + len(view) == self._file.chunk_nbytes:
            if self._long.intdigest() != int(self._digests[chunk]):
                raise ChangedSourceError(self._file.key, f"{self._sentence(chunk)}; {AGAIN}")
            self._long = None

    def _sentence(self, chunk: int) -> str:
        return (
            f"{self._published.repo}/{self._file.key}: chunk {chunk} arrived with another checksum "
            "than the manifest has"
        )


AGAIN = "run the command again, and tell the repository's owner if that does not help"


def cut(file: FileSpec, begin: int, end: int) -> Iterator[Segment]:
    """A gap as segments of whole chunks, but for its ends."""
    step = max(SEGMENT_BYTES // file.chunk_nbytes, 1) * file.chunk_nbytes
    inner = range((begin // step + 1) * step, end, step)
    for one, other in itertools.pairwise([begin, *inner, end]):
        yield Segment(file, one, other)


def pieces(segment: Segment) -> Iterator[tuple[int, int]]:
    """Whole chunks, as many as a piece holds; or pieces of one chunk that is longer."""
    chunk, begin = segment.file.chunk_nbytes, segment.begin
    step = max(PIECE_BYTES // chunk, 1) * chunk
    while begin < segment.end:
        if chunk <= PIECE_BYTES:
            end = (begin // step + 1) * step
        else:
            within = begin % chunk
            end = begin - within + min(chunk, (within // PIECE_BYTES + 1) * PIECE_BYTES)
        yield begin, min(end, segment.end)
        begin = end
