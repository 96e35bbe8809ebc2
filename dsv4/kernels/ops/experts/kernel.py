"""The experts of a layer for 1 to 8 tokens, in one launch: w13, SwiGLU, w2 and the sum.

Every expert is read once. Its weights are the A operand of the tensor cores and the tokens the
eight columns, whether they chose it or not: what nobody asked for is dropped (w13) or meets zeros
(w2). One CTA a multiprocessor stays for the whole launch. It works through units of w13, writes
the activations to memory, meets the other CTAs, and works through bands of w2, while its ring of
copies runs ahead through both (see `weight_stream`). The shared expert, if it is part of the
launch, comes first: its weights are asked for before the router has ended. Its 25 MB cost 7.2 us
here, so it has no launch of its own.

The grid barrier between w13 and w2 is not what costs: products of the same sizes in two launches of
small CTAs, with the shared expert's, take 45.8 us of an H200 for 41.7, before anybody has chosen
experts.

Activations lie in the order in which NVFP4's MMAs take them: of eight columns c, the pairs
(c, c+4) of c = 0..3, so that a lane reads 16 bytes for two MMAs.
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint32, range_constexpr

from dsv4.kernels.core.sizes import STEP_ROWS
from dsv4.kernels.device import arithmetic, conversions, global_memory, shared_memory
from dsv4.kernels.device.async_copies import PIECE_BYTES, wait
from dsv4.kernels.device.elementary import swiglu
from dsv4.kernels.device.global_memory import Load
from dsv4.kernels.device.grid_barrier import arrive_and_wait
from dsv4.kernels.device.mma import mma_bf16
from dsv4.kernels.device.weight_operands import MMAS, STEP, Fp8Operand, Nvfp4Operand
from dsv4.kernels.ops.experts import compact_topk, weight_stream
from dsv4.kernels.ops.experts.compact_topk import Chosen
from dsv4.kernels.ops.experts.reduce import Sums, exchange, item, total
from dsv4.kernels.ops.experts.weight_stream import (
    FP8_PIECES,
    PIECES,
    SCALE_AT,
    SLOT_BYTES,
    Shape,
    Shared,
    Stream,
)

GROUP = 8  # columns in 16 bytes
GROUPS = 4  # of a lane in a step
STEP_BYTES = GROUPS * 32 * 16  # activations of eight tokens
X_BATCH = 4  # loads of a thread that are under way together


class Experts:
    """Experts of one shape.

    limit: of SwiGLU, 0 for none. out: "float32" or "bfloat16". shared: with the shared expert, in
    FP8. warps: of a CTA. slots: of each warp's ring.
    """

    def __init__(
        self,
        hidden: int,
        inter: int,
        limit: float,
        out: str,
        shared: bool,
        warps: int,
        slots: int,
        pdl: bool,
    ) -> None:
        self.shape, self.limit = Shape(hidden, inter, warps, shared), limit
        self.out_dtype = {"float32": Float32, "bfloat16": BFloat16}[out]
        self.threads, self.slots, self.pdl = 32 * warps, slots, pdl
        self.nvfp4 = Nvfp4Operand(hidden, inter, 1)
        self.fp8 = Fp8Operand(hidden, inter, 1)

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        topk_idx: cute.Tensor,
        topk_weights: cute.Tensor,
        places: cute.Tensor,
        records: cute.Tensor,
        w13: Any,
        w2: Any,
        h: cute.Tensor,
        counters: cute.Tensor,
        y: cute.Tensor,
        ctas: Int32,
        stream: cuda.CUstream,
    ) -> None:
        """w13, w2: global scales of all experts; with a shared expert also codes and scales of its
        w1 and w3, or of its w2.
        """
        arguments = x, topk_idx, topk_weights, places, records, w13, w2, h, counters, y, ctas
        self.kernel(*arguments).launch(
            grid=[ctas, 1, 1], block=[self.threads, 1, 1], stream=stream, use_pdl=self.pdl
        )

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        topk_idx: cute.Tensor,
        topk_weights: cute.Tensor,
        places: cute.Tensor,
        records: cute.Tensor,
        w13: Any,
        w2: Any,
        h: cute.Tensor,
        counters: cute.Tensor,
        y: cute.Tensor,
        ctas: Int32,
    ) -> None:
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        cta, _, _ = cute.arch.block_idx()
        smem = cutlass.memory.SmemAllocator()
        most = compact_topk.most_choices(topk_idx.shape[1])
        table = Chosen(smem, most)
        scale = smem.allocate_tensor(Float32, cute.make_layout((most, 3)), 16)
        sums = Sums(smem, self.shape.warps)
        frags = smem.allocate(self.shape.hidden // STEP * STEP_BYTES, 128).toint()
        rings = smem.allocate(SLOT_BYTES * self.slots * self.shape.warps, 128).toint()
        own = rings + cute.arch.warp_idx() * (SLOT_BYTES * self.slots) + cute.arch.lane_idx() * 16
        first_record, shared = records.iterator.toint(), Shared.of(w13, w2)
        weights = Stream(self.shape, self.slots, first_record, shared, own, cta, ctas)
        weight_stream.start(weights)
        self._clear(frags)
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        compact_topk.choose(table, topk_idx, topk_weights, places, self.threads)
        weight_stream.go_on(weights, table.places, table.count[0])
        self._stage(x, frags)
        self._read_scales(w13[0], w2[0], table, scale)
        cute.arch.sync_threads()
        if cutlass.const_expr(self.shape.shared):
            first, end, stride = weights.shared_units()
            for unit in cutlass.range(first, end, stride, unroll=1):
                acc = self._shared_unit(weights, frags)
                self._activate_shared(acc, unit, Int32(x.shape[0]), sums, h)
        first, end, stride = weights.units()
        for unit in cutlass.range(first, end, stride, unroll=1):
            acc = self._unit(weights, frags)
            self._activate(acc, unit, table, scale, sums, h)
        arrive_and_wait(counters, ctas)
        first, end, stride = weights.bands()
        for band in cutlass.range(first, end, stride, unroll=1):
            acc = self._band(weights, table, scale, h, Int32(y.shape[0]))
            self._write(acc, band, sums, y)

    @cute.jit
    def _clear(self, frags: Int32) -> None:
        """Columns of tokens that are not there stay zero."""
        thread, _, _ = cute.arch.thread_idx()
        for turn in range_constexpr(self.shape.hidden // STEP * STEP_BYTES // (16 * self.threads)):
            zero = Uint32(0)
            shared_memory.store_words(
                frags + thread * 16, (zero, zero, zero, zero), turn * 16 * self.threads
            )

    @cute.jit
    def _read_scales(
        self, scale13: cute.Tensor, scale2: cute.Tensor, table: Any, scale: Any
    ) -> None:
        """Global scales of the chosen experts, with the operand's factor."""
        thread, _, _ = cute.arch.thread_idx()
        if thread < table.count[0]:
            expert = table.experts[thread]
            factor = Float32(self.nvfp4.factor)
            scale[thread, 0] = scale13[expert, 0] * factor
            scale[thread, 1] = scale13[expert, 1] * factor
            scale[thread, 2] = scale2[expert, 0] * factor

    @cute.jit
    def _stage(self, x: cute.Tensor, frags: Int32) -> None:
        """Activations into shared memory, in their order."""
        thread, _, _ = cute.arch.thread_idx()
        per_row = self.shape.hidden // GROUP
        groups = Int32(x.shape[0]) * per_row
        source = x.iterator.toint()
        for first in cutlass.range(0, groups, X_BATCH * self.threads, unroll=1):
            loaded = []
            for turn in range_constexpr(X_BATCH):
                group = first + turn * self.threads + thread
                address = source + Int64(group) * 16
                loaded.append(global_memory.load_words_if(Int32(group < groups), address))
            for turn in range_constexpr(X_BATCH):
                group = first + turn * self.threads + thread
                w = loaded[turn]
                token, place = group // per_row, group % per_row
                step, t, part = place // 16, place % 16 // 4, place % 4
                if group < groups:
                    at = frags + ((step * GROUPS + part) * 32 + token * 4 + t) * 16
                    low = [arithmetic.byte_permute(w[i], w[i + 2], 0x5410) for i in range(2)]
                    high = [arithmetic.byte_permute(w[i], w[i + 2], 0x7632) for i in range(2)]
                    shared_memory.store_words(at, (low[0], high[0], low[1], high[1]))

    @cute.jit
    def _unit(self, weights: Any, frags: Int32) -> Any:
        """-> this warp's part of the sums of 64 rows of w13: 16 a lane."""
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        acc = cute.make_rmem_tensor(16, Float32)
        acc.fill(0.0)
        for step in cutlass.range(self.shape.steps13, unroll=1):
            wait(self.slots - 2)
            slots = weight_stream.take(weights), weight_stream.take(weights)
            at = frags + (warp * self.shape.steps13 + step) * STEP_BYTES + lane * 16
            x: list[Any] = []
            for part in range_constexpr(GROUPS):
                x.extend(shared_memory.load_words(at, 4, part * 32 * 16))
            bands = [_read(slot, PIECES) for slot in slots]
            for slot in slots:
                weight_stream.refill(weights, slot, "units")
            self._multiply(acc, bands[:1], x)
            self._multiply(acc, bands[1:], x, 8)
        return acc

    def _multiply(self, acc: Any, bands: Any, x: Any, first: int = 0) -> None:
        """128 columns of bands of 32 rows into `acc`: two tiles of 16 rows each, eight MMAs deep.

        The tiles take turns: an MMA waits long for the one before it in its chain.
        """
        lane = cute.arch.lane_idx()
        prepared = [self.nvfp4.prepare(words, lane % 4) for words in bands]
        tiles = [(band, half) for band in range(len(bands)) for half in range(2)]
        sums = [tuple(acc[first + 4 * i + c] for c in range(4)) for i in range(len(tiles))]
        order = [(i, mma) for mma in range(MMAS) for i in range(len(tiles))]
        for i, mma in order:
            band, half = tiles[i]
            a = self.nvfp4.a(bands[band], prepared[band], half, mma)
            sums[i] = mma_bf16(sums[i], a, (x[2 * mma], x[2 * mma + 1]))
        for i in range(len(tiles)):
            for c in range(4):
                acc[first + 4 * i + c] = sums[i][c]

    @cute.jit
    def _shared_unit(self, weights: Any, frags: Int32) -> Any:
        """-> this warp's part of the sums of 8 gate and 8 up rows: 4 a lane."""
        warp = cute.arch.warp_idx()
        acc = cute.make_rmem_tensor(4, Float32)
        acc.fill(0.0)
        place = _fp8_place(32 * 16) + cute.arch.lane_idx() // 4 * 64
        for turn in cutlass.range(self.shape.steps13, unroll=1):
            wait(self.slots - 1)
            slot = weight_stream.take(weights)
            step = warp * self.shape.steps13 + turn
            x: list[Any] = []
            for piece in range_constexpr(GROUPS):
                at = frags + step * STEP_BYTES + place
                x.extend(shared_memory.load_words(at, 4, piece % 2 * 32 * 16 + piece // 2 * 32))
            words, scales = _read(slot, FP8_PIECES), shared_memory.load_words(slot, 4, SCALE_AT)
            weight_stream.refill(weights, slot)
            self._multiply_fp8(acc, 0, words, x, (_scale(scales[0], step), _scale(scales[1], step)))
        return acc

    @cute.jit
    def _multiply_fp8(self, acc: Any, first: int, words: Any, x: Any, scales: Any) -> None:
        """128 columns of 16 rows into `acc[first:]`; scales: of the first eight and the others."""
        sums = tuple(Float32(0.0) for _ in range(4))
        for mma in range_constexpr(MMAS):
            piece, odd = mma // 4 * 2 + mma % 4 // 2, mma % 2
            half = 0x7632 if odd else 0x5410  # of four columns, i and i + 2 go together
            w = x[4 * piece : 4 * piece + 4]
            b = arithmetic.byte_permute(w[0], w[2], half), arithmetic.byte_permute(w[1], w[3], half)
            sums = mma_bf16(sums, self.fp8.a(words, None, 0, mma), b)
        for c in range_constexpr(4):
            acc[first + c] += sums[c] * scales[c // 2]

    @cute.jit
    def _activate(
        self, acc: Any, unit: Int32, table: Any, scale: Any, sums: Any, h: cute.Tensor
    ) -> None:
        """Sum over the warps, in their order; SwiGLU, times the routing weight; into `h`."""
        exchange(sums, acc, 16)
        eight, c, g, token = item()
        if cute.arch.warp_idx() < 8:
            gate, up = total(sums, c), total(sums, 8 + c)
            expert, place = unit // self.shape.units, unit % self.shape.units
            entry = table.entry[expert * STEP_ROWS + token]
            if entry >= 0:
                value = swiglu(gate * scale[expert, 0], up * scale[expert, 1], self.limit)
                group = place // 2 * GROUP + place % 2 + 2 * eight
                h[entry, _column(group, g)] = (value * table.weights[entry]).to(BFloat16)

    @cute.jit
    def _activate_shared(
        self, acc: Any, unit: Int32, rows: Int32, sums: Any, h: cute.Tensor
    ) -> None:
        """The same for the shared expert, whose weight is 1: into the last rows of `h`."""
        exchange(sums, acc, 4)
        warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
        token = lane % 4 * 2 + warp
        if (warp < 2) & (token < rows):
            gate, up = total(sums, warp), total(sums, 2 + warp)
            entry = Int32(h.shape[0]) - rows + token
            h[entry, _column(unit, lane // 4)] = swiglu(gate, up, self.limit).to(BFloat16)

    @cute.jit
    def _band(self, weights: Any, table: Any, scale: Any, h: cute.Tensor, rows: Int32) -> Any:
        """-> this warp's part of the sums of 32 rows of w2 over all experts: 8 a lane."""
        band, acc = cute.make_rmem_tensor(8, Float32), cute.make_rmem_tensor(8, Float32)
        band.fill(0.0)
        words = self.shape.steps2 * 16
        x, ahead = (cute.make_rmem_tensor(words, Uint32) for _ in range(2))
        if cutlass.const_expr(self.shape.shared):
            self._shared_band(band, x, weights, h, rows)
        self._activations(x, Int32(0), weights.count, table, h)
        for expert in cutlass.range(weights.count, unroll=1):
            self._activations(ahead, expert + 1, weights.count, table, h)
            acc.fill(0.0)
            for step in range_constexpr(self.shape.steps2):
                wait(self.slots - 1)
                slot = weight_stream.take(weights)
                read = _read(slot, PIECES)
                weight_stream.refill(weights, slot, "bands")
                self._multiply(acc, [read], [x[16 * step + i] for i in range(16)])
            for c in range_constexpr(8):
                band[c] += acc[c] * scale[expert, 2]
            for word in range_constexpr(words):
                x[word] = ahead[word]
        return band

    @cute.jit
    def _shared_band(self, band: Any, x: Any, weights: Any, h: cute.Tensor, rows: Int32) -> None:
        """The shared expert's part of `band`. x: for the activations."""
        warp, token = cute.arch.warp_idx(), cute.arch.lane_idx() // 4
        steps = self.shape.steps2
        entry = Int32(h.shape[0]) - rows + token
        at = Int64(entry) * (self.shape.inter * 2) + warp * (steps * GROUPS * 64) + _fp8_place(64)
        for piece in range_constexpr(steps * GROUPS):
            offset = piece // GROUPS * GROUPS * 64 + piece % 2 * 64 + piece % GROUPS // 2 * 32
            words = global_memory.load_words_if(
                Int32(token < rows), h.iterator.toint() + at, Load.FRESH, offset
            )
            for i in range_constexpr(4):
                x[4 * piece + i] = words[i]
        for step in range_constexpr(steps):
            for half in range_constexpr(2):
                wait(self.slots - 1)
                slot = weight_stream.take(weights)
                read = _read(slot, FP8_PIECES)
                scale = _scale(shared_memory.load_words(slot, 4, SCALE_AT)[0], warp * steps + step)
                weight_stream.refill(weights, slot, "bands")
                own = [x[16 * step + i] for i in range(16)]
                self._multiply_fp8(band, 4 * half, read, own, (scale, scale))

    @cute.jit
    def _activations(self, x: Any, expert: Int32, count: Int32, table: Any, h: cute.Tensor) -> None:
        """This lane's activations for the warp's slab; zeros for who did not choose the expert."""
        warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
        entry = Int32(-1)
        if expert < count:
            entry = table.entry[expert * STEP_ROWS + lane // 4]
        pieces = self.shape.steps2 * GROUPS
        at = Int64(entry) * (self.shape.inter * 2) + (warp * pieces * 4 + lane % 4) * 16
        address = h.iterator.toint() + at
        for piece in range_constexpr(pieces):
            words = global_memory.load_words_if(Int32(entry >= 0), address, Load.FRESH, piece * 64)
            for i in range_constexpr(4):
                x[4 * piece + i] = words[i]

    @cute.jit
    def _write(self, acc: Any, band: Int32, sums: Any, y: cute.Tensor) -> None:
        """Sum over the warps, in their order, and write."""
        exchange(sums, acc, 8)
        eight, c, g, token = item()
        if cute.arch.warp_idx() < 8:
            value = total(sums, c)
            if token < Int32(y.shape[0]):
                y[token, band // 4 * 128 + band % 4 * 8 + 32 * eight + g] = value.to(self.out_dtype)


def _read(slot: Int32, pieces: int) -> list[Any]:
    """A slot's words of this lane."""
    words: list[Any] = []
    for piece in range(pieces):
        words.extend(shared_memory.load_words(slot, 4, piece * PIECE_BYTES))
    return words


@cute.jit
def _column(group: Int32, i: Int32) -> Int32:
    """Where column `i` of a group of eight lies in a row of `h`."""
    step, t, part = group // 16, group % 16 // 4, group % 4
    within = 2 * i if i < 4 else 2 * i - 7
    return ((step * GROUPS + part) * 4 + t) * GROUP + within


@cute.jit
def _fp8_place(part_bytes: int) -> Int32:
    """Of a step's activations, where the first of the lane's pieces for FP8 begins.

    FP8's lane t has the groups 2t, 2t+1, 2t+8 and 2t+9 of eight columns; group n lies in part n % 4
    at lane n / 4 of NVFP4.
    """
    t = cute.arch.lane_idx() % 4
    return t % 2 * 2 * part_bytes + t // 2 * 16


def _scale(word: Uint32, step: Int32) -> Float32:
    """The E8M0 scale of a step, from the aligned word that it lies in."""
    return conversions.e8m0_to_f32((word >> Uint32(step % 4 * 8)) & Uint32(0xFF))
