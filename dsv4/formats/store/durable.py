"""Writing that survives: temporary name, fsync, rename, fsync of the directory, lock, and errors.

Every operating system error becomes a Dsv4Error here; running out of space says how to go on.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from dsv4.formats.errors import ConflictError, OutOfSpaceError, StoreError
from dsv4.formats.store import digest
from dsv4.formats.store.file_digest import FileDigest
from dsv4.formats.store.manifest import FileRecord
from dsv4.formats.store.specs import LOCK, PARTIAL_SUFFIX, FileSpec

PIECE_BYTES = 8 << 20  # written and hashed at a time, while it is in cache
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def storage_errors(root: Path, action: str) -> Iterator[None]:
    """Turn an OSError inside into OutOfSpaceError (disk full, quota) or StoreError."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise OutOfSpaceError(
                f"{root}: the disk is full ({action}); finished files are kept: free some space "
                "and run the same command again to continue"
            ) from error
        why = error.strerror or str(error)
        if error.errno in _NOT_ALLOWED:
            raise StoreError(
                f"{root}: {action} failed: {why}; give yourself the permission to write there, or "
                "choose another directory"
            ) from error
        if error.errno == errno.EFBIG:
            raise StoreError(
                f"{root}: {action} failed: {why}; finished files are kept: lift the limit on the "
                "size of a file (`ulimit -f`), or choose a directory on a file system without one"
            ) from error
        raise StoreError(
            f"{root}: {action} failed: {why}; finished files are kept, run the same command again "
            "to continue"
        ) from error


def create_directory(root: Path) -> None:
    """Make `root` and its parents exist. Raises StoreError saying why it cannot be a directory."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        what = "a link to nothing" if root.is_symlink() else "not a directory"
        raise StoreError(f"{root} is {what}; choose another place") from error
    except OSError as error:
        kind = OutOfSpaceError if error.errno in _NO_SPACE else StoreError
        raise kind(
            f"{root} cannot be created: {error.strerror or error}; choose another place"
        ) from error


class DirectoryLock:
    """Exclusive lock on a directory, held from construction to `release` or process end."""

    def __init__(self, root: Path) -> None:
        """Raises ConflictError when another holder has it."""
        self._path = root / LOCK
        with storage_errors(root, "locking the directory"):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._descriptor: int | None = os.open(self._path, flags, 0o644)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.release()
                raise ConflictError(
                    f"{root}: another process is writing into this directory; wait for it, "
                    "stop it, or choose another directory"
                ) from None

    def release(self, *, remove: bool = False) -> None:
        """Give the lock up; `remove` its file as well. Safe to call twice."""
        if self._descriptor is not None:
            if remove:
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


class Directories:
    """Creates directories below `root`, and makes them survive a power loss; refuses symlinks."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known = {""}
        self._unsynced: dict[Path, None] = {}
        self._lock = threading.Lock()

    def ensure(self, relative: str) -> None:
        """Make `relative` and its parents exist; durable after `sync`."""
        with self._lock:
            self._unsynced.update(dict.fromkeys(self._make(relative)))

    def sync(self) -> None:
        """Make every directory created so far survive; one commit of the disk does for many."""
        with self._lock:
            while self._unsynced:
                parent = next(reversed(self._unsynced))
                sync_directory(parent)
                del self._unsynced[parent]

    def _make(self, relative: str) -> Iterator[Path]:
        if relative in self._known:
            return
        yield from self._make(relative.rpartition("/")[0])
        path = self._root / relative
        try:
            path.mkdir()
        except FileExistsError:
            if path.is_symlink() or not path.is_dir():
                raise StoreError(f"{path} is no directory, remove it") from None
        yield path.parent  # also of one that was there: whoever made it may have been stopped
        self._known.add(relative)


def sync_directory(path: Path) -> None:
    """fsync a directory, so that the names in it survive."""
    sync_file(path, os.O_DIRECTORY)


def sync_file(path: Path, flags: int = os.O_NOFOLLOW) -> None:
    """fsync a file, so that its content survives."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: memoryview | bytes) -> None:
    """Write all of `data`, however the kernel splits it."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(descriptor, view) :]


def write_unsynced(path: Path, data: bytes) -> None:
    """Write `data` to `path`, which may lose it until it is synced; follows no symbolic link."""
    descriptor = os.open(path, _CREATE, 0o644)
    try:
        write_all(descriptor, data)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: all of it or nothing, on disk when this returns."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        write_unsynced(partial, data)
        sync_file(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_file(root: Path, file: FileSpec, parts: Iterable[Tensor | bytes]) -> FileRecord:
    """Stream one file into its existing directory: payload, then index; on disk on return.

    parts: contiguous CPU tensors whose bytes, concatenated, are the payload in physical order;
    taken one at a time, so memory is bounded by the largest. Raises StoreError when they are too
    short or too long or writing fails, OutOfSpaceError when the disk is full; the temporary file
    is then removed, and so it is when `parts` raises.
    """
    target = root / file.key
    partial = target.with_name(target.name + PARTIAL_SUFFIX)
    action = f"writing {file.key}"
    try:
        with storage_errors(root, action):
            descriptor = os.open(partial, _CREATE, 0o644)
        try:
            checksums = FileDigest(file.chunk_nbytes)
            for piece in _pieces(file, parts):
                with storage_errors(root, action):
                    write_all(descriptor, piece)
                checksums.payload(piece)
            with storage_errors(root, action):
                if file.sharded:
                    index = digest.dense_index(file.chunks, file.chunk_nbytes)
                    write_all(descriptor, index)
                    checksums.index(index)
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        with storage_errors(root, action):
            partial.replace(target)
            sync_directory(target.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    blake3, xxh3 = checksums.finish()
    return FileRecord(file.nbytes, blake3, file.chunk_nbytes, xxh3)


def _pieces(file: FileSpec, parts: Iterable[Tensor | bytes]) -> Iterator[memoryview]:
    """The bytes of `parts` in pieces, exactly `file.payload_nbytes` of them."""
    total = 0
    for part in parts:
        view = bytes_of(file, part)
        total += len(view)
        if total > file.payload_nbytes:
            break
        for begin in range(0, len(view), PIECE_BYTES):
            yield view[begin : begin + PIECE_BYTES]
    if total != file.payload_nbytes:
        more = "at least " if total > file.payload_nbytes else ""
        raise StoreError(
            f"{file.key}: the parts hold {more}{total} bytes, expected {file.payload_nbytes}"
        )


def bytes_of(file: FileSpec, part: Tensor | bytes) -> memoryview:
    """The bytes of a part. Raises StoreError unless it is contiguous CPU memory."""
    if isinstance(part, bytes):
        return memoryview(part)
    if part.device.type != "cpu" or not part.is_contiguous():
        raise StoreError(
            f"{file.key}: a part of shape {tuple(part.shape)} on {part.device} is not contiguous "
            "CPU memory"
        )
    return part.detach().reshape(-1).view(torch.uint8).numpy().data
