"""Reading a store's files at an offset into given memory, past the page cache where that is faster.

`os.preadv` releases the interpreter's lock and copies straight into the memory of a tensor. Bytes
that are in the page cache are copied from there; others come by O_DIRECT, which spares the copy and
leaves the cache to those who need it. Which it is, is asked range by range (`cachestat`, Linux
6.5); where the kernel does not say, or the file system has no O_DIRECT, reads are plain.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Self

from dsv4.formats.errors import StoreError
from dsv4.formats.store.schema import FileSpec

DIRECT_ALIGNMENT = 4096
MOSTLY = 0.5  # of a range in the page cache, and it is read through it
SMALLEST_DIRECT = 1 << 20  # below, a plain read is as fast and needs no second descriptor
_CACHESTAT = 451  # the system call's number, the same on x86-64 and Arm
_PAGE = os.sysconf("SC_PAGE_SIZE")
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
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
    """A file of a store, open for reading at offsets; to be used by one thread.

    direct: whether O_DIRECT may be used. direct_bytes, plain_bytes: what was read each way.
    """

    def __init__(self, root: Path, file: FileSpec, *, direct: bool = True) -> None:
        """Raises StoreError when it is missing, a symbolic link, or not `file.nbytes` long."""
        self.file = file
        self._path = root / file.key
        self._direct: int | None = None
        self._may_be_direct, self._directly = direct, False
        self.direct_bytes = self.plain_bytes = 0
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close it."""
        os.close(self._plain)
        if self._direct is not None:
            os.close(self._direct)

    def choose(self, begin: int, nbytes: int) -> None:
        """Decide how bytes of this range are read from now on: past the page cache, or plainly."""
        if not self._may_be_direct or nbytes < SMALLEST_DIRECT:
            self._directly = False
            return
        share = cached_share(self._plain, begin, nbytes)
        self._may_be_direct = share is not None
        self._directly = share is not None and share < MOSTLY and self._open_direct()

    def read(self, begin: int, memory: memoryview) -> None:
        """Fill `memory` with the bytes from `begin` on.

        memory: its address is a multiple of 4096 whenever `begin` is one. Raises StoreError when
        the file ends before, or the disk fails.
        """
        try:
            if self._directly and begin % DIRECT_ALIGNMENT == 0:
                self._read_direct(begin, memory)
            else:
                self._read_plain(begin, memory)
        except OSError as error:
            raise StoreError(
                f"{self._path}: reading bytes {begin} to {begin + len(memory)} failed: "
                f"{error.strerror}"
            ) from None

    def _open_direct(self) -> bool:
        if self._direct is None:
            with contextlib.suppress(OSError):
                self._direct = os.open(self._path, _OPEN | os.O_DIRECT)
            self._may_be_direct = self._direct is not None
        return self._may_be_direct

    def _read_direct(self, begin: int, memory: memoryview) -> None:
        """Whole blocks directly; the rest, and whatever the file system refuses, plainly."""
        assert self._direct is not None
        end = len(memory) // DIRECT_ALIGNMENT * DIRECT_ALIGNMENT
        done = 0
        while done < end:
            try:
                count = os.preadv(self._direct, [memory[done:end]], begin + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._may_be_direct = self._directly = False
                break
            if not count:
                break
            done += count
            if count % DIRECT_ALIGNMENT:
                break
        self.direct_bytes += done
        if done < len(memory):
            self._read_plain(begin + done, memory[done:])

    def _read_plain(self, begin: int, memory: memoryview) -> None:
        self.plain_bytes += len(memory)
        while len(memory):
            count = os.preadv(self._plain, [memory], begin)
            if not count:
                raise StoreError(
                    f"{self._path}: it ends at byte {begin}, {len(memory)} bytes short; it changed "
                    "since the store was opened"
                )
            memory, begin = memory[count:], begin + count
