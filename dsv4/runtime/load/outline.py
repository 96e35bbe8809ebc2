"""A store's arrays without their bytes: tensors of the device "meta", in the shapes a load gives.

From them come the kernels that a store needs, the bytes that a step of it reads, and what it takes
of a GPU, for a store that is there as for one that is only planned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch
from torch import Tensor

from dsv4.formats.errors import StoreError
from dsv4.formats.store.mapped_files import StoredArray
from dsv4.formats.store.matrix_views import Nodes, StoredWeights
from dsv4.formats.store.specs import ELEMENTS, FileSpec
from dsv4.runtime.load.loaded import dense_shape
from dsv4.runtime.load.plan import ALONE, Part, Placed, Share, plan_load

META = torch.device("meta")
MODEL = frozenset({Part.CORE, Part.EXPERTS})  # what runs: draft layers stay where they are


@dataclasses.dataclass(frozen=True)
class _MetaFile:
    def view(self, begin: int, end: int) -> Tensor:
        return torch.empty(end - begin, dtype=torch.uint8, device=META)


class OutlinedWeights(StoredWeights):
    """See `LoadedWeights`, whose places these have. plan: where they would lie."""

    def __init__(self, store: Nodes, parts: Collection[Part] = MODEL, share: Share = ALONE) -> None:
        self.root, self.contents, self.config = store.root, store.contents, store.config
        self.plan = plan_load(store, parts, share)

    def array(self, path: str) -> StoredArray:
        """See `LoadedWeights.array`."""
        placed = self._placed(path)
        if not placed.complete:
            raise StoreError(f"{self.root}: of array {path} only a share is planned")
        return StoredArray(placed.spec, _open)

    def share_of(self, path: str) -> Tensor:
        """See `LoadedWeights.share_of`."""
        placed = self._placed(path)
        raw = _MetaFile().view(0, placed.nbytes)
        return raw.view(ELEMENTS[placed.spec.element].torch).view(dense_shape(placed))

    def _placed(self, path: str) -> Placed:
        if path not in self.plan.arrays:
            raise StoreError(f"{self.root}: there is no array {path!r}, or its part is not planned")
        return self.plan.arrays[path]


def _open(file: FileSpec) -> _MetaFile:
    return _MetaFile()
