"""Activations to NVFP4: their largest magnitude, then codes and scales in tensor-core order.

`Amax` leaves maxima of parts of the activations; `Quantize` joins them, so that no counter and no
atomic is needed and any number of parts gives the same. A scale tile is 128 rows x 64 columns; four
lanes take the four blocks of rows g, g + 32, g + 64 and g + 96, whose 16 scales are neighbours. A
warp has 8 of the 32 such g, a CTA a whole tile. Grouped rows, of which a tile often has a few only,
are taken by a warp for a whole tile, 8 g at a time.
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, range_constexpr

from dsv4.kernels.device import vectors as transfer
from dsv4.kernels.device.ptx import byte_permute
from dsv4.kernels.ops.fp4_blackwell import groups, rounding
from dsv4.kernels.ops.fp4_blackwell.tiles import TILE_COLUMNS, TILE_ROWS, scale_offset

WARPS = 4
AMAX_THREADS = 256
VECTOR = 8  # bfloat16 in 16 bytes
UNROLL = 4
BLOCK = 16


class Amax:
    """Largest magnitudes of runs of the activations.

    x: bfloat16 `[T, K]`; amax: float32 `[P]`: of P runs of equal length, `[P] = [T]` for rows.
    NaN counts as the largest.
    """

    def __init__(self, k: int, pdl: bool) -> None:
        self.k, self.pdl = k, pdl

    @cute.jit
    def __call__(self, x: cute.Tensor, amax: cute.Tensor, stream: cuda.CUstream) -> None:
        self.kernel(x, amax).launch(
            grid=[amax.shape[0], 1, 1],
            block=[AMAX_THREADS, 1, 1],
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def kernel(self, x: cute.Tensor, amax: cute.Tensor) -> None:
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
            cute.arch.griddepcontrol_wait()
        thread, _, _ = cute.arch.thread_idx()
        part, _, _ = cute.arch.block_idx()
        vectors = Int32(x.shape[0]) * (self.k // VECTOR)
        per_part = (vectors + Int32(amax.shape[0]) - 1) // Int32(amax.shape[0])
        begin = part * per_part
        end = cutlass.min(begin + per_part, vectors)
        most = Uint32(0)
        for first in cutlass.range(begin + thread, end, AMAX_THREADS * UNROLL, unroll=1):
            words = []
            for turn in range_constexpr(UNROLL):
                at = first + turn * AMAX_THREADS
                words.extend(
                    transfer.load_b128_if(Int32(at < end), x.iterator + Int64(at) * VECTOR)
                )
            most = cutlass.max(most, rounding.magnitude_bits(words))
        smem = cutlass.memory.SmemAllocator()
        shared = smem.allocate_tensor(Uint32, cute.make_layout(AMAX_THREADS // 32), 16)
        joined = _largest(most, shared, thread, AMAX_THREADS)
        if thread == 0:
            amax[part] = joined.bitcast(Float32)


class Quantize:
    """Codes, tiled scales and the global scale.

    x: bfloat16 `[T, K]`; amax: float32 `[P]`, the maxima of its parts, with per_row of its rows;
    codes: uint8 `[T, K/2]`; scales: uint8 `[tiles, K/64, 512]`; global_scale: float32 `[1]`, with
    per_row `[T]`. A grid row a row tile: rows from `128 tile` on, or with groups those of a group.
    A value that is not finite makes the global scale NaN.
    """

    def __init__(self, k: int, per_row: bool, signed_zero: bool, pdl: bool) -> None:
        self.k, self.per_row, self.signed_zero, self.pdl = k, per_row, signed_zero, pdl
        self.groups = 0

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        amax: cute.Tensor,
        codes: cute.Tensor,
        scales: cute.Tensor,
        global_scale: cute.Tensor,
        stream: cuda.CUstream,
    ) -> None:
        self._launch(x, amax, None, codes, scales, global_scale, stream)

    @cute.jit
    def _launch(
        self,
        x: Any,
        amax: Any,
        offsets: Any,
        codes: Any,
        scales: Any,
        global_scale: Any,
        stream: Any,
    ) -> None:
        columns = self.k // TILE_COLUMNS
        self.kernel(x, amax, offsets, codes, scales, global_scale).launch(
            grid=[-(-columns // WARPS) if self.groups else columns, scales.shape[0], 1],
            block=[32 * WARPS, 1, 1],
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def kernel(
        self, x: Any, amax: Any, offsets: Any, codes: Any, scales: Any, global_scale: Any
    ) -> None:
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
            cute.arch.griddepcontrol_wait()
        thread, _, _ = cute.arch.thread_idx()
        column, tile, _ = cute.arch.block_idx()
        smem = cutlass.memory.SmemAllocator()
        maximum = Uint32(0)
        if cutlass.const_expr(not self.per_row):
            shared = smem.allocate_tensor(Uint32, cute.make_layout(WARPS), 16)
            for part in cutlass.range(thread, Int32(amax.shape[0]), 32 * WARPS, unroll=1):
                maximum = cutlass.max(maximum, amax[part].bitcast(Uint32))
            maximum = _largest(maximum, shared, thread, 32 * WARPS)
            first_thread = (column == 0) & (tile == 0) & (thread == 0)
            _store_if(first_thread, global_scale, Int32(0), _global_scale(maximum))
        buffers = (x, amax, codes, scales, global_scale)
        if cutlass.const_expr(self.groups):
            before = smem.allocate_tensor(Int32, cute.make_layout(self.groups + 1), 16)
            if cute.arch.warp_idx() == 0:
                groups.count_tiles(offsets, before, self.groups)
            cute.arch.sync_threads()
            column = column * WARPS + cute.arch.warp_idx()
            if (tile < before[self.groups]) & (column < self.k // TILE_COLUMNS):
                at = groups.rows_of(tile, offsets, before, self.groups)
                for turn in cutlass.range(4, unroll=1):
                    row = turn * 8 + cute.arch.lane_idx() // 4
                    self._rows(buffers, maximum, at.first, at.end, row, column, tile)
        else:
            first, end = tile * TILE_ROWS, Int32(x.shape[0])
            self._rows(buffers, maximum, first, end, thread // 4, column, tile)

    @cute.jit
    def _rows(
        self,
        buffers: Any,
        maximum: Uint32,
        first: Int32,
        end: Int32,
        row_in_tile: Int32,
        column: Int32,
        tile: Int32,
    ) -> None:
        """Quantise a block of four rows, `first + row_in_tile` and on in steps of 32."""
        x, amax, codes, scales, global_scale = buffers
        row, block = first + row_in_tile, cute.arch.lane_idx() % 4
        offset = column * TILE_COLUMNS + block * BLOCK
        loaded, maxima = [], []
        for i in range_constexpr(4):
            present = Int32(row + 32 * i < end)
            source = x.iterator + Int64(row + 32 * i) * self.k + offset
            halves = [transfer.load_b128_if(present, source + VECTOR * h) for h in range(2)]
            loaded.append([word for half in halves for word in half])
            own = maximum
            if cutlass.const_expr(self.per_row):
                own = amax[cutlass.min(row + 32 * i, end - 1)].bitcast(Uint32)
            maxima.append(own)
        word = Uint32(0)
        for i in range_constexpr(4):
            byte = Uint32(0)
            if row + 32 * i < end:
                g = _global_scale(maxima[i])
                target = codes.iterator + (Int64(row + 32 * i) * (self.k // 2) + offset // 2)
                byte = self._block(loaded[i], g, target)
                if cutlass.const_expr(self.per_row):
                    _store_if((column == 0) & (block == 0), global_scale, row + 32 * i, g)
            word |= byte << Uint32(8 * i)
        place = scale_offset(Int64(tile), column, self.k // TILE_COLUMNS)
        place += row_in_tile * 16 + block * 4
        transfer.store_b32(scales.iterator + place, _transposed(word, block))

    @cute.jit
    def _block(self, pairs: Any, g: Float32, target: Any) -> Uint32:
        """Write the codes of a block, 8 pairs of columns; -> its scale's byte."""
        amax = rounding.magnitude_bits(pairs).bitcast(Float32)
        byte, value = rounding.block_scale(amax, rounding.product(Float32(rounding.E2M1_MAX), g))
        divisor = rounding.product(value, g)
        numbers = []
        for pair in pairs:
            numbers += [pair << Uint32(16), pair & Uint32(0xFFFF0000)]
        low, high = Uint32(0), Uint32(0)
        least, most = rounding.PLAIN_DIVISOR
        if (divisor >= Float32(least)) & (divisor <= Float32(most)):
            inverse = rounding.reciprocal(divisor)
            q = [rounding.quotient_of(n.bitcast(Float32), divisor, inverse) for n in numbers]
            low = rounding.e2m1_word(q[:8], self.signed_zero)
            high = rounding.e2m1_word(q[8:], self.signed_zero)
        else:
            q = [rounding.quotient(n.bitcast(Float32), divisor) for n in numbers]
            q = [rounding.positive_zero(n) for n in q]
            low = rounding.e2m1_word(q[:8], self.signed_zero)
            high = rounding.e2m1_word(q[8:], self.signed_zero)
        transfer.store_b64(target, (low, high))
        return byte


