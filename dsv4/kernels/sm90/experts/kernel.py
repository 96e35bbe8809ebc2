"""The experts of a layer for 1 to 8 tokens, in one launch: w13, SwiGLU, w2 and the sum.

Every expert is read once. Its weights are the A operand of the tensor cores and the tokens the
eight columns, whether they chose it or not: what nobody asked for is dropped (w13) or meets zeros
(w2). One CTA a multiprocessor stays for the whole launch. It works through units of w13, writes
the activations to memory, counts the units that are done, and works through bands of w2, expert
after expert as they become complete, while its ring of copies runs ahead through both (see
`sequence`). The shared expert, if it is part of the launch, comes first: its weights are asked for
before the router has ended.

The code is small, with few places that ask for weights: in a model's step it is never in the
instruction cache.
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from dsv4.kernels.sm90 import ptx
from dsv4.kernels.sm90.experts import chosen, raw, ready, sequence, sums, tiles
from dsv4.kernels.sm90.experts.chosen import MAX_ROWS, Chosen
from dsv4.kernels.sm90.experts.nibbles import NibbleOperand
from dsv4.kernels.sm90.experts.sequence import (
    DOWN,
    EVERY,
    FP8_PIECES,
    PIECES,
    SCALE_AT,
    SLOT_BYTES,
    UP,
    Shape,
    Stream,
)
from dsv4.kernels.sm90.experts.sums import BAND, Sums
from dsv4.kernels.sm90.experts.tiles import GROUPS, STEP_BYTES
from dsv4.kernels.sm90.operands import STEP, Fp8Operand
from dsv4.kernels.sm90.ring import wait

LOG2_E = 1.4426950408889634


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
        self.nvfp4 = NibbleOperand(hidden, inter, 1)
        self.fp8 = Fp8Operand(hidden, inter, 1)

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        topk_idx: cute.Tensor,
        topk_weights: cute.Tensor,
        w13: Any,
        w2: Any,
        h: cute.Tensor,
        counters: cute.Tensor,
        y: cute.Tensor,
        ctas: Int32,
        stream: cuda.CUstream,
    ) -> None:
        """w13, w2: codes, scales and global scale of the stack; with a shared expert also codes
        and scales of its w1 and w3, or of its w2.
        """
        self.kernel(x, topk_idx, topk_weights, w13, w2, h, counters, y, ctas).launch(
            grid=[ctas, 1, 1], block=[self.threads, 1, 1], stream=stream, use_pdl=self.pdl
        )

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        topk_idx: cute.Tensor,
        topk_weights: cute.Tensor,
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
        table, parts = Chosen(smem), Sums(smem, self.shape.warps)
        scale = smem.allocate_tensor(Float32, cute.make_layout((chosen.MAX_CHOICES, 3)), 16)
        frags = smem.allocate(self.shape.hidden // STEP * STEP_BYTES, 128).toint()
        rings = smem.allocate(SLOT_BYTES * self.slots * self.shape.warps, 128).toint()
        own = rings + cute.arch.warp_idx() * (SLOT_BYTES * self.slots) + cute.arch.lane_idx() * 16
        bases = [[a.iterator.toint() for a in (*w[:2], *w[3:])] for w in (w13, w2)]
        weights = Stream(self.shape, self.slots, bases[0], bases[1], own, cta, ctas)
        sequence.start(weights)
        if const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        tiles.fetch(x, frags, self.threads)
        chosen.choose(table, topk_idx, topk_weights, Int32(w13[0].shape[0]), self.threads)
        sequence.go_on(weights, table.experts, table.count[0])
        wait(self.slots - weights.early)
        tiles.arrange(x, frags, self.threads)
        self._read_scales(w13[2], w2[2], table, scale)
        cute.arch.sync_threads()
        if const_expr(self.shape.shared):
            first, end, stride = weights.shared_units()
            for unit in cutlass.range(first, end, stride, unroll=1):
                self._shared_unit(weights, frags, parts)
                self._activate_shared(unit, Int32(x.shape[0]), parts, h, counters)
        first, end, stride = weights.units()
        for unit in cutlass.range(first, end, stride, unroll=1):
            self._unit(weights, frags, parts)
            self._activate(unit, table, scale, parts, h, counters)
        known = cute.make_rmem_tensor(1, Int32)
        known.fill(0)
        first, end, stride = weights.bands()
        for band in cutlass.range(first, end, stride, unroll=1):
            acc = self._band(weights, table, scale, h, Int32(y.shape[0]), counters, known)
            self._write(acc, band, parts, y)
        ready.end(counters, ctas)

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
    def _unit(self, weights: Any, frags: Int32, parts: Any) -> None:
        """This warp's part of the sums of 32 gate rows, then of 32 up rows."""
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        acc = cute.make_rmem_tensor(BAND, Float32)
        for half in cutlass.range(2, unroll=1):
            acc.fill(0.0)
            for step in cutlass.range(self.shape.steps13, unroll=1):
                wait(self.slots - 1)
                slot = sequence.take(weights)
                words = tiles.read(slot, PIECES)
                at = frags + (warp * self.shape.steps13 + step) * STEP_BYTES + lane * 16
                x = tiles.read(at, GROUPS)
                sequence.refill(weights, slot, UP | DOWN)
                tiles.multiply_nvfp4(self.nvfp4, acc, words, x)
            sums.put(parts, acc, BAND, half * BAND)

    @cute.jit
    def _shared_unit(self, weights: Any, frags: Int32, parts: Any) -> None:
        """This warp's part of the sums of 8 gate and 8 up rows."""
        warp = cute.arch.warp_idx()
        acc = cute.make_rmem_tensor(4, Float32)
        acc.fill(0.0)
        place = frags + tiles.fp8_place(32 * 16) + cute.arch.lane_idx() // 4 * 64
        for turn in cutlass.range(self.shape.steps13, unroll=1):
            wait(self.slots - 1)
            slot = sequence.take(weights)
            step = warp * self.shape.steps13 + turn
            words, scales = tiles.read(slot, FP8_PIECES), raw.read_shared(slot, SCALE_AT)
            x: list[Any] = []
            for piece in range_constexpr(GROUPS):
                offset = tiles.fp8_offset(piece, 32 * 16)
                x.extend(raw.read_shared(place + step * STEP_BYTES, offset))
            sequence.refill(weights, slot, EVERY)
            both = _scale(scales[0], step), _scale(scales[1], step)
            more = tiles.multiply_fp8(self.fp8, words, x, both)
            for c in range_constexpr(4):
                acc[c] += more[c]
        sums.put(parts, acc, 4, Int32(0))

    @cute.jit
    def _activate(
        self,
        unit: Int32,
        table: Any,
        scale: Any,
        parts: Any,
        h: cute.Tensor,
        counters: cute.Tensor,
    ) -> None:
        """Sum over the warps, in their order; SwiGLU, times the routing weight; into `h`."""
        cute.arch.sync_threads()
        eight, c, g, token = sums.item()
        expert, place = unit // self.shape.units, unit % self.shape.units
        if cute.arch.warp_idx() < 8:
            entry = table.entry[expert * MAX_ROWS + token]
            if entry >= 0:
                gate, up = sums.total(parts, c), sums.total(parts, BAND + c)
                value = self._swiglu(gate * scale[expert, 0], up * scale[expert, 1])
                at = tiles.column(place // 2 * 8 + place % 2 + 2 * eight, g)
                h[entry, at] = (value * table.weights[entry]).to(BFloat16)
        self._count(counters, expert)

    @cute.jit
    def _activate_shared(
        self, unit: Int32, rows: Int32, parts: Any, h: cute.Tensor, counters: cute.Tensor
    ) -> None:
        """The same for the shared expert, whose weight is 1: into the last rows of `h`."""
        cute.arch.sync_threads()
        warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
        token = lane % 4 * 2 + warp
        if (warp < 2) & (token < rows):
            gate, up = sums.total(parts, warp), sums.total(parts, 2 + warp)
            entry = Int32(h.shape[0]) - rows + token
            h[entry, tiles.column(unit, lane // 4)] = self._swiglu(gate, up).to(BFloat16)
        self._count(counters, Int32(ready.SHARED))

    @cute.jit
    def _count(self, counters: cute.Tensor, expert: Int32) -> None:
        """The unit is done, and its sums are read."""
        cute.arch.sync_threads()
        thread, _, _ = cute.arch.thread_idx()
        if thread == self.threads - 1:
            ready.done(counters, expert)

    @cute.jit
    def _swiglu(self, gate: Float32, up: Float32) -> Float32:
        if const_expr(self.limit > 0):
            gate = cutlass.min(gate, Float32(self.limit))
            up = cutlass.max(cutlass.min(up, Float32(self.limit)), Float32(-self.limit))
        decay = cute.math.exp2(gate * Float32(-LOG2_E), fastmath=True)
        return gate * cute.arch.rcp_approx(Float32(1.0) + decay) * up

    @cute.jit
    def _band(
        self,
        weights: Any,
        table: Any,
        scale: Any,
        h: cute.Tensor,
        rows: Int32,
        counters: cute.Tensor,
        known: Any,
    ) -> Any:
        """-> this warp's part of the sums of 32 rows of w2 over all experts: 8 a lane."""
        band, acc = cute.make_rmem_tensor(BAND, Float32), cute.make_rmem_tensor(BAND, Float32)
        x, ahead = (cute.make_rmem_tensor(4 * GROUPS, Uint32) for _ in range(2))
        band.fill(0.0)
        acc.fill(0.0)
        if const_expr(self.shape.shared):
            ready.wait_for_shared(counters, self.shape.shared_units)
            self._shared_band(band, x, ahead, weights, h, rows)
        steps = self.shape.steps2
        self._activations(x, Int32(0), weights.count, table, h, counters, known)
        for turn in cutlass.range(weights.count * steps, unroll=1):
            wait(self.slots - 1)
            slot = sequence.take(weights)
            words = tiles.read(slot, PIECES)
            sequence.refill(weights, slot, DOWN)
            self._activations(ahead, turn + 1, weights.count, table, h, counters, known)
            tiles.multiply_nvfp4(self.nvfp4, acc, words, [x[i] for i in range(4 * GROUPS)])
            if (turn + 1) % steps == 0:
                for c in range_constexpr(BAND):
                    band[c] += acc[c] * scale[turn // steps, 2]
                    acc[c] = Float32(0.0)
            for word in range_constexpr(4 * GROUPS):
                x[word] = ahead[word]
        return band

    @cute.jit
    def _shared_band(
        self, band: Any, x: Any, ahead: Any, weights: Any, h: cute.Tensor, rows: Int32
    ) -> None:
        """The shared expert's part of `band`: 16 rows, then the others."""
        warp, steps = cute.arch.warp_idx(), self.shape.steps2
        self._shared_activations(x, Int32(0), h, rows)
        for turn in cutlass.range(2 * steps, unroll=1):
            step = turn % steps
            wait(self.slots - 1)
            slot = sequence.take(weights)
            words, word = tiles.read(slot, FP8_PIECES), raw.read_shared(slot, SCALE_AT)[0]
            sequence.refill(weights, slot, DOWN)
            self._shared_activations(ahead, (turn + 1) % steps, h, rows)
            scale, own = _scale(word, warp * steps + step), [x[i] for i in range(4 * GROUPS)]
            more = tiles.multiply_fp8(self.fp8, words, own, (scale, scale))
            for c in range_constexpr(4):
                band[c] += more[c] if turn < steps else Float32(0.0)
                band[4 + c] += Float32(0.0) if turn < steps else more[c]
            for i in range_constexpr(4 * GROUPS):
                x[i] = ahead[i]

    @cute.jit
    def _shared_activations(self, x: Any, step: Int32, h: cute.Tensor, rows: Int32) -> None:
        """This lane's activations for one of the warp's steps."""
        warp, token = cute.arch.warp_idx(), cute.arch.lane_idx() // 4
        row = Int64(Int32(h.shape[0]) - rows + token) * (self.shape.inter * 2)
        at = row + (warp * self.shape.steps2 + step) * (GROUPS * 64) + tiles.fp8_place(64)
        for piece in range_constexpr(GROUPS):
            offset = tiles.fp8_offset(piece, 64)
            words = raw.load_if(Int32(token < rows), h.iterator.toint() + at, offset, fresh=True)
            for i in range_constexpr(4):
                x[4 * piece + i] = words[i]

    @cute.jit
    def _activations(
        self,
        x: Any,
        turn: Int32,
        count: Int32,
        table: Any,
        h: cute.Tensor,
        counters: cute.Tensor,
        known: Any,
    ) -> None:
        """This lane's activations for a turn; zeros for who did not choose the expert.

        known: how many of the first experts are complete.
        """
        warp, lane, steps = cute.arch.warp_idx(), cute.arch.lane_idx(), self.shape.steps2
        entry, expert, step = Int32(-1), turn // steps, turn % steps
        if expert < count:
            if expert >= known[0]:
                known[0] = ready.wait_for(counters, expert, count, self.shape.units)
            entry = table.entry[expert * MAX_ROWS + lane // 4]
        at = (warp * steps + step) * (GROUPS * 64) + lane % 4 * 16
        address = h.iterator.toint() + Int64(entry) * (self.shape.inter * 2) + at
        for piece in range_constexpr(GROUPS):
            words = raw.load_if(Int32(entry >= 0), address, piece * 64, fresh=True)
            for i in range_constexpr(4):
                x[4 * piece + i] = words[i]

    @cute.jit
    def _write(self, acc: Any, band: Int32, parts: Any, y: cute.Tensor) -> None:
        """Sum over the warps, in their order, and write."""
        cute.arch.sync_threads()  # sums of the band before are read
        sums.put(parts, acc, BAND, Int32(0))
        cute.arch.sync_threads()
        eight, c, g, token = sums.item()
        if (cute.arch.warp_idx() < 8) & (token < Int32(y.shape[0])):
            row = band // 4 * 128 + band % 4 * 8 + 32 * eight + g
            y[token, row] = sums.total(parts, c).to(self.out_dtype)


def _scale(word: Uint32, step: Int32) -> Float32:
    """The E8M0 scale of a step, from the aligned word that it lies in."""
    return ptx.e8m0_to_f32((word >> Uint32(step % 4 * 8)) & Uint32(0xFF))
