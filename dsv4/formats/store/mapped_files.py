"""Views of mapped files: the bytes of a store as torch tensors, verified on first use.

A file is mapped privately and lazily by `torch.from_file`, which, unlike `mmap`, keeps no file
descriptor (a store has thousands of files). It is opened here and handed over by its descriptor:
torch wants a name that is text, which a path need not be. Each chunk's XXH3-64 is compared with the
manifest the first time a view touches it; afterwards the chunk costs nothing. Measured on an AMD
EPYC (Turin) core: 15 to 25 GB/s from page cache, page faults included.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from dsv4.formats.errors import StoreError
from dsv4.formats.store.damage import repaired_by
from dsv4.formats.store.digest import Digests
from dsv4.formats.store.specs import ELEMENTS, ArraySpec, FileSpec

_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FileBytes(Protocol):
    """The payload of one file, in memory of any device."""

    def view(self, begin: int, end: int) -> Tensor:
        """uint8 `[end - begin]`: bytes of the payload, zero-copy."""
        ...


def map_file(path: Path, nbytes: int) -> Tensor:
    """A regular file of `nbytes` bytes, mapped: uint8 `[nbytes]`, zero-copy. Follows no link.

    Raises StoreError when it has another size or kind, OSError or RuntimeError as the system does.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size != nbytes:
            raise StoreError(f"{path}: the file changed since the store was opened")
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8)
        name = f"/proc/self/fd/{descriptor}"
        return torch.from_file(name, shared=False, size=nbytes, dtype=torch.uint8)
    finally:
        os.close(descriptor)


class MappedFile:
    """One file of a store in memory. `chunk_digests` are compared when `verify` is set."""

    def __init__(
        self, root: Path, file: FileSpec, chunk_digests: Digests, *, verify: bool = True
    ) -> None:
        """Raises StoreError when the file is missing or shorter than `file.nbytes`."""
        self.file = file
        self._digests = chunk_digests
        self._pending = np.full(file.chunks, verify)
        self._store = root
        path = root / file.key
        try:
            self._bytes = map_file(path, file.nbytes)
        except (OSError, RuntimeError) as error:
            raise StoreError(f"{path}: it cannot be mapped: {error}") from error

    def view(self, begin: int, end: int) -> Tensor:
        """uint8 `[end - begin]`: bytes of the payload, zero-copy.

        Raises StoreError naming the first chunk in the range whose checksum is wrong.
        """
        size = self.file.chunk_nbytes
        if size and end > begin:
            touched = slice(begin // size, -(-end // size))
            if self._pending[touched].any():
                self._verify(touched)
        return self._bytes[begin:end]

    def damaged_chunks(self) -> list[int]:
        """Indices of all chunks whose bytes differ from the manifest; hashes every chunk."""
        return [index for index in range(self.file.chunks) if not self._intact(index)]

    @property
    def index(self) -> bytes:
        """The bytes behind the payload: the sharding index, or nothing."""
        return self._bytes[self.file.payload_nbytes :].numpy().tobytes()

    def _verify(self, touched: slice) -> None:
        for index in range(touched.start, touched.stop):
            if self._pending[index] and not self._intact(index):
                size = self.file.chunk_nbytes
                raise StoreError(
                    f"{self.file.key}: chunk {index} (bytes {index * size} to "
                    f"{(index + 1) * size}) does not match its checksum; "
                    f"{repaired_by(self._store)}"
                )
            self._pending[index] = False

    def _intact(self, index: int) -> bool:
        size = self.file.chunk_nbytes
        chunk = self._bytes[index * size : (index + 1) * size]
        return xxhash.xxh3_64_intdigest(chunk.numpy().data) == int(self._digests[index])


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """One array of a store. Nothing is mapped before a tensor is asked for.

    All tensors have the torch dtype of `spec.element` and share memory with the file wherever
    the docstrings say zero-copy. Errors are those of `open_file` and its views.
    """

    spec: ArraySpec
    open_file: Callable[[FileSpec], FileBytes]

    @functools.cached_property
    def files(self) -> tuple[FileSpec, ...]:
        """`spec.files()`, computed once."""
        return self.spec.files()

    def tensor(self) -> Tensor:
        """The array in its logical shape and order.

        Zero-copy when it lies in one file in C order (plain, or cut in leading dimensions only);
        else a copy of the whole array.
        """
        parts = [self._logical(file) for file in self.files]
        return self._typed(parts[0] if len(parts) == 1 else torch.cat(parts))

    def slabs(self) -> Tensor:
        """The array as it lies in its file: `[S, rows, columns / S, …]`, dimension 1 being cut.

        `S = 1` for an array of which only rows are cut. Zero-copy for an array in one file. Raises
        StoreError when rows and columns are cut.
        """
        shape = self._slab_shape(self.spec.shard, self.spec.chunk)
        parts = [self._payload(file).view(shape) for file in self.files]
        return self._typed(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))

    def row(self, index: int) -> Tensor:
        """`slabs()` of the array at `index` of dimension 0 (one expert of a stack), zero-copy.

        Raises StoreError when the row is not one contiguous range, IndexError out of range.
        """
        spec = self.spec
        if not spec.shape or not 0 <= index < spec.shape[0]:
            raise IndexError(f"array {spec.path}: row {index} of {spec.shape[:1]}")
        if not spec.row_addressable:
            raise StoreError(f"array {spec.path}: chunk {spec.chunk} mixes parts of rows")
        file = self.files[index // spec.shard[0]]
        nbytes = spec.nbytes // spec.shape[0]
        begin = (index - file.rows[0]) * nbytes
        raw = self.open_file(file).view(begin, begin + nbytes)
        return self._typed(raw).view(self._slab_shape(spec.shape[1:], spec.chunk[1:]))

    def _payload(self, file: FileSpec) -> Tensor:
        # Moved as integers: torch copies those of any width, but not every float8 kind.
        carrier = _CARRIERS[ELEMENTS[self.spec.element].nbytes]
        return self.open_file(file).view(0, file.payload_nbytes).view(carrier)

    def _typed(self, raw: Tensor) -> Tensor:
        return raw.view(ELEMENTS[self.spec.element].torch)

    def _logical(self, file: FileSpec) -> Tensor:
        spec, flat = self.spec, self._payload(file)
        if spec.c_order:
            return flat.view(spec.shard)
        rank = len(spec.shape)
        grid_first = [axis for i in range(rank) for axis in (i, rank + i)]
        return flat.view(*spec.file_grid, *spec.chunk).permute(grid_first).reshape(spec.shard)

    def _slab_shape(self, shape: tuple[int, ...], chunk: tuple[int, ...]) -> tuple[int, ...]:
        cuts = tuple(s // c for s, c in zip(shape, chunk, strict=True))
        if len(cuts) > 1 and cuts[1] > 1 and math.prod(cuts) == cuts[1]:
            return (cuts[1], *chunk)
        if math.prod(cuts[1:]) == 1:
            return (1, *shape)
        raise StoreError(f"array {self.spec.path}: chunk {chunk} of {shape} is not cut into slabs")
