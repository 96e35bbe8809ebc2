"""Unquantised tensors and FP8 matrices: carried byte for byte."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4.convert.outputs import (
    TILE_BYTES,
    Emit,
    FileIndex,
    Output,
    Result,
    Unit,
    lineage,
    tile_rows,
)
from dsv4.convert.partition import cut_by_columns, fp8_slabs, row_units
from dsv4.convert.source import Source
from dsv4.formats.layouts import pack_fp8
from dsv4.formats.matrices import FP8_BLOCK
from dsv4.formats.source_tensor import SourceTensor
from dsv4.formats.store.schema import (
    ELEMENTS,
    FP8_LAYOUT,
    PLAIN_LAYOUT,
    ArraySpec,
    group_of,
    path_of,
)

ELEMENT_OF = {
    "BF16": "bfloat16",
    "F32": "float32",
    "I64": "int64",
    "F8_E4M3": "e4m3",
    "F8_E8M0": "e8m0",
}


@dataclasses.dataclass(frozen=True)
class PlainOutput(Output):
    """An unquantised tensor as one array at its own path, cut by rows where that is aligned."""

    tensor: SourceTensor

    @property
    def path(self) -> str:
        return path_of(self.tensor.name)

    def arrays(self) -> tuple[ArraySpec, ...]:
        shape = self.tensor.shape
        element = ELEMENT_OF[self.tensor.weight.dtype]
        chunk = shape
        if len(shape) == 2 and not cut_by_columns(self.tensor.name):
            row_bytes = shape[1] * ELEMENTS[element].nbytes
            chunk = (shape[0] // row_units(shape[0], row_bytes), shape[1])
        return (ArraySpec(self.path, shape, element, chunk, shape),)

    def units(self) -> tuple[Unit, ...]:
        files = self.arrays()[0].files()
        return (Unit(self.path, self, (self.tensor,), files),)

    def produce(self, unit: Unit, source: Source, emit: Emit) -> Result:
        emit(unit.files[0], row_tiles(source, self.tensor))
        return {}

    def attributes(self, results: Sequence[Result], files: FileIndex) -> dict[str, Any]:
        return {
            "format": "plain",
            "layout": PLAIN_LAYOUT,
            "names": [self.tensor.name],
            "exact": True,
            "sources": lineage(self.tensor, files),
        }

    def peak_bytes(self) -> int:
        return min(self.tensor.nbytes, 2 * TILE_BYTES)

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
        files = tuple(file for array in self.arrays() for file in array.files())
        return (Unit(self.path, self, (self.tensor,), files),)

    def produce(self, unit: Unit, source: Source, emit: Emit) -> Result:
        assert self.tensor.scale is not None
        scales = source.read(self.tensor.scale)
        codes_file, scales_file = unit.files
        if self.slabs == 1:
            emit(codes_file, row_tiles(source, self.tensor))
        else:
            packed = pack_fp8(source.read(self.tensor.weight), scales, slabs=self.slabs)
            emit(codes_file, [packed.codes])
        emit(scales_file, [scales])
        return {}

    def attributes(self, results: Sequence[Result], files: FileIndex) -> dict[str, Any]:
        return {
            "format": "fp8",
            "layout": FP8_LAYOUT,
            "parameters": {"slabs": self.slabs, "interleave": 0},
            "shape": list(self.tensor.shape),
            "names": [self.tensor.name],
            "exact": True,
            "sources": lineage(self.tensor, files),
        }

    def peak_bytes(self) -> int:
        return (2 if self.slabs > 1 else 1) * self.tensor.nbytes

    @property
    def rounded(self) -> bool:
        return False


def row_tiles(source: Source, tensor: SourceTensor) -> Iterator[Tensor]:
    """The weight's bytes in row order, a bounded number of rows at a time."""
    entry = tensor.weight
    if len(entry.shape) < 2:
        yield source.read(entry)
        return
    rows = entry.shape[0]
    row_bytes = (entry.end - entry.begin) // max(rows, 1)
    step = tile_rows(rows, row_bytes)
    for start in range(0, rows, step):
        yield source.read_rows(entry, start, min(start + step, rows))


def count(shape: tuple[int, ...]) -> int:
    """Elements of a tensor of this shape."""
    return math.prod(shape)


def float_rows(source: Source, tensor: SourceTensor, start: int, stop: int) -> Tensor:
    """Rows `[start, stop)` of a BF16 or F32 tensor as float32."""
    return source.read_rows(tensor.weight, start, stop).to(torch.float32)
