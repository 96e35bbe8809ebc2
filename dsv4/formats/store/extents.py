"""Files written in pieces, in any order and from any process: extents, and what makes them whole.

    sink = Sink(root)
    sink.write_at(file, offset, parts)      # into file.partial, not yet on disk for good
    batch = sink.sync()                     # now it is; the journal's owner records the batch
    record = seal(root, file, extents)      # once they cover it: read back, hash, index, sync
    publish(root, file)                     # and rename

A file is hashed when it is whole, by reading it back; each extent's checksum was taken from memory
before it was written, so whatever the disk did in between is noticed.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import xxhash
from torch import Tensor

from dsv4.formats.errors import StoreError
from dsv4.formats.store import digest
from dsv4.formats.store.durable import (
    PIECE_BYTES,
    Directories,
    bytes_of,
    storage_errors,
    sync_directory,
    write_file,
)
from dsv4.formats.store.file_digest import FileDigest
from dsv4.formats.store.manifest import FileRecord
from dsv4.formats.store.specs import PARTIAL_SUFFIX, FileSpec

_OPEN = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """Bytes `[offset, offset + nbytes)` of a file's payload, and their XXH3-64."""

    offset: int
    nbytes: int
    xxh3: int

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.offset + self.nbytes


@dataclasses.dataclass(frozen=True)
class Batch:
    """What a sink made durable: whole files by key, and pieces of files."""

    files: Mapping[str, FileRecord]
    extents: Mapping[FileSpec, Sequence[Extent]]


Durable = Callable[[FileSpec, int, int], bool]
"""Whether bytes `[begin, end)` of a file's payload are on disk for good."""


