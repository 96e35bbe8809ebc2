"""The end of attention: parts of the rows, each with its own maximum, become one output.

Sums lie as the accumulators of MMAs of 16 dimensions by 8 heads: `[tile of 16][8 heads][lane][4]`,
lane `4g + t` holding heads 2t and 2t + 1 at one dimension, then at the next one.
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, range_constexpr

from dsv4.kernels.sm90 import ring
from dsv4.kernels.sm90.attention import fragments, shared
from dsv4.kernels.sm90.attention.rows import Rows

HEAD_DIM = 512
STEPS = 4  # MMAs along 64 dimensions
TILES = HEAD_DIM // 16
ROTARY = 64
LOG2E = 1.4426950408889634
LOWEST = -1.0e30  # a maximum of no scores, finite so that differences are


class Merge:
    """sums: float32 `[T, splits, H, 512]` in the order above; statistics: `[T, splits, H, 2]`.

    The statistics are a part's maximum, in powers of two, and its weight. Parts are merged in their
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
        m_tiles: int,
        warps: int,
        pdl: bool,
    ) -> None:
        self.heads, self.splits, self.warps, self.pdl = heads, splits, warps, pdl
        self.rows = Rows(mode, window, ratio, topk, splits, 16 * m_tiles)
        self.output = Output(heads)
        self.warp_bytes = splits * 512 + -(-splits // 4) * 128

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
            grid=[TILES * self.heads // 8 // self.warps, o.shape[0], 1],
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
        group, token, _ = cute.arch.block_idx()
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        # Older than the kernel that this one waits for: read before it ends.
        place = position[token]
        item = group * self.warps + warp
        tile, n = item // (self.heads // 8), item % (self.heads // 8)
        angle = self.output.angle(cos, sin, place, tile, lane)
        sink = sinks[8 * n + lane % 8] * LOG2E
        blocks, seen = self.rows.count(place)
        share = self.rows.share(blocks, seen)
        parts = (blocks + seen + share - 1) // share
        smem = cutlass.memory.SmemAllocator()
        base = Int32(smem.allocate(self.warps * self.warp_bytes, 128).toint())
        base += warp * self.warp_bytes
        row = Int64(token * self.splits) * self.heads
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        own = base + lane * 16
        values = sums.iterator.toint() + row * (HEAD_DIM * 4) + Int64(item * 512 + lane * 16)
        pairs = statistics.iterator.toint() + (row + 8 * n + lane % 8) * 8
        for part in cutlass.range(parts, unroll=1):
            ring.copy_if(own + part * 512, values, Int32(1))
            values += self.heads * HEAD_DIM * 4
        ring.commit()
        found = []
        for turn in range_constexpr(-(-self.splits // 4)):
            part = cutlass.min(turn * 4 + lane // 8, parts - 1)
            found.append(shared.load_global_pair(pairs + part * (self.heads * 8)))
        self._factors(found, sink, parts, base + self.splits * 512)
        ring.wait(0)
        cute.arch.sync_warp()
        totals = [Float32(0.0), Float32(0.0), Float32(0.0), Float32(0.0)]
        factors = base + self.splits * 512 + (lane % 4) * 8
        for part in cutlass.range(parts, unroll=4):
            factor = shared.load(factors + part * 32, 2)
            four = shared.load(own + part * 512, 4)
            totals = [totals[c] + four[c] * factor[c % 2] for c in range(4)]
        heads = 8 * n + 2 * (lane % 4)
        results = [(totals[0], totals[2]), (totals[1], totals[3])]
        self.output.write(o, token, tile, lane, heads, results, angle)

    @cute.jit
    def _factors(self, found: Any, sink: Any, parts: Int32, target: Int32) -> None:
        """What each part's sums count for, `[part][8 heads]`; lane `8i + h` has head h, parts 4k + i.

        found: (maximum, weight) of those parts, the last one's where there is none.
        """
        lane = cute.arch.lane_idx()
        top = sink
        for pair in found:
            top = cute.arch.fmax(top, pair[0])
        for distance in (8, 16):
            top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, distance))
        factors = []
        total = Float32(0.0)
        for turn in range_constexpr(len(found)):
            factor = fragments.exp2(found[turn][0] - top)
            factors.append(factor)
            total += found[turn][1] * factor if turn * 4 + lane // 8 < parts else Float32(0.0)
        for distance in (8, 16):
            total += cute.arch.shuffle_sync_bfly(total, distance)
        scale = cute.arch.rcp_approx(total + fragments.exp2(sink - top))
        for turn in range_constexpr(len(found)):
            shared.store_float(target + turn * 128 + lane * 4, factors[turn] * scale)


class Output:
    """Writes bfloat16 `[T, H, 512]` from accumulators."""

    def __init__(self, heads: int) -> None:
        self.heads = heads

    @cute.jit
    def angle(self, cos: Any, sin: Any, place: Int32, tile: Int32, lane: Int32) -> Any:
        """Cosine and sine for a lane's pair of dimensions; 1 and 0 where they do not rotate."""
        pair = self._column(tile, lane) // 2
        rotary = tile >= TILES - STEPS
        at = place if rotary else 0
        c, s = cos[at, pair], sin[at, pair]
        return (c if rotary else Float32(1.0)), (s if rotary else Float32(0.0))

    def _column(self, tile: Any, lane: Any) -> Any:
        """A lane's first dimension of the 64 that the tile lies in."""
        g = lane // 4
        return 16 * (g // 2) + 4 * (tile % STEPS) + 2 * (g % 2)

    @cute.jit
    def write(
        self,
        o: Any,
        token: Int32,
        tile: Int32,
        lane: Int32,
        heads: Int32,
        values: Any,
        angle: Any,
    ) -> None:
        """Two neighbouring dimensions of two heads, rotated back."""
        cos, sin = angle
        column = (tile // STEPS) * 64 + self._column(tile, lane)
        for c in range_constexpr(2):
            even, odd = values[c]
            word = fragments.pack_bf16x2(even * cos + odd * sin, odd * cos - even * sin)
            place = Int64(token * self.heads + heads + c) * HEAD_DIM + column
            shared.store_global_word(o.iterator.toint() + place * 2, word)

    @cute.jit
    def whole(
        self, acc: Any, statistics: Int32, token: Int32, find: Any, first: Int32, out: Any
    ) -> None:
        """All of a CTA's heads from `first`: there is one part, its statistics are shared."""
        sinks, cos, sin, o = out
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        head_blocks = cute.size(acc) // (4 * STEPS)
        for step in range_constexpr(STEPS):
            tile = warp * STEPS + step
            angle = self.angle(cos, sin, find[5], tile, lane)
            for n in range_constexpr(head_blocks):
                heads = 8 * n + 2 * (lane % 4)
                found = shared.load(statistics + heads * 8, 4)
                values = []
                for c in range_constexpr(2):
                    sink = sinks[first + heads + c] * LOG2E
                    top = cute.arch.fmax(sink, found[2 * c])
                    fade = fragments.exp2(found[2 * c] - top)
                    total = found[2 * c + 1] * fade + fragments.exp2(sink - top)
                    scale = fade * cute.arch.rcp_approx(total)
                    at = (step * head_blocks + n) * 4 + c
                    values.append((acc[at] * scale, acc[at + 2] * scale))
                self.write(o, token, tile, lane, first + heads, values, angle)
