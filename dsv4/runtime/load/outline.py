"""A store's arrays without their bytes: tensors of the device "meta", in the shapes a load gives.

From them come the kernels that a store needs, the bytes that a step of it reads, and what it takes
of a GPU, for a store that is there as for one that is only planned.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dsv4.formats.errors import StoreError
from dsv4.formats.store.mapped_files import StoredArray
from dsv4.formats.store.matrix_views import Nodes, StoredWeights
from dsv4.formats.store.specs import ELEMENTS, ArraySpec, FileSpec
from dsv4.runtime.load.loaded import dense_shape
from dsv4.runtime.load.plan import whole

META = torch.device("meta")


@dataclasses.dataclass(frozen=True)
class _MetaFile:
    def view(self, begin: int, end: int) -> Tensor:
        return torch.empty(end - begin, dtype=torch.uint8, device=META)


class OutlinedWeights(StoredWeights):
    """See `LoadedWeights`, of all arrays."""

    def __init__(self, store: Nodes) -> None:
        self.root, self.contents, self.config = store.root, store.contents, store.config
        self.arrays = store.hierarchy.arrays

    def array(self, path: str) -> StoredArray:
        """See `LoadedWeights.array`."""
        return StoredArray(self._spec(path), _open)

    def share_of(self, path: str) -> Tensor:
        """See `LoadedWeights.share_of`."""
        placed = whole(self._spec(path))
        raw = _MetaFile().view(0, placed.nbytes)
        return raw.view(ELEMENTS[placed.spec.element].torch).view(dense_shape(placed))

    def _spec(self, path: str) -> ArraySpec:
        if path not in self.arrays:
            raise StoreError(f"{self.root}: array {path!r} is not in the store")
        return self.arrays[path]


def _open(file: FileSpec) -> _MetaFile:
    return _MetaFile()
