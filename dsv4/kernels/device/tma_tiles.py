"""Tiles of a matrix, copied by Hopper's copy unit (TMA) into stages of shared memory.

A tile is `rows` rows of some runs of columns, each run apart: `[run][row][columns of a run]`. Rows
outside the matrix come as zeros. With a swizzle, a run is a tile
as warpgroups multiply it (warpgroup/layout.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync, warpgroup


class Tile(NamedTuple):
    """Its shape, in elements of `dtype`."""

    rows: int
    columns: int
    runs: int
    dtype: Any
    swizzled: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """As tensors have it."""
        return self.rows, self.columns, self.runs

    @property
    def nbytes(self) -> int:
        """Of one tile."""
        return self.rows * self.columns * self.runs * self.dtype.width // 8

    def layout(self, stages: int, stage_bytes: int) -> Any:
        """Of the tiles of all stages."""
        stride = (self.columns, 1, self.rows * self.columns, stage_bytes * 8 // self.dtype.width)
        plain = cute.make_layout((*self.shape, stages), stride=stride)
        if not self.swizzled:
            return plain
        kind = warpgroup.SmemLayoutAtomKind.K_SW128
        swizzle = warpgroup.make_smem_layout_atom(kind, self.dtype).inner
        return cute.make_composed_layout(swizzle, 0, plain)

    def source(self, matrix: Any, rows: Any, pitch: int) -> Any:
        """-> (atom, tensor) to copy from a matrix `[rows, pitch]`, for use in a kernel."""
        runs = pitch // self.columns
        layout = cute.make_layout((rows, self.columns, runs), stride=(pitch, 1, self.columns))
        one = cute.slice_(self.layout(1, self.nbytes), (None, None, None, 0))
        atom, tensor, *_ = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(),
            cute.make_tensor(matrix.iterator, layout),
            one,
            self.shape,
        )
        return atom, tensor

    def stages(self, ring: Any, offset: int, stages: int, stage_bytes: int) -> Any:
        """The tiles in shared memory, `offset` bytes into each stage."""
        layout = self.layout(stages, stage_bytes)
        if not self.swizzled:
            return cute.make_tensor(cute.recast_ptr(ring + offset, dtype=self.dtype), layout)
        pointer = cute.recast_ptr(ring + offset, layout.inner, dtype=self.dtype)
        return cute.make_tensor(pointer, layout.outer)


@cute.jit
def copy_tile(
    source: Any,
    target: Any,
    stage: Int32,
    row: Int32,
    run: Int32,
    barrier: Any,
    shape: cutlass.Constexpr[tuple[int, int, int]],
) -> None:
    """A warp begins to copy the tile at (row, run), which then counts at `barrier`."""
    atom, tensor = source
    tile = cute.local_tile(cute.domain_offset((row, 0, run), tensor), shape, (0, 0, 0))
    to, of = cpasync.tma_partition(
        atom,
        0,
        cute.make_layout(1),
        cute.group_modes(target, 0, 3),
        cute.group_modes(tile, 0, 3),
    )
    cute.copy(atom, of, to[None, stage], tma_bar_ptr=barrier)
