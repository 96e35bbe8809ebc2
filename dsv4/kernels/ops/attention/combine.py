"""The end of attention: parts of the rows, each with its own maximum, become one output."""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, range_constexpr

from dsv4.kernels.device import arithmetic, async_copies, conversions, global_memory, shared_memory
from dsv4.kernels.device.elementary import LOG2_E
from dsv4.kernels.device.global_memory import Load
from dsv4.kernels.ops.attention.gather_rows import Rows

HEAD_DIM = 512
ROTARY = 64
LOWEST = -1.0e30  # a maximum of no scores, finite so that differences are
QUARTER = 128  # dimensions of a warp, 4 of a lane


class Join:
    """sums: float32 `[T, splits, H, 512]`; statistics: `[T, splits, H, 2]`.

    The statistics are a part's maximum, in powers of two, and its weight. Parts are added in their
    order, and divided by all weights and the sink's; rotary dimensions are rotated back.
    """

    def __init__(
        self,
        mode: str,
        heads: int,
        window: int,
        ratio: int,
        topk: int,
        splits: int,
        warps: int,
        pdl: bool,
    ) -> None:
        assert splits <= 32, "a lane weighs a part"
        self.heads, self.splits, self.warps, self.pdl = heads, splits, warps, pdl
        self.rows = Rows(mode, window, ratio, topk, splits)
        self.output = Output(heads)

    @cute.jit
    def __call__(
        self,
        sums: cute.Tensor,
        statistics: cute.Tensor,
        position: cute.Tensor,
        sinks: cute.Tensor,
        cos: cute.Tensor,
        sin: cute.Tensor,
        o: cute.Tensor,
        stream: cuda.CUstream,
    ) -> None:
        self.kernel(sums, statistics, position, sinks, cos, sin, o).launch(
            grid=[self.heads * (HEAD_DIM // QUARTER) // self.warps, o.shape[0], 1],
            block=[32 * self.warps, 1, 1],
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def kernel(
        self,
        sums: cute.Tensor,
        statistics: cute.Tensor,
        position: cute.Tensor,
        sinks: cute.Tensor,
        cos: cute.Tensor,
        sin: cute.Tensor,
        o: cute.Tensor,
    ) -> None:
        self._join(sums, statistics, position, None, sinks, cos, sin, o)

    @cute.jit
    def _join(
        self,
        sums: cute.Tensor,
        statistics: cute.Tensor,
        position: cute.Tensor,
        turn: Any,
        sinks: cute.Tensor,
        cos: cute.Tensor,
        sin: cute.Tensor,
        o: cute.Tensor,
    ) -> None:
        """turn: positions of the angles; None where they are those that tell what is seen."""
        group, token, _ = cute.arch.block_idx()
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        # Older than the kernel that this one waits for: read before it ends.
        place = position[token]
        turned = place if cutlass.const_expr(turn is None) else turn[token]
        item = group * self.warps + warp
        head, column = item // 4, item % 4 * QUARTER + lane * 4
        angles = [self.output.angle(cos, sin, turned, column + 2 * i) for i in range(2)]
        sink = sinks[head] * LOG2_E
        blocks, seen = self.rows.count(place)
        share = self.rows.share(blocks, seen)
        parts = (blocks + seen + share - 1) // share
        smem = cutlass.memory.SmemAllocator()
        own = Int32(smem.allocate(self.warps * self.splits * 512, 128).toint())
        own += warp * (self.splits * 512) + lane * 16
        row = Int64(token * self.splits) * self.heads + head
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        values = sums.iterator.toint() + (row * HEAD_DIM + column) * 4
        for part in cutlass.range(parts, unroll=1):
            async_copies.copy_or_zero(own + part * 512, values, Int32(1))
            values += self.heads * HEAD_DIM * 4
        async_copies.commit()
        part = cutlass.min(lane, parts - 1)
        pair = global_memory.load_floats(
            statistics.iterator.toint() + (row + part * self.heads) * 8, 2, Load.PLAIN
        )
        factor = self._factor(pair, sink, lane < parts)
        async_copies.wait(0)
        totals = [Float32(0.0), Float32(0.0), Float32(0.0), Float32(0.0)]
        for part in cutlass.range(parts, unroll=4):
            four = shared_memory.load_floats(own + part * 512, 4)
            weight = cute.arch.shuffle_sync(factor, part)
            totals = [totals[c] + four[c] * weight for c in range(4)]
        words = [self.output.turned(totals[2 * i], totals[2 * i + 1], angles[i]) for i in range(2)]
        at = o.iterator.toint() + (Int64(token * self.heads + head) * HEAD_DIM + column) * 2
        global_memory.store_words(at, words)

    @cute.jit
    def _factor(self, pair: Any, sink: Any, exists: Any) -> Any:
        """What the sums of the lane's part count for."""
        top = cute.arch.fmax(arithmetic.warp_max(pair[0]), sink)
        factor = arithmetic.exp2(pair[0] - top) if exists else Float32(0.0)
        total = cute.arch.warp_reduction_sum(pair[1] * factor)
        return factor * cute.arch.rcp_approx(total + arithmetic.exp2(sink - top))


class TurnedJoin(Join):
    """The same, rotated back by the angles of `turn`: int32 `[T]`, positions of their own."""

    @cute.jit
    def __call__(
        self,
        sums: cute.Tensor,
        statistics: cute.Tensor,
        position: cute.Tensor,
        turn: cute.Tensor,
        sinks: cute.Tensor,
        cos: cute.Tensor,
        sin: cute.Tensor,
        o: cute.Tensor,
        stream: cuda.CUstream,
    ) -> None:
        self.turned_kernel(sums, statistics, position, turn, sinks, cos, sin, o).launch(
            grid=[self.heads * (HEAD_DIM // QUARTER) // self.warps, o.shape[0], 1],
            block=[32 * self.warps, 1, 1],
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def turned_kernel(
        self,
        sums: cute.Tensor,
        statistics: cute.Tensor,
        position: cute.Tensor,
        turn: cute.Tensor,
        sinks: cute.Tensor,
        cos: cute.Tensor,
        sin: cute.Tensor,
        o: cute.Tensor,
    ) -> None:
        self._join(sums, statistics, position, turn, sinks, cos, sin, o)


class Output:
    """Writes bfloat16 `[T, H, 512]`, rotated back by the tokens' angles."""

    def __init__(self, heads: int) -> None:
        self.heads = heads

    @cute.jit
    def angle(self, cos: Any, sin: Any, place: Int32, column: Int32) -> Any:
        """Cosine and sine for a pair of dimensions; 1 and 0 where they do not rotate."""
        rotary = column >= HEAD_DIM - ROTARY
        at = place if rotary else 0
        pair = (column - (HEAD_DIM - ROTARY)) // 2 if rotary else 0
        c, s = cos[at, pair], sin[at, pair]
        return (c if rotary else Float32(1.0)), (s if rotary else Float32(0.0))

    def turned(self, even: Any, odd: Any, angle: Any) -> Any:
        """A pair, rotated back, as a word."""
        cos, sin = angle
        return conversions.bf16_pair(even * cos + odd * sin, odd * cos - even * sin)

    @cute.jit
    def whole(
        self,
        own: Any,
        pair: Any,
        token: Int32,
        place: Int32,
        head: Int32,
        column: Int32,
        out: Any,
    ) -> None:
        """A head's sums at `column + 8j` and the next, of the only part."""
        sinks, cos, sin, o = out
        sink = sinks[head] * LOG2_E
        top = cute.arch.fmax(sink, pair[0])
        fade = arithmetic.exp2(pair[0] - top)
        factor = fade * cute.arch.rcp_approx(pair[1] * fade + arithmetic.exp2(sink - top))
        at = o.iterator.toint() + (Int64(token * self.heads + head) * HEAD_DIM + column) * 2
        for j in range_constexpr(len(own)):
            even, odd = own[j]
            angle = (Float32(1.0), Float32(0.0))
            if cutlass.const_expr(j >= len(own) - ROTARY // 8):
                angle = self.angle(cos, sin, place, column + 8 * j)
            word = self.turned(even * factor, odd * factor, angle)
            global_memory.store_word(at + j * 16, word)
