"""Unquantised tensors and FP8 matrices: carried byte for byte, integers widened to 64 bits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4.convert.outputs.base import (
    TILE_BYTES,
    FileIndex,
    Output,
    Target,
    Unit,
    lineage,
    of_one,
    tile_rows,
)
from dsv4.convert.outputs.partition import fp8_slabs, row_units
from dsv4.convert.outputs.results import Outcome, Result
from dsv4.convert.outputs.verbatim import checked, widened
from dsv4.convert.sources.base import Reader
from dsv4.formats.model.recipes import cut_by_columns
from dsv4.formats.model.source_tensor import INTEGERS, SourceTensor
from dsv4.formats.numeric.layouts import to_slabs
from dsv4.formats.numeric.operands import FP8_BLOCK
from dsv4.formats.numeric.zeros import Zeros, is_zero
from dsv4.formats.store.extents import Sink
from dsv4.formats.store.specs import (
    ELEMENTS,
    FP8_LAYOUT,
    PLAIN_LAYOUT,
    ArraySpec,
    FileSpec,
    group_of,
    path_of,
)

ELEMENT_OF = {
    "BF16": "bfloat16",
    "F32": "float32",
    **dict.fromkeys(INTEGERS, "int64"),
    "F8_E4M3": "e4m3",
    "F8_E8M0": "e8m0",
}


@dataclasses.dataclass(frozen=True)
class PlainOutput(Output):
    """An unquantised tensor as one array at its own path, cut by rows where that is aligned."""

    tensor: SourceTensor
    below: int | None = None  # what entries of a table of experts have to stay below

    @property
    def path(self) -> str:
        return path_of(self.tensor.name)

    @property
    def element(self) -> str:
        """What its values are stored as."""
        return ELEMENT_OF[self.tensor.weight.dtype]

    def arrays(self) -> tuple[ArraySpec, ...]:
        shape, element = self.tensor.shape, self.element
        chunk = shape
        if len(shape) == 2 and not cut_by_columns(self.tensor.name):
            row_bytes = shape[1] * ELEMENTS[element].nbytes
            chunk = (shape[0] // row_units(shape[0], row_bytes), shape[1])
        return (ArraySpec(self.path, shape, element, chunk, shape),)

    def units(self) -> tuple[Unit, ...]:
        targets = tuple(Target.whole(file) for file in self.arrays()[0].files())
        return (Unit(self.path, self, (self.tensor,), targets),)

    def produce(self, unit: Unit, source: Reader, sink: Sink) -> Result:
        zeros = Zeros()
        sink.write(unit.targets[0].file, map(zeros.see, row_tiles(source, self.tensor, self.below)))
        return Result((Outcome(zero=zeros.all_zero),))

    def attributes(self, results: Sequence[Result], files: FileIndex) -> dict[str, Any]:
        return {
            "format": "plain",
            "layout": PLAIN_LAYOUT,
            **of_one(self.tensor, results),
            "sources": lineage(self.tensor, files),
        }

    def peak_bytes(self) -> int:
        return min(max(self.tensor.nbytes, self.arrays()[0].nbytes), 2 * TILE_BYTES)

    @property
    def rounded(self) -> bool:
        return False


@dataclasses.dataclass(frozen=True)
class Fp8Output(Output):
    """An FP8 matrix with its block scales, cut by rows or into K-slabs."""

    tensor: SourceTensor

    @property
    def path(self) -> str:
        return group_of(self.tensor.name)

    @property
    def slabs(self) -> int:
        rows, cols = self.tensor.shape
        return fp8_slabs(rows, cols) if cut_by_columns(self.tensor.name) else 1

    def arrays(self) -> tuple[ArraySpec, ...]:
        rows, cols = self.tensor.shape
        assert self.tensor.scale is not None
        if cut_by_columns(self.tensor.name):
            chunk = (rows, cols // self.slabs)
        else:
            chunk = (rows // row_units(rows, cols, FP8_BLOCK), cols)
        scales = self.tensor.scale
        return (
            ArraySpec(f"{self.path}/codes", (rows, cols), "e4m3", chunk, (rows, cols)),
            ArraySpec(
                f"{self.path}/scales",
                scales.shape,
                ELEMENT_OF[scales.dtype],
                scales.shape,
                scales.shape,
            ),
        )

    def units(self) -> tuple[Unit, ...]:
        targets = (Target.whole(file) for array in self.arrays() for file in array.files())
        return (Unit(self.path, self, (self.tensor,), tuple(targets)),)

    def produce(self, unit: Unit, source: Reader, sink: Sink) -> Result:
        assert self.tensor.scale is not None
        codes, scales = (target.file for target in unit.targets)
        zeros = Zeros()
        tiles = map(zeros.see, row_tiles(source, self.tensor))
        if self.slabs == 1:
            sink.write(codes, tiles)
        else:
            rows = self.tensor.shape[0]
            begin = 0
            for tile in tiles:
                write_slabs(sink, codes, to_slabs(tile, self.slabs), begin, rows)
                begin += tile.shape[0]
        scale = checked(source.read(self.tensor.scale), self.tensor.scale.name)
        sink.write(scales, [scale])
        return Result((Outcome(zero=zeros.all_zero or fp8_scales_are_zero(scale)),))

    def attributes(self, results: Sequence[Result], files: FileIndex) -> dict[str, Any]:
        return {
            "format": "fp8",
            "layout": FP8_LAYOUT,
            "parameters": {"slabs": self.slabs, "interleave": 0},
            "shape": list(self.tensor.shape),
            **of_one(self.tensor, results),
            "sources": lineage(self.tensor, files),
        }

    def peak_bytes(self) -> int:
        return min(3 * self.tensor.nbytes, 3 * TILE_BYTES)

    @property
    def rounded(self) -> bool:
        return False


def fp8_scales_are_zero(scales: Tensor) -> bool:
    """Whether block scales make a matrix zero, whatever its codes; E8M0 ones cannot."""
    return scales.dtype is not torch.float8_e8m0fnu and is_zero(scales)


def row_tiles(source: Reader, tensor: SourceTensor, below: int | None = None) -> Iterator[Tensor]:
    """The weight's values in row order, checked, a bounded number of rows at a time."""
    entry = tensor.weight
    if len(entry.shape) < 2:
        yield checked(widened(source.read(entry)), tensor.name, below=below)
        return
    rows = entry.shape[0]
    row_bytes = math.prod(entry.shape[1:]) * ELEMENTS[ELEMENT_OF[entry.dtype]].nbytes
    step = tile_rows(rows, row_bytes)
    for start in range(0, rows, step):
        part = widened(source.read_rows(entry, start, min(start + step, rows)))
        yield checked(part, tensor.name, start, below)


def write_slabs(sink: Sink, file: FileSpec, tile: Tensor, begin: int, rows: int) -> None:
    """Write `tile` `[S, n, ...]` as rows (or tiles of rows) `begin` on of `[S, rows, ...]`."""
    row_bytes = tile[0, :1].numel() * tile.element_size()
    for slab, part in enumerate(tile.unbind()):
        sink.write_at(file, (slab * rows + begin) * row_bytes, [part.contiguous()])
