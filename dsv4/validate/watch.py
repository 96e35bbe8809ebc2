"""A long pass over a store, watched: how far its threads are, and whether they are to stop.

Ctrl-C reaches the main thread alone. It sets a flag that every other thread looks at before its
next piece of a file, so that a pass ends within a piece, not within a file of gigabytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dsv4.convert.sources.base import ByteStream, Source


@dataclasses.dataclass(frozen=True)
class Step:
    """What is being done, and how many of the bytes that are to be read have been."""

    what: str
    done_bytes: int
    total_bytes: int


Progress = Callable[[Step], None]


class StoppedError(Exception):
    """A thread ends because the pass was given up; nobody gets to see it."""


class Watch:
    """Counts what all threads read, tells `progress`, and makes them stop. Thread-safe."""

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._done = self._total = 0
        self._stopped = threading.Event()
        self._at_stop: list[Callable[[], None]] = []

    def expect(self, nbytes: int) -> None:
        """So many bytes more are to be read."""
        with self._lock:
            self._total += nbytes

    def read(self, what: str, nbytes: int) -> None:
        """So many bytes more were read. Raises StoppedError after `stop`."""
        self.check()
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(Step(what, self._done, self._total))

    def check(self) -> None:
        """Raises StoppedError after `stop`."""
        if self._stopped.is_set():
            raise StoppedError

    def at_stop(self, action: Callable[[], None]) -> None:
        """What else makes threads end, such as `Source.give_up`."""
        self._at_stop.append(action)

    def stop(self) -> None:
        """Make every thread end before its next piece. Safe to call twice."""
        self._stopped.set()
        for action in self._at_stop:
            action()

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Whatever leaves the block by an exception stops every thread."""
        try:
            yield
        except BaseException:
            self.stop()
            raise


class WatchedSource(Source):
    """A source whose reads end when the pass does."""

    def __init__(self, source: Source, watch: Watch) -> None:
        self._source, self._watch = source, watch
        self.config, self.entries, self.sizes = source.config, source.entries, source.sizes
        self.commit, self.notices = source.commit, source.notices
        self.origin = source.origin
        watch.at_stop(source.give_up)

    def read_into(self, file: str, position: int, view: memoryview, what: str) -> None:
        """As the source's. Raises StoppedError when the pass was given up."""
        self._watch.check()
        self._source.read_into(file, position, view, what)

    @contextlib.contextmanager
    def stream(self, file: str) -> Iterator[ByteStream]:
        """The source's."""
        with self._source.stream(file) as stream:
            yield _WatchedStream(stream, self._watch, "hashing the source")

    def aux_files(self) -> Mapping[str, bytes]:
        """The source's."""
        return self._source.aux_files()

    def fingerprint(self) -> str:
        """The source's."""
        return self._source.fingerprint()

    def description(self, sha256: Mapping[str, str]) -> dict[str, Any]:
        """The source's."""
        return self._source.description(sha256)

    def published_sha256(self, file: str) -> str | None:
        """The source's."""
        return self._source.published_sha256(file)

    def remote_bytes(self, file: str) -> int:
        """The source's."""
        return self._source.remote_bytes(file)

    def give_up(self) -> None:
        """The source's."""
        self._source.give_up()


class _WatchedStream:
    def __init__(self, stream: ByteStream, watch: Watch, what: str) -> None:
        self._stream, self._watch, self._what = stream, watch, what

    def readinto(self, view: memoryview) -> None:
        """As the stream's. Raises StoppedError when the pass was given up."""
        self._stream.readinto(view)
        self._watch.read(self._what, len(view))