class Sink:
    """Writes files and pieces of files below `root`; keeps no journal. Threads may share it.

    durable: ranges that `write_at` leaves alone, for a unit that is done again because another of
    its files was lost writes the same bytes.
    """

    def __init__(self, root: Path, durable: Durable = lambda file, begin, end: False) -> None:
        self._root = root
        self._durable = durable
        self._directories = Directories(root)
        self._descriptors: dict[FileSpec, int] = {}
        self._files: dict[str, FileRecord] = {}
        self._extents: dict[FileSpec, list[Extent]] = {}
        self._lock = threading.Lock()
        self.unsynced_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def write(self, file: FileSpec, parts: Iterable[Tensor | bytes]) -> None:
        """Write a whole file, durable on return (see `durable.write_file`)."""
        self._make_directory(file)
        record = write_file(self._root, file, parts)
        with self._lock:
            self._files[file.key] = record

    def write_at(self, file: FileSpec, offset: int, parts: Iterable[Tensor | bytes]) -> None:
        """Write the bytes of `parts` from byte `offset` of the payload on; durable after `sync`.

        Raises StoreError when they reach beyond the file or writing fails, OutOfSpaceError when
        the disk is full.
        """
        for part in parts:
            view = bytes_of(file, part)
            extent = Extent(offset, len(view), xxhash.xxh3_64_intdigest(view))
            if extent.end > file.payload_nbytes:
                raise StoreError(
                    f"{file.key}: {len(view)} bytes at {offset}, beyond its {file.payload_nbytes}"
                )
            if not self._durable(file, offset, extent.end):
                descriptor = self._descriptor(file)
                with storage_errors(self._root, f"writing {file.key}"):
                    _pwrite_all(descriptor, view, offset)
                with self._lock:
                    self._extents.setdefault(file, []).append(extent)
                    self.unsynced_bytes += extent.nbytes
            offset = extent.end

    def sync(self) -> Batch:
        """Put everything written since the last call on disk for good, and say what it was."""
        with self._lock:
            batch = Batch(self._files, self._extents)
            self._files, self._extents, self.unsynced_bytes = {}, {}, 0
        with storage_errors(self._root, "creating directories"):
            self._directories.sync()
        for file in batch.extents:
            with storage_errors(self._root, f"writing {file.key}"):
                os.fdatasync(self._descriptor(file))
        return batch

    def release(self, file: FileSpec) -> None:
        """Nothing more will be written to the file."""
        with self._lock:
            descriptor = self._descriptors.pop(file, None)
        if descriptor is not None:
            os.close(descriptor)

    def close(self) -> None:
        """Close all files; what was not synced is written again by the next run."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _descriptor(self, file: FileSpec) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._make_directory(file)
                with storage_errors(self._root, f"making room for {file.key}"):
                    descriptor = os.open(partial_path(self._root, file), _OPEN | os.O_CREAT, 0o644)
                    try:
                        if _allocate(descriptor, file.nbytes):
                            sync_directory((self._root / file.key).parent)
                    except BaseException:
                        os.close(descriptor)
                        raise
                    self._descriptors[file] = descriptor
            return self._descriptors[file]

    def _make_directory(self, file: FileSpec) -> None:
        with storage_errors(self._root, f"creating the directory of {file.key}"):
            self._directories.ensure(file.key.rpartition("/")[0])


def partial_path(root: Path, file: FileSpec) -> Path:
    """Where a file lies until it is whole."""
    return root / (file.key + PARTIAL_SUFFIX)


def covers(extents: Iterable[Extent], begin: int, end: int) -> bool:
    """Whether every byte of `[begin, end)` lies in an extent."""
    for extent in sorted(extents, key=lambda extent: extent.offset):
        if extent.offset <= begin < extent.end:
            begin = extent.end
    return begin >= end


def seal(root: Path, file: FileSpec, extents: Sequence[Extent]) -> FileRecord:
    """Make a partial file that its extents cover ready to be renamed: checked, indexed, on disk.

    Raises StoreError when what is read back is not what was written, or cannot be read back; the
    partial file is then worth nothing.
    """
    checksums = FileDigest(file.chunk_nbytes)
    with storage_errors(root, f"completing {file.key}"):
        descriptor = os.open(partial_path(root, file), _OPEN)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            for piece in _read_back(descriptor, file, extents):
                checksums.payload(piece)
            if file.sharded:
                index = digest.dense_index(file.chunks, file.chunk_nbytes)
                _pwrite_all(descriptor, memoryview(index), file.payload_nbytes)
                checksums.index(index)
            os.ftruncate(descriptor, file.nbytes)
            os.fsync(descriptor)
            # Nobody reads it again soon: its memory is worth more to the files that follow.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    blake3, xxh3 = checksums.finish()
    return FileRecord(file.nbytes, blake3, file.chunk_nbytes, xxh3)


def publish(root: Path, file: FileSpec) -> None:
    """Give a sealed file its name, for good."""
    target = root / file.key
    with storage_errors(root, f"renaming {file.key}"):
        partial_path(root, file).replace(target)
        sync_directory(target.parent)


def restore_partial(root: Path, key: str, extents: Iterable[Extent]) -> bool:
    """Whether the partial file of `key` is there and long enough to hold its extents.

    A file that was renamed before the journal learned of it gets its partial name back.
    """
    target, partial = root / key, root / (key + PARTIAL_SUFFIX)
    if not partial.exists() and target.exists():
        target.replace(partial)
    try:
        status = partial.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size >= max(e.end for e in extents)


def _read_back(descriptor: int, file: FileSpec, extents: Sequence[Extent]) -> Iterator[memoryview]:
    """The payload in order, in pieces. Raises StoreError unless every extent is what it was."""
    buffer = memoryview(bytearray(PIECE_BYTES))
    position = 0
    for extent in _in_order(extents):
        if extent.offset != position:
            raise StoreError(f"{file.key}: bytes {position} to {extent.offset} were not written")
        checksum = xxhash.xxh3_64()
        while position < extent.end:
            piece = buffer[: min(len(buffer), extent.end - position)]
            count = os.preadv(descriptor, [piece], position)
            if not count:
                raise StoreError(f"{file.key} is shorter than what was written to it")
            checksum.update(piece[:count])
            yield piece[:count]
            position += count
        if checksum.intdigest() != extent.xxh3:
            raise StoreError(
                f"{file.key}: bytes {extent.offset} to {extent.end} are not what was written; the "
                "disk or another program changed them: run the same command again"
            )
    if position != file.payload_nbytes:
        raise StoreError(f"{file.key}: {position} of {file.payload_nbytes} bytes were written")


def _in_order(extents: Sequence[Extent]) -> list[Extent]:
    """Sorted; an extent that was written again replaces the earlier one."""
    latest = {extent.offset: extent for extent in extents}
    return [latest[offset] for offset in sorted(latest)]


def _allocate(descriptor: int, nbytes: int) -> bool:
    """Reserve a new file's blocks, so that a full disk is met at once; whether it was new."""
    if os.fstat(descriptor).st_size >= nbytes:
        return False
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in _NO_FALLOCATE:
            raise
        os.ftruncate(descriptor, nbytes)
    return True


def _pwrite_all(descriptor: int, view: memoryview, offset: int) -> None:
    while len(view):
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
