"""From sums in tensor memory to rows of the result.

A thread has a row of the tile, its warp 32 of them. 128 bytes of each are gathered in shared memory
and leave it as whole lines. With SwiGLU, runs of 8 columns are gate and up alternately:

    weight * silu(min(gate, limit)) * clamp(up, -limit, limit)
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32, range_constexpr
from cutlass.cute.nvgpu import tcgen05

from dsv4.kernels.device import ring, vectors
from dsv4.kernels.ops.fp4_blackwell import ptx
from dsv4.kernels.ops.fp4_blackwell.mainloop import EPILOGUE_WARPS
from dsv4.kernels.ops.fp4_blackwell.tiles import TILE_ROWS

LINE = 128  # bytes
PITCH = LINE + 16  # in shared memory: neighbouring rows start at different banks
STAGING_BYTES = EPILOGUE_WARPS * 32 * PITCH
COLUMNS = 32  # taken out at once
RUN = 8


class Epilogue:
    """n: columns of the product. out: "float32" or "bfloat16". swiglu: halves the columns.

    limit: the clamp of gate and up, 0 for none.
    """

    def __init__(self, n: int, tile_n: int, out: str, swiglu: bool, limit: float) -> None:
        self.n, self.tile_n, self.swiglu, self.limit = n, tile_n, swiglu, limit
        self.item = {"float32": 4, "bfloat16": 2}[out]
        self.columns = n // 2 if swiglu else n  # of the result
        per_load = COLUMNS // 2 if swiglu else COLUMNS
        self.loads = LINE // (per_load * self.item)  # that fill a line
        self.lines = tile_n // (COLUMNS * self.loads)
        if self.columns % (16 // self.item) or tile_n % (COLUMNS * self.loads):
            raise ValueError(f"{self.columns} columns of {out} do not fill 16 bytes")

    @cute.jit
    def store(
        self, acc: Any, y: Any, place: Any, scales: Any, weight: Any, staging: Any, release: Any
    ) -> None:
        """Write a tile. acc: tensor memory; scales: factors of the one or two projections for
        the thread's row; weight: of the row; release: a barrier, once the sums are taken.
        """
        thread, _, _ = cute.arch.thread_idx()
        warp, lane = thread // 32, thread % 32
        own = staging + warp * (32 * PITCH)
        for line in range_constexpr(self.lines):
            for load in range_constexpr(self.loads):
                taken = line * self.loads + load
                sums = _take(acc + taken * COLUMNS, thread)
                if cutlass.const_expr(taken == self.lines * self.loads - 1):
                    ptx.before_thread_sync()
                    cute.arch.mbarrier_arrive(release)
                words = self._words(sums, scales, weight)
                slot = own + lane * PITCH + load * (LINE // self.loads)
                for i in range_constexpr(len(words) // 4):
                    vectors.store_shared_b128(slot + 16 * i, words[4 * i : 4 * i + 4])
            cute.arch.sync_warp()
            first = place.first_row + warp * 32
            self._write_line(y, own, first, place.end_row, place.column_tile, line, lane)
            cute.arch.sync_warp()

    def _words(self, sums: Any, scales: Any, weight: Any) -> list[Uint32]:
        """32 sums -> the result's bytes."""
        if self.swiglu:
            values = [
                self._swiglu(sums[2 * RUN * pair + i], sums[2 * RUN * pair + RUN + i], scales)
                * weight
                for pair in range(COLUMNS // (2 * RUN))
                for i in range(RUN)
            ]
        else:
            values = [sums[i] * scales[0] for i in range(COLUMNS)]
        if self.item == 4:
            return [value.bitcast(Uint32) for value in values]
        return [ptx.bf16_pair(values[i], values[i + 1]) for i in range(0, len(values), 2)]

    def _swiglu(self, gate: Float32, up: Float32, scales: Any) -> Float32:
        gate, up = gate * scales[0], up * scales[1]
        if self.limit:
            gate = cutlass.min(gate, Float32(self.limit))
            up = cutlass.min(cutlass.max(up, Float32(-self.limit)), Float32(self.limit))
        return gate / (Float32(1.0) + cute.math.exp(Float32(0.0) - gate)) * up

    @cute.jit
    def _write_line(
        self,
        y: Any,
        own: Int32,
        first_row: Int32,
        end_row: Int32,
        column_tile: Int32,
        line: cutlass.Constexpr[int],
        lane: Int32,
    ) -> None:
        """32 rows' line: eight lanes a row, 16 bytes each."""
        target = cute.recast_ptr(y.iterator, dtype=Uint8)
        per_tile = self.lines * LINE // self.item
        column = column_tile * per_tile + line * (LINE // self.item) + lane % 8 * (16 // self.item)
        for turn in range_constexpr(8):
            row = turn * 4 + lane // 8
            if (first_row + row < end_row) & (column < self.columns):
                words = ring.read(own + row * PITCH + lane % 8 * 16)
                offset = (Int64(first_row + row) * self.columns + column) * self.item
                vectors.store_b128(target + offset, words)


def _take(place: Any, thread: Int32) -> Any:
    """32 columns of the thread's row of tensor memory."""
    acc = cute.make_tensor(place, cute.make_layout((TILE_ROWS, COLUMNS), stride=(1 << 16, 1)))
    atom = cute.make_copy_atom(
        tcgen05.Ld32x32bOp(tcgen05.Repetition.x32, tcgen05.Pack.NONE), Float32
    )
    copy = tcgen05.make_tmem_copy(atom, acc)
    part = copy.get_slice(thread)
    shape = part.partition_D(cute.make_identity_tensor((TILE_ROWS, COLUMNS))).shape
    sums = cute.make_rmem_tensor(shape, Float32)
    cute.copy(copy, part.partition_S(acc), sums)
    cute.arch.fence_view_async_tmem_load()
    return sums
