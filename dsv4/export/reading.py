"""What an export reads of a store: every file compared with its checksums before it is used.

Files are hashed as streams, then mapped without hashing: of a matrix of gigabytes only the rows at
work are in memory.
"""

from __future__ import annotations

import os
import threading

import xxhash

from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.errors import StoreError
from dsv4.formats.store.damage import repaired_by, symbolic_link
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import FileSpec

PIECE_BYTES = 1 << 20
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class Reading:
    """A store's tensors for threads. packed: maps anything, hashes nothing by itself."""

    def __init__(self, packed: PackedCheckpoint) -> None:
        self._store = packed.store
        self.packed = PackedCheckpoint(PackedStore.open(packed.store.root, verify=False))
        self._lock = threading.Lock()
        self._proved: set[str] = set()
        self._real: set[str] = set()

    def prove(self, path: str, row: int | None = None) -> None:
        """Compare the files of the array or group `path` with their checksums, each once.

        row: only those that hold it of dimension 0. Raises StoreError naming file and chunk.
        """
        arrays = self._store.hierarchy.arrays
        members = ("codes", "scales", "weight", "global_scale")
        paths = [path] if path in arrays else [f"{path}/{member}" for member in members]
        for array in (arrays[one] for one in paths if one in arrays):
            for file in array.files():
                if row is None or row in range(*file.rows):
                    self._prove(file)

    def forget(self) -> None:
        """Let go of what is mapped."""
        self.packed.store.forget()

    def _prove(self, file: FileSpec) -> None:
        with self._lock:
            if file.key in self._proved:
                return
        root = self._store.root
        if link := symbolic_link(root, file.key.rpartition("/")[0], self._real):
            raise StoreError(f"{root}: {link} is a symbolic link, expected a directory")
        try:
            descriptor = os.open(root / file.key, _OPEN)
            try:
                self._compare(descriptor, file)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise StoreError(f"{root}: {file.key} cannot be read: {error.strerror}") from error
        with self._lock:
            self._proved.add(file.key)

    def _compare(self, descriptor: int, file: FileSpec) -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        for chunk, expected in enumerate(self._store.chunk_digests(file.key)):
            found, left = xxhash.xxh3_64(), file.chunk_nbytes
            while left:
                count = os.readv(descriptor, [buffer[: min(left, PIECE_BYTES)]])
                if not count:
                    break
                found.update(buffer[:count])
                left -= count
            if left or found.intdigest() != int(expected):
                root = self._store.root
                raise StoreError(
                    f"{root}: {file.key}: chunk {chunk} does not match its checksum; "
                    f"{repaired_by(root)}"
                )
