"""Matrices in NVFP4: carried where the source has them so, else rounded as the recipe asks for.

The global scale needs the amax of the whole matrix, so a large source is read twice, a tile of
rows at a time; memory does not grow with the matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from dsv4.convert.outputs.base import (
    FileIndex,
    Losses,
    Output,
    Target,
    Unit,
    lineage,
    of_one,
)
from dsv4.convert.outputs.decode import read_nvfp4
from dsv4.convert.outputs.partition import aligned, nvfp4_row_units, nvfp4_slabs
from dsv4.convert.outputs.plain import write_slabs
from dsv4.convert.outputs.results import Outcome, Result
from dsv4.convert.outputs.rounding import PEAK_BYTES, round_tiles
from dsv4.convert.sources.base import Reader
from dsv4.formats.model.recipes import cut_by_columns
from dsv4.formats.model.source_tensor import Encoding, SourceTensor
from dsv4.formats.numeric.layouts import pack_nvfp4
from dsv4.formats.numeric.loss import Loss
from dsv4.formats.numeric.nvfp4 import dequantize_nvfp4
from dsv4.formats.numeric.operands import NVFP4_K_ALIGN, SF_ROWS, SF_TILE_BYTES
from dsv4.formats.numeric.zeros import nvfp4_is_zero
from dsv4.formats.store.extents import Sink
from dsv4.formats.store.specs import NVFP4_LAYOUT, ArraySpec, group_of


@dataclasses.dataclass(frozen=True)
class Nvfp4Output(Output):
    """One matrix in NVFP4: the source's own, or rounded at the optimal block scales."""

    tensor: SourceTensor

    @property
    def path(self) -> str:
        return group_of(self.tensor.name)

    @property
    def slabs(self) -> int:
        return nvfp4_slabs(*self._shape) if cut_by_columns(self.tensor.name) else 1

    @property
    def _shape(self) -> tuple[int, int]:
        rows, cols = self.tensor.shape
        return rows, cols

    def arrays(self) -> tuple[ArraySpec, ...]:
        rows, cols = self._shape
        units = 1 if cut_by_columns(self.tensor.name) else nvfp4_row_units(rows, cols)
        codes, scales = nvfp4_arrays(self.path, (), rows, cols, units, self.slabs)
        scale = ArraySpec(f"{self.path}/global_scale", (1,), "float32", (1,), (1,))
        return codes, scales, scale

    def units(self) -> tuple[Unit, ...]:
        targets = (Target.whole(file) for array in self.arrays() for file in array.files())
        return (Unit(self.path, self, (self.tensor,), tuple(targets)),)

    def produce(self, unit: Unit, source: Reader, sink: Sink) -> Result:
        codes_file, scales_file, scale_file = (target.file for target in unit.targets)
        if not self.rounded:
            whole = read_nvfp4(source, self.tensor)
            packed = pack_nvfp4([whole], slabs=self.slabs)
            sink.write(codes_file, [packed.codes])
            sink.write(scales_file, [packed.scales])
            sink.write(scale_file, [packed.global_scales])
            return Result((Outcome(zero=nvfp4_is_zero(whole)),))
        loss = Loss()
        rows = self._shape[0]
        for begin, values, part in round_tiles(source, self.tensor):
            loss.add(values, dequantize_nvfp4(part))
            packed = pack_nvfp4([part], slabs=self.slabs)
            write_slabs(sink, codes_file, packed.codes, begin, rows)
            write_slabs(sink, scales_file, packed.scales, begin // SF_ROWS, -(-rows // SF_ROWS))
        sink.write(scale_file, [part.global_scale.reshape(1)])
        exact = loss.errors == 0.0 and not loss.sign_flips
        return Result((Outcome(exact, zero=loss.amax == 0.0, loss=loss.to_dict()),))

    def attributes(self, results: Sequence[Result], files: FileIndex) -> dict[str, Any]:
        return {
            "format": "nvfp4",
            "layout": NVFP4_LAYOUT,
            "parameters": {"slabs": self.slabs, "interleave": 0},
            "shape": list(self.tensor.shape),
            **of_one(self.tensor, results),
            **({"loss": results[0].outcomes[0].loss} if self.rounded else {}),
            "sources": lineage(self.tensor, files),
        }

    def losses(self, results: Sequence[Result]) -> Losses:
        (outcome,) = results[0].outcomes
        return {} if outcome.loss is None else {self.tensor.name: outcome.loss}

    def peak_bytes(self) -> int:
        if not self.rounded:
            return 3 * self.tensor.nbytes
        return PEAK_BYTES

    @property
    def rounded(self) -> bool:
        return self.tensor.encoding is not Encoding.NVFP4


def nvfp4_arrays(
    path: str,
    stack: tuple[int, ...],
    rows: int,
    cols: int,
    row_units: int,
    slabs: int,
    shards: int = 1,
) -> tuple[ArraySpec, ArraySpec]:
    """The `codes` and tiled `scales` arrays of a matrix, or of a stack of them.

    `stack` is `()` or `(E,)`; either `row_units` or `slabs` is 1.
    """
    row_tiles = -(-rows // SF_ROWS)
    col_tiles = -(-cols // NVFP4_K_ALIGN)
    half = col_tiles * NVFP4_K_ALIGN // 2
    one = (1,) * len(stack)
    per_shard = tuple(size // shards for size in stack)
    codes_chunk = (rows // row_units, half // slabs)
    scales_chunk = (-(-row_tiles // row_units), col_tiles // slabs, SF_TILE_BYTES)
    if row_units == slabs == shards == 1 and not aligned(rows * half):
        # Nothing to cut: a small stack is one file and one chunk.
        one = stack
    codes = ArraySpec(
        f"{path}/codes",
        (*stack, rows, half),
        "e2m1x2",
        (*one, *codes_chunk),
        (*per_shard, rows, half),
    )
    tiles = (row_tiles, col_tiles, SF_TILE_BYTES)
    scales = ArraySpec(
        f"{path}/scales", (*stack, *tiles), "e4m3", (*one, *scales_chunk), (*per_shard, *tiles)
    )
    return codes, scales
