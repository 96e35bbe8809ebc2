"""One regular file of this machine: read by position, and checked to be the one that was listed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from dsv4.formats.errors import SourceError


class LocalStream:
    """A position in an open file."""

    def __init__(self, descriptor: int, file: str) -> None:
        self.position = 0
        self._descriptor = descriptor
        self._file = file

    def expect_all(self) -> None:
        """Tell the kernel that the whole file will be read in order."""
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def readinto(self, view: memoryview, what: str = "it") -> None:
        """Fill `view` from the position on. Raises SourceError, naming `what`."""
        while view:
            try:
                count = os.preadv(self._descriptor, [view], self.position)
            except OSError as error:
                raise SourceError(f"{self._file}: {what} cannot be read: {error}") from error
            if not count:
                raise SourceError(f"{self._file} ended while {what} was read")
            view, self.position = view[count:], self.position + count


@contextlib.contextmanager
def open_local(path: Path, size: int, file: str) -> Iterator[LocalStream]:
    """The file at `path`, from its start. Raises SourceError unless it still has `size` bytes.

    file: how errors name it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror}") from error
    try:
        if (found := os.fstat(descriptor).st_size) != size:
            raise SourceError(
                f"{file} is {found} bytes long, but was {size} when it was opened; "
                "do not change a checkpoint while it is read"
            )
        yield LocalStream(descriptor, file)
    finally:
        os.close(descriptor)


def read_small(path: Path, limit: int) -> bytes:
    """A whole document. Raises SourceError when it is larger than `limit` bytes."""
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from None
    _refuse_larger(path, len(raw), limit)
    return raw


def check_size(path: Path, limit: int) -> None:
    """Raise SourceError when the file is larger than `limit` bytes, without reading it."""
    _refuse_larger(path, path.stat().st_size, limit)


def _refuse_larger(path: Path, size: int, limit: int) -> None:
    if size > limit:
        raise SourceError(f"{path} is larger than {limit} bytes, which no real one is")
