"""What a conversion writes: for every node of the store, its arrays and the units that fill them.

A unit is the grain of work and of resumption: it reads a few source ranges, transforms them and
writes whole files or ranges of files. Units are pure: the same source bytes give the same bytes in
the same places, in any order and any process.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

from dsv4.convert.outputs.results import Figures, Result
from dsv4.convert.sources.base import Reader
from dsv4.formats.model.source_tensor import SourceTensor
from dsv4.formats.store.extents import Sink
from dsv4.formats.store.specs import ArraySpec, FileSpec

Losses = dict[str, Figures]
"""Name of a rounded tensor, or template of a stack -> its loss (of a stack's worst expert)."""

TILE_BYTES = 32 << 20  # rows are streamed in tiles of about this many source bytes


class Target(NamedTuple):
    """Bytes `[begin, end)` of a file's payload, which one unit writes."""

    file: FileSpec
    begin: int
    end: int

    @classmethod
    def whole(cls, file: FileSpec) -> Target:
        """All of a file."""
        return cls(file, 0, file.payload_nbytes)


@dataclasses.dataclass(frozen=True)
class Unit:
    """One piece of work: `inputs` -> `targets`. `index` is its expert in a stack."""

    key: str
    output: Output
    inputs: tuple[SourceTensor, ...]
    targets: tuple[Target, ...]
    index: int = 0

    @functools.cached_property
    def input_bytes(self) -> int:
        """Source bytes this unit reads."""
        return sum(tensor.nbytes for tensor in self.inputs)

    def run(self, source: Reader, sink: Sink) -> Result:
        """Read, transform and write every target. Raises FormatError, SourceError, StoreError."""
        return self.output.produce(self, source, sink)


class Output(abc.ABC):
    """One node of the store: a plain array, a quantised matrix, or an expert stack."""

    @property
    @abc.abstractmethod
    def path(self) -> str:
        """The node's path."""

    @abc.abstractmethod
    def arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays below (or at) `path`, without measured attributes."""

    @abc.abstractmethod
    def units(self) -> tuple[Unit, ...]:
        """The work that fills them."""

    @abc.abstractmethod
    def produce(self, unit: Unit, source: Reader, sink: Sink) -> Result:
        """Run one of `units()`."""

    def complete(self, results: Sequence[Result], sink: Sink) -> None:
        """Write the small arrays that need every unit's result; most outputs have none."""
        return

    @abc.abstractmethod
    def attributes(self, results: Sequence[Result], files: FileIndex) -> dict[str, Any]:
        """The node's attributes, once every unit has run."""

    def losses(self, results: Sequence[Result]) -> Losses:
        """What rounding cost, once every unit has run; empty when nothing was rounded."""
        return {}

    @abc.abstractmethod
    def peak_bytes(self) -> int:
        """An upper bound on the memory one of its units needs besides its inputs."""

    @property
    @abc.abstractmethod
    def rounded(self) -> bool:
        """Whether the plan rounds this node (as opposed to carrying it exactly)."""

    def rounds(self, tensor: SourceTensor) -> bool:
        """Whether the plan rounds `tensor`, one of this node's."""
        return self.rounded


def is_weight(name: str) -> bool:
    """Whether a tensor of zeros under this name is worth a word: biases and tables may be zero."""
    return name.endswith(".weight")


FileIndex = dict[str, int]
"""Source file name -> its index in the manifest's list."""


def lineage(tensor: SourceTensor, files: FileIndex) -> dict[str, list[int]]:
    """Where a tensor's bytes came from: `[file index, begin, end]` of weight and its scales."""
    return {
        role: [files[entry.file], entry.begin, entry.end] for role, entry in tensor.entries.items()
    }


def of_one(tensor: SourceTensor, results: Sequence[Result]) -> dict[str, Any]:
    """Attributes of a node that is one tensor of one unit: what it is and what became of it."""
    ((outcome,),) = (result.outcomes for result in results)
    zero = {"zero": True} if outcome.zero and is_weight(tensor.name) else {}
    return {"names": [tensor.name], "exact": outcome.exact, **zero}


def tile_rows(rows: int, row_bytes: int, multiple: int = 1, tile_bytes: int = TILE_BYTES) -> int:
    """Rows per tile so that a tile holds about `tile_bytes`, a multiple of `multiple`."""
    per_tile = max(tile_bytes // max(row_bytes, 1), 1)
    return min(max(per_tile // multiple, 1) * multiple, max(rows, 1))