class QuantizeGrouped(Quantize):
    """The same of rows sorted by group; each group's scales begin a new row tile.

    offsets: int32 `[G + 1]`, on the device. Tiles of `scales` beyond the last group's stay.
    """

    def __init__(self, k: int, per_row: bool, signed_zero: bool, groups: int, pdl: bool) -> None:
        super().__init__(k, per_row, signed_zero, pdl)
        self.groups = groups

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        amax: cute.Tensor,
        offsets: cute.Tensor,
        codes: cute.Tensor,
        scales: cute.Tensor,
        global_scale: cute.Tensor,
        stream: cuda.CUstream,
    ) -> None:
        self._launch(x, amax, offsets, codes, scales, global_scale, stream)


@cute.jit
def _largest(value: Uint32, shared: Any, thread: Int32, threads: cutlass.Constexpr[int]) -> Uint32:
    """The largest of a CTA's values. shared: a word for each warp."""
    in_warp = cute.arch.warp_redux_sync(value, "umax")
    if thread % 32 == 0:
        shared[thread // 32] = in_warp
    cute.arch.sync_threads()
    most = shared[0]
    for warp in range_constexpr(1, threads // 32):
        most = cutlass.max(most, shared[warp])
    return most


@cute.jit
def _global_scale(bits: Uint32) -> Float32:
    """g for the bits of the largest magnitude."""
    g = rounding.quotient(bits.bitcast(Float32), Float32(rounding.E2M1_MAX * rounding.E4M3_MAX))
    if bits == Uint32(0):
        g = Float32(1.0)
    if bits >= Uint32(rounding.INFINITY):
        g = Uint32(0x7FFFFFFF).bitcast(Float32)
    return g


@cute.jit
def _store_if(condition: Any, target: Any, at: Int32, value: Float32) -> None:
    if condition:
        target[at] = value


def _transposed(word: Uint32, lane: Int32) -> Uint32:
    """Byte i of lane j of four -> byte j of lane i."""
    odd = Uint32(lane % 2)
    other = cute.arch.shuffle_sync_bfly(word, 1)
    # Even lanes keep bytes 0 and 2 and take those of the odd one, which keeps 1 and 3.
    word = byte_permute(word, other, Uint32(0x6240) + odd * Uint32((0x3715 - 0x6240) % 2**32))
    high = Uint32(lane // 2)
    other = cute.arch.shuffle_sync_bfly(word, 2)
    return byte_permute(word, other, Uint32(0x5410) + high * Uint32((0x3276 - 0x5410) % 2**32))
