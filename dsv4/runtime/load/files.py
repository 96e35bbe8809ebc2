"""Reading a store's files at an offset into given memory, past the page cache if that is wished.

`os.preadv` releases the interpreter's lock and copies straight into the memory of a tensor. With
`direct`, only bytes that are in the page cache are copied from there; others come by O_DIRECT,
which spares the copy and leaves the cache to those who need it. The kernel says which is which
(`cachestat`, Linux 6.5); where it does not, or the file system or the memory does not go with
O_DIRECT, reads are plain.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import errno
import os
import stat
import threading
from collections.abc import Iterable
from pathlib import Path

from dsv4.formats.errors import StoreError
from dsv4.formats.store.damage import symbolic_link
from dsv4.formats.store.specs import ALIGNMENT, FileSpec

MOSTLY = 0.5  # of a range in the page cache, and it is read through it
AHEAD = 32  # files that are open before somebody reads them
SMALLEST_DIRECT = 1 << 20  # below, a plain read is as fast and needs no second descriptor
_CACHESTAT = 451  # the system call's number, the same on x86-64 and Arm
_PAGE = os.sysconf("SC_PAGE_SIZE")
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_NOT_DIRECT = (errno.EINVAL, errno.EFAULT)  # not this file system, or not into this memory
_libc = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_uint64), ("nbytes", ctypes.c_uint64))


class _CacheStat(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("cache", "dirty", "writeback", "evicted", "recently_evicted")
    )


def cached_share(descriptor: int, begin: int, nbytes: int) -> float | None:
    """Fraction of the pages of a file's range that are in memory; None when nobody says."""
    found = _CacheStat()
    which = _Range(begin, nbytes)
    failed = _libc.syscall(
        _CACHESTAT, descriptor, ctypes.byref(which), ctypes.byref(found), ctypes.c_uint(0)
    )
    if failed or not nbytes:
        return None
    pages = (begin + nbytes - 1) // _PAGE - begin // _PAGE + 1
    return min(1.0, int(found.cache) / pages)


class OpenFile:
    """A file of a store, open for reading at offsets by any thread."""

    def __init__(self, root: Path, file: FileSpec, *, direct: bool) -> None:
        """Raises StoreError when it is missing, a symbolic link, or not `file.nbytes` long.

        direct: use O_DIRECT for what is not in the page cache.
        """
        self._path = root / file.key
        self._direct: int | None = None
        try:
            self._plain = os.open(self._path, _OPEN)
        except OSError as error:
            raise StoreError(f"{self._path}: it cannot be opened: {error.strerror}") from None
        status = os.fstat(self._plain)
        if not stat.S_ISREG(status.st_mode) or status.st_size != file.nbytes:
            self.close()
            raise StoreError(
                f"{self._path}: it has {status.st_size} bytes, expected a file of {file.nbytes}; "
                "it changed since the store was opened"
            )
        if direct and file.nbytes >= SMALLEST_DIRECT:
            share = cached_share(self._plain, 0, file.nbytes)
            if share is not None and share < 1.0:
                with contextlib.suppress(OSError):
                    self._direct = os.open(self._path, _OPEN | os.O_DIRECT)

    def close(self) -> None:
        """Close it."""
        os.close(self._plain)
        if self._direct is not None:
            os.close(self._direct)

    def read(self, begin: int, memory: memoryview) -> int:
        """Fill `memory` with the bytes from `begin` on; -> how many went past the page cache.

        memory: its address is a multiple of 4096 whenever `begin` is one. Raises StoreError when
        the file ends before, or the disk fails.
        """
        try:
            done = self._read_direct(begin, memory) if self._goes_direct(begin, memory) else 0
            self._read_plain(begin + done, memory[done:])
        except OSError as error:
            raise StoreError(
                f"{self._path}: reading bytes {begin} to {begin + len(memory)} failed: "
                f"{error.strerror}"
            ) from None
        return done

    def _goes_direct(self, begin: int, memory: memoryview) -> bool:
        if self._direct is None or begin % ALIGNMENT or len(memory) < SMALLEST_DIRECT:
            return False
        share = cached_share(self._plain, begin, len(memory))
        return share is not None and share < MOSTLY

    def _read_direct(self, begin: int, memory: memoryview) -> int:
        """Whole blocks, as many as the file system gives; -> their bytes."""
        assert self._direct is not None
        done, end = 0, len(memory) // ALIGNMENT * ALIGNMENT
        while done < end:
            try:
                count = os.preadv(self._direct, [memory[done:end]], begin + done)
            except OSError as error:
                if error.errno not in _NOT_DIRECT:
                    raise
                break
            done += count
            if not count or count % ALIGNMENT:
                break
        return done

    def _read_plain(self, begin: int, memory: memoryview) -> None:
        while len(memory):
            count = os.preadv(self._plain, [memory], begin)
            if not count:
                raise StoreError(
                    f"{self._path}: it ends at byte {begin}, {len(memory)} bytes short; it changed "
                    "since the store was opened"
                )
            memory, begin = memory[count:], begin + count


class FileTable:
    """Files that several threads read: each is opened ahead of its use, and closed after the last.

    Ahead, because every system call hands over the interpreter's lock, and a dozen readers that
    come to a new file at once would all open it.
    """

    def __init__(self, root: Path, uses: Iterable[FileSpec], *, direct: bool) -> None:
        """uses: a file as often as it will be released, in order. Raises StoreError as `get`."""
        self._root, self._direct = root, direct
        files = list(uses)
        self._left = collections.Counter(file.key for file in files)
        self._coming = iter({file.key: file for file in files}.values())
        self._open: dict[str, OpenFile] = {}
        self._directories: set[str] = set()
        self._lock = threading.Lock()
        try:
            for _ in range(AHEAD):
                self._open_next()
        except StoreError:
            self.close()
            raise

    def get(self, file: FileSpec) -> OpenFile:
        """The open file. Raises StoreError as `OpenFile`, or for a symbolic link on its way."""
        found = self._open.get(file.key)
        if found is not None:
            return found
        directory = file.key.rpartition("/")[0]
        link = symbolic_link(self._root, directory, self._directories)
        if link:
            raise StoreError(f"{self._root}: {link} is a symbolic link, not a directory")
        opened = OpenFile(self._root, file, direct=self._direct)
        found = self._open.setdefault(file.key, opened)
        if found is not opened:
            opened.close()
        return found

    def release(self, file: FileSpec) -> None:
        """One use less; after the last the file is closed, and another opened."""
        with self._lock:
            self._left[file.key] -= 1
            unused = not self._left[file.key]
        if unused:
            self._open.pop(file.key).close()
            self._open_next()

    def _open_next(self) -> None:
        file = next(self._coming, None)  # `next` of an iterator over a dict is atomic
        if file is not None and self._left[file.key]:
            self.get(file)

    def close(self) -> None:
        """Close what is still open."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()
