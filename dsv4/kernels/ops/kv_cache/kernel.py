"""What follows the projections of a layer's input, in one launch: norms, caches, compressors.

Independent jobs, one or a few CTAs for each row of the step:
    latent      norm of the low-rank query
    window      norm of the key/value vector, RoPE, its FP8 row in the window cache
    compressor  the row's place in the ring; where it completes a block, the block's entry
    indexer     the same for the indexer's keys, a warp for each row
No job waits for another. What a row writes does not depend on the rows beside it.
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Float64, Int32, Int64, range_constexpr

from dsv4.kernels.device import async_copies, rounding
from dsv4.kernels.ops.kv_cache import pooling, rows
from dsv4.kernels.ops.kv_cache.pooling import Compressor
from dsv4.kernels.ops.kv_cache.rows import CHANNELS

WARPS = 4  # of a team
TEAM = 32 * WARPS
GROUPS = 4  # teams that share the slots of a block without overlap
COMPRESSOR_ARGUMENTS = 8


class Append:
    """The launch of one kind of layer.

    ratio: tokens per entry, 0 for a layer without compressor; overlap: with the indexer
    (`index_width` channels a key). inputs: dtype of the projections' results that are normed.

    position, slot: int32 `[T]`, a position below 0 for a row that is not there; cos, sin: float32
    `[P, rope / 2]`. operands: latent `[T, L]`, its norm `[L]`, qr bfloat16 `[T, L]`; kv `[T, W]`,
    its norm `[W]`, window rows uint8 `[S, ring, row]` and scales uint8 `[S, ring, 8]`; then for
    the compressor and the indexer's: kv, gate float32 `[T, C]`, ape `[ratio, C]`, norm `[width]`,
    ring_kv, ring_gate float32 `[S, ring, C]`, entries and scales uint8 `[S, capacity, ...]`.
    """

    def __init__(
        self,
        latent: int,
        width: int,
        rope: int,
        ratio: int,
        overlap: bool,
        index_width: int,
        inputs: str,
        eps: float,
        pdl: bool,
    ) -> None:
        if width != CHANNELS * TEAM or latent % (CHANNELS * TEAM):
            raise ValueError(f"vectors of {width} and {latent}, expected multiples of 512")
        if index_width not in (0, CHANNELS * 32) or (index_width > 0) != overlap:
            raise ValueError(f"indexer keys of {index_width}, expected 128 where blocks overlap")
        self.latent, self.width, self.nope, self.eps = latent, width, width - rope, eps
        self.index_nope = index_width - rope
        self.wide = {"float32": True, "bfloat16": False}[inputs]
        self.ratio, self.overlap = ratio, overlap
        self.compressor = Compressor(max(ratio, 1), width, overlap)
        self.indexer = Compressor(max(ratio, 1), index_width, overlap)
        self.groups = GROUPS if ratio and not overlap else 1
        self.jobs = 3 if ratio else 2
        self.pdl = pdl

    @cute.jit
    def __call__(
        self,
        position: cute.Tensor,
        slot: cute.Tensor,
        cos: cute.Tensor,
        sin: cute.Tensor,
        operands: Any,
        stream: cuda.CUstream,
    ) -> None:
        jobs = self.jobs + (1 if self.overlap else 0)
        self.kernel(position, slot, cos, sin, operands).launch(
            grid=[position.shape[0], jobs, 1],
            block=[TEAM * self.groups, 1, 1],
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def kernel(
        self,
        position: cute.Tensor,
        slot: cute.Tensor,
        cos: cute.Tensor,
        sin: cute.Tensor,
        operands: Any,
    ) -> None:
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        smem = cutlass.memory.SmemAllocator()
        partial = smem.allocate_tensor(Float64, cute.make_layout(WARPS), 16)
        shared = (Int32(0), partial)
        if cutlass.const_expr(self.ratio > 0):
            stages = smem.allocate(self.compressor.stage_bytes * TEAM * self.groups, 16)
            shape = (3, CHANNELS, max(self.groups - 1, 1), TEAM)
            strides = (TEAM, 3 * TEAM, 3 * CHANNELS * TEAM, 1)
            layout = cute.make_layout(shape, stride=strides)
            shared = (stages.toint(), smem.allocate_tensor(Float32, layout, 16))
        row, job, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        step = (position, slot, cos, sin)
        first = 7
        if job == self.jobs - 1:
            self._window(step, operands[3:first], row, thread, partial)
        if job == self.jobs - 2:
            self._latent(operands[0:3], row, thread, partial)
        if cutlass.const_expr(self.ratio > 0):
            second = first + COMPRESSOR_ARGUMENTS
            if job == 0:
                self._compress(step, operands[first:second], row, thread, partial, shared)
            if cutlass.const_expr(self.overlap):
                key = row * WARPS + cute.arch.warp_idx()
                if (job == self.jobs) & (key < position.shape[0]):
                    self._index(step, operands[second:], key, thread, shared)

    @cute.jit
    def _wait(self, weights: Any, thread: Int32) -> None:
        """Ask for what no kernel before this one writes, then wait for what they do."""
        if cutlass.const_expr(self.pdl):
            for weight in weights:
                lines = -(-cute.size(weight) * 4 // 128)
                if thread < lines:
                    async_copies.prefetch_l2(weight.iterator.toint() + thread.to(Int64) * 128)
            cute.arch.griddepcontrol_wait()

    @cute.jit
    def _latent(self, operands: Any, row: Int32, thread: Int32, partial: cute.Tensor) -> None:
        source, norm, target = operands
        self._wait([norm], thread)
        if thread < TEAM:
            start = row.to(Int64) * self.latent
            values: list[Any] = []
            weights: list[Any] = []
            for part in range_constexpr(self.latent // (CHANNELS * TEAM)):
                column = (part * TEAM + thread) * CHANNELS
                values.extend(
                    async_copies.load_channels(source.iterator, start + column, self.wide)
                )
                weights.extend(async_copies.load_f32x4((norm.iterator + column).toint()))
            squares = rows.team_sum(rows.square_sum(values), partial, WARPS)
            out = rows.normed(values, weights, squares, self.latent, self.eps)
            for part in range_constexpr(self.latent // (CHANNELS * TEAM)):
                a, b, c, d = out[CHANNELS * part : CHANNELS * (part + 1)]
                column = (part * TEAM + thread) * CHANNELS
                words = (rounding.bf16_pair(a, b), rounding.bf16_pair(c, d))
                async_copies.store_b64((target.iterator + start + column).toint(), words)

    @cute.jit
    def _window(
        self, step: Any, operands: Any, row: Int32, thread: Int32, partial: cute.Tensor
    ) -> None:
        position, slot, cos, sin = step
        source, norm, window, scales = operands
        self._wait([norm], thread)
        if thread < TEAM:
            at = Int32(async_copies.load_b32((position.iterator + row).toint()))
            own_slot = async_copies.load_b32((slot.iterator + row).toint())
            column = thread * CHANNELS
            start = row.to(Int64) * self.width
            values = async_copies.load_channels(source.iterator, start + column, self.wide)
            weights = async_copies.load_f32x4((norm.iterator + column).toint())
            if at >= 0:
                turn = [rows.angle(table, at, column, self.nope) for table in (cos, sin)]
                squares = rows.team_sum(rows.square_sum(values), partial, WARPS)
                out = rows.normed(values, weights, squares, self.width, self.eps)
                index = own_slot.to(Int64) * window.shape[1] + at % window.shape[1]
                self._store_row(out, turn, column, window, scales, index)

    @cute.jit
    def _store_row(
        self, out: Any, turn: Any, column: Int32, entries: Any, scales: Any, index: Any
    ) -> None:
        row_bytes = self.nope + 2 * (self.width - self.nope)
        rows.store_kv_row(
            out,
            turn[0],
            turn[1],
            column,
            self.nope,
            (entries.iterator + index * row_bytes).toint(),
            (scales.iterator + index * rows.KV_SCALES).toint(),
        )

    @cute.jit
    def _compress(
        self, step: Any, operands: Any, row: Int32, thread: Int32, partial: Any, shared: Any
    ) -> None:
        position, slot, cos, sin = step
        kv, gate, ape, norm, ring_kv, ring_gate, entries, scales = operands
        inputs = (kv, gate, ape, ring_kv, ring_gate)
        sizes, threads = self.compressor, TEAM * self.groups
        stages, others = shared
        team, own = thread % TEAM, sizes.slots // self.groups
        first, column, stage = thread // TEAM * own, team * CHANNELS, stages + thread * 16
        self._wait([norm], thread)
        token = pooling.place_of(sizes, row, position, slot)
        index = token[1] // sizes.ratio
        complete = token[1] % sizes.ratio == sizes.ratio - 1
        complete = complete & (token[1] >= 0) & (index < entries.shape[1])
        if complete:
            pooling.fetch(sizes, inputs, token, first, column, stage, threads)
        if (token[1] >= 0) & (thread < TEAM):
            pooling.write_ring(sizes, inputs, token, thread, TEAM)
        if complete:
            weights = async_copies.load_f32x4((norm.iterator + column).toint())
            begin = index * sizes.ratio
            turn = [rows.angle(table, begin, column, self.nope) for table in (cos, sin)]
            state = _empty_state()
            pooling.pool(sizes, token[1], first, stage, threads, state)
            for batch in cutlass.range(1, own // sizes.batch, unroll=1):
                at = first + batch * sizes.batch
                pooling.fetch(sizes, inputs, token, at, column, stage, threads)
                pooling.pool(sizes, token[1], at, stage, threads, state)
            if cutlass.const_expr(self.groups > 1):
                self._share(state, others, thread)
            if thread < TEAM:
                values = _entry(state)
                squares = rows.team_sum(rows.square_sum(values), partial, WARPS)
                out = rows.normed(values, weights, squares, self.width, self.eps)
                place = token[2].to(Int64) * entries.shape[1] + index
                self._store_row(out, turn, column, entries, scales, place)

    @cute.jit
    def _share(self, state: cute.Tensor, others: cute.Tensor, thread: Int32) -> None:
        """Bring what the groups pooled together in the first."""
        team, group = thread % TEAM, thread // TEAM
        if group > 0:
            for c in range_constexpr(CHANNELS):
                for part in range_constexpr(3):
                    others[part, c, group - 1, team] = state[part, c]
        cute.arch.sync_threads()
        if group == 0:
            pooling.merge(state, others, self.groups - 1, team)

    @cute.jit
    def _index(self, step: Any, operands: Any, row: Int32, thread: Int32, shared: Any) -> None:
        position, slot, cos, sin = step
        kv, gate, ape, norm, ring_kv, ring_gate, keys, scales = operands
        inputs = (kv, gate, ape, ring_kv, ring_gate)
        sizes, lane, stage = self.indexer, thread % 32, shared[0] + thread * 16
        column = lane * CHANNELS
        self._wait([norm], lane)
        token = pooling.place_of(sizes, row, position, slot)
        index = token[1] // sizes.ratio
        complete = token[1] % sizes.ratio == sizes.ratio - 1
        complete = complete & (token[1] >= 0) & (index < keys.shape[1])
        if complete:
            pooling.fetch(sizes, inputs, token, Int32(0), column, stage, TEAM)
        if token[1] >= 0:
            pooling.write_ring(sizes, inputs, token, lane, 32)
        if complete:
            weights = async_copies.load_f32x4((norm.iterator + column).toint())
            begin = index * sizes.ratio
            turn = [rows.angle(table, begin, column, self.index_nope) for table in (cos, sin)]
            state = _empty_state()
            pooling.pool(sizes, token[1], Int32(0), stage, TEAM, state)
            values = _entry(state)
            squares = cute.arch.warp_reduction_sum(rows.square_sum(values))
            out = rows.normed(values, weights, squares, sizes.width, self.eps)
            place = token[2].to(Int64) * keys.shape[1] + index
            rows.store_index_key(
                out,
                turn[0],
                turn[1],
                column,
                sizes.width,
                self.index_nope,
                (keys.iterator + place * (sizes.width // 2)).toint(),
                (scales.iterator + place * (sizes.width // rows.INDEXER_BLOCK)).toint(),
            )


def _empty_state() -> Any:
    state = cute.make_rmem_tensor((3, CHANNELS), Float32)
    state.fill(0.0)
    for c in range(CHANNELS):
        state[0, c] = Float32(-float("inf"))
    return state


def _entry(state: Any) -> list[Float32]:
    """The pooled values, rounded to bfloat16's."""
    return rounding.to_bf16([state[2, c] / state[1, c] for c in range(CHANNELS)])
