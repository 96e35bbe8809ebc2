"""Products of NVFP4 activations with NVFP4 weights, dense and by group of tokens.

A persistent grid takes tiles in turn. Row tiles of one column tile follow each other, so that
the weight they share is read once. Grouped tokens are sorted; how many tiles there are is found on
the device from `offsets`, see `groups`.
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from dsv4.kernels.ops.fp4_blackwell import groups, ptx
from dsv4.kernels.ops.fp4_blackwell.epilogue import STAGING_BYTES, Epilogue
from dsv4.kernels.ops.fp4_blackwell.mainloop import (
    COPY_WARP,
    MMA_WARP,
    TENSOR_MEMORY_COLUMNS,
    THREADS,
    Mainloop,
    Maps,
    Place,
)
from dsv4.kernels.ops.fp4_blackwell.tiles import TILE_ROWS, group_tile, output_tile, row_tiles


class Fp4Gemm:
    """`y = alpha x wᵀ`, alpha the product of both global scales.

    x: codes uint8 `[T, K/2]`, scales uint8 `[tiles, K/64, 512]`, global scale float32 `[1]` or,
    with per_row, `[T]`. w: codes uint8 `[S, N, Ks/2]`, scales uint8 `[S, N/128, Ks/64, 512]`,
    global scales float32 `[1]`. y: float32 or bfloat16 `[T, N]`.
    """

    def __init__(
        self,
        n: int,
        k: int,
        slabs: int,
        out: str,
        per_row: bool,
        tile_n: int,
        ctas: int,
        pdl: bool,
        groups: int = 0,
        swiglu: bool = False,
        limit: float = 0.0,
    ) -> None:
        self.loop = Mainloop(n, k, slabs, max(groups, 1), tile_n, STAGING_BYTES)
        self.epilogue = Epilogue(n, tile_n, out, swiglu, limit)
        self.per_row, self.ctas, self.pdl = per_row, ctas, pdl
        self.groups, self.swiglu = groups, swiglu

    @cute.jit
    def __call__(self, x: Any, w: Any, y: cute.Tensor, stream: cuda.CUstream) -> None:
        self._launch(x, w, None, None, y, stream)

    @cute.jit
    def _launch(self, x: Any, w: Any, offsets: Any, weights: Any, y: Any, stream: Any) -> None:
        maps = self.loop.maps(x[0], w[0])
        self.kernel(*maps, x[1], x[2], w[1], w[2], offsets, weights, y).launch(
            grid=[self.ctas, 1, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=self.pdl
        )

    @cute.kernel
    def kernel(
        self,
        a_atom: cute.CopyAtom,
        a: cute.Tensor,
        b_atom: cute.CopyAtom,
        b: cute.Tensor,
        x_scales: Any,
        x_global: Any,
        scales: Any,
        global_scales: Any,
        offsets: Any,
        weights: Any,
        y: Any,
    ) -> None:
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        smem = cutlass.memory.SmemAllocator()
        own = self.loop.allocate(smem)
        staging = smem.allocate(STAGING_BYTES, 128).toint()
        holder = smem.allocate(Int32, 4)
        before: Any = None
        if cutlass.const_expr(self.groups):
            before = smem.allocate_tensor(Int32, cute.make_layout(self.groups + 1), 16)
        if warp == MMA_WARP:
            cute.arch.alloc_tmem(TENSOR_MEMORY_COLUMNS, holder)
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        if cutlass.const_expr(self.groups):
            self._count(warp, offsets, before)
        ptx.before_thread_sync()
        cute.arch.sync_threads()
        ptx.after_thread_sync()
        memory = cute.arch.retrieve_tmem_ptr(Float32, 16, holder)
        tiles_m = row_tiles(Int32(y.shape[0]))
        if cutlass.const_expr(self.groups):
            tiles_m = before[self.groups]
        tiles = tiles_m * self.loop.tiles_n
        search = (offsets, before, tiles_m, Int32(y.shape[0]))
        if warp == COPY_WARP:
            self._copy(Maps(a_atom, a, b_atom, b), x_scales, scales, own, search, tiles)
        elif warp == MMA_WARP:
            self._multiply(own, memory, tiles)
        else:
            factors = (x_global, global_scales, weights)
            self._store(own, memory, staging, search, tiles, factors, y)
        ptx.before_thread_sync()
        cute.arch.sync_threads()
        ptx.after_thread_sync()
        if warp == MMA_WARP:
            cute.arch.relinquish_tmem_alloc_permit()
            cute.arch.dealloc_tmem(memory, TENSOR_MEMORY_COLUMNS)

    @cute.jit
    def _count(self, warp: Int32, offsets: Any, before: Any) -> None:
        if warp == COPY_WARP:
            groups.count_tiles(offsets, before, self.groups)

    def _place(self, tile: Int32, search: Any) -> Place:
        """Where a tile lies."""
        offsets, before, tiles_m, rows = search
        if not self.groups:
            row_tile, column_tile = output_tile(tile, tiles_m)
            return Place(Int32(0), row_tile * TILE_ROWS, rows, row_tile, column_tile)
        group = groups.group_of(tile // self.loop.tiles_n, before, self.groups)
        first = before[group]
        own_tiles = before[group + 1] - first
        row_tile, column_tile = group_tile(tile, first, own_tiles, self.loop.tiles_n)
        first_row = offsets[group] + row_tile * TILE_ROWS
        return Place(group, first_row, offsets[group + 1], first + row_tile, column_tile)

    @cute.jit
    def _copy(
        self, maps: Any, x_scales: Any, scales: Any, own: Any, search: Any, tiles: Int32
    ) -> None:
        first, _, _ = cute.arch.block_idx()
        done = Int32(0)
        for tile in cutlass.range(first, tiles, self.ctas, unroll=1):
            place = self._place(tile, search)
            done = self.loop.copy(maps, x_scales, scales, own, place, done)

    @cute.jit
    def _multiply(self, own: Any, memory: Any, tiles: Int32) -> None:
        first, _, _ = cute.arch.block_idx()
        done, turn = Int32(0), Int32(0)
        for _tile in cutlass.range(first, tiles, self.ctas, unroll=1):
            done = self.loop.multiply(own, memory, done, turn)
            turn += 1

    @cute.jit
    def _store(
        self,
        own: Any,
        memory: Any,
        staging: Any,
        search: Any,
        tiles: Int32,
        factors: Any,
        y: Any,
    ) -> None:
        thread, _, _ = cute.arch.thread_idx()
        first, _, _ = cute.arch.block_idx()
        x_global, global_scales, weights = factors
        turn = Int32(0)
        for tile in cutlass.range(first, tiles, self.ctas, unroll=1):
            place = self._place(tile, search)
            which, turns = turn % self.loop.accumulators, turn // self.loop.accumulators
            row = cutlass.min(place.first_row + thread, place.end_row - 1)
            g = x_global[row] if cutlass.const_expr(self.per_row) else x_global[0]
            weight = weights[row] if cutlass.const_expr(self.swiglu) else None
            both = []
            for i in cutlass.range_constexpr(2 if self.swiglu else 1):
                if cutlass.const_expr(self.groups):
                    both.append(g * global_scales[place.layer, i])
                else:
                    both.append(g * global_scales[i])
            cute.arch.mbarrier_wait(own.acc_full + which, turns & 1)
            ptx.after_thread_sync()
            acc = memory + which * self.loop.tile_n
            release = own.acc_empty + which
            self.epilogue.store(acc, y, place, both, weight, staging, release)
            turn += 1


class Fp4GemmGrouped(Fp4Gemm):
    """Tokens sorted by group, each with a weight of its own: w has `[G, …]` of everything.

    offsets: int32 `[G + 1]`, on the device; scales of x as `QuantizeGrouped` lays them out.
    """

    @cute.jit
    def __call__(
        self, x: Any, w: Any, offsets: cute.Tensor, y: cute.Tensor, stream: cuda.CUstream
    ) -> None:
        self._launch(x, w, offsets, None, y, stream)


class Fp4SwigluGrouped(Fp4Gemm):
    """The same of gate and up in one weight, rows alternating in runs of 8, and SwiGLU of both.

    w: global scales float32 `[G, 2]`; weights: float32 `[T]`, factors of the rows;
    y: bfloat16 `[T, N/2]`.
    """

    @cute.jit
    def __call__(
        self,
        x: Any,
        w: Any,
        offsets: cute.Tensor,
        weights: cute.Tensor,
        y: cute.Tensor,
        stream: cuda.CUstream,
    ) -> None:
        self._launch(x, w, offsets, weights, y, stream)
