"""The parts of a token's rows, each with its own maximum, become one output within a cluster.

A CTA's sums lie in its shared memory as the accumulators of MMAs of 16 dimensions by 8 heads,
`[tile of 16][8 heads][lane][4]`, lane `4g + t` holding heads 2t and 2t + 1 at one dimension, then
at the next one; its statistics as `[head][2]`, the maximum in powers of two and the weight.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, range_constexpr

from dsv4.kernels.sm90.attention import shared
from dsv4.kernels.sm90.attention.merge import LOG2E, TILES, Output, weigh
from dsv4.kernels.sm90.attention.rows import WARPS

ITEM = 512  # bytes of a tile of 16 dimensions by 8 heads


class Join:
    """splits: CTAs of a cluster, each with a part of the rows and `block_heads` of the heads."""

    def __init__(self, heads: int, splits: int, block_heads: int) -> None:
        self.splits, self.head_blocks = splits, block_heads // 8
        self.items = TILES * self.head_blocks
        self.turns = -(-self.items // (splits * WARPS))
        self.warp_bytes = -(-splits // 4) * 128
        self.output = Output(heads)

    @cute.jit
    def join(
        self, at: Any, parts: Int32, rank: Int32, token: Int32, first: Int32, place: Int32, out: Any
    ) -> None:
        """A CTA's share of the output; all of the cluster's take part, those without rows too.

        at: addresses of sums, statistics, and of `WARPS * warp_bytes` for the factors.
        """
        sinks, cos, sin, o = out
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        places, angles, sunk = [], [], []
        for turn in range_constexpr(self.turns):
            item = cutlass.min(rank + self.splits * (warp + WARPS * turn), self.items - 1)
            tile, n = item // self.head_blocks, item % self.head_blocks
            places.append((item, tile, n))
            angles.append(self.output.angle(cos, sin, place, tile, lane))
            sunk.append(sinks[first + 8 * n + lane % 8] * LOG2E)
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        for turn in range_constexpr(self.turns):
            item, tile, n = places[turn]
            if rank + self.splits * (warp + WARPS * turn) < self.items:
                results = self._sum(at, item, n, sunk[turn], parts)
                heads = first + 8 * n + 2 * (lane % 4)
                self.output.write(o, token, tile, lane, heads, results, angles[turn])
        # Others read what lies here.
        cute.arch.cluster_arrive_relaxed()
        cute.arch.cluster_wait()

    @cute.jit
    def _sum(self, at: Any, item: Int32, n: Int32, sink: Any, parts: Int32) -> Any:
        """Two neighbouring dimensions of two heads, of all parts."""
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        sums, statistics, factors = at
        factors += warp * self.warp_bytes
        found = []
        for turn in range_constexpr(-(-self.splits // 4)):
            part = cutlass.min(turn * 4 + lane // 8, parts - 1)
            here = shared.of_rank(statistics + (8 * n + lane % 8) * 8, part)
            found.append(shared.load_remote(here, 2))
        values = []
        for part in range_constexpr(self.splits):
            here = shared.of_rank(sums + item * ITEM + lane * 16, cutlass.min(part, parts - 1))
            values.append(shared.load_remote(here, 4))
        cute.arch.sync_warp()
        weigh(found, sink, parts, factors)
        cute.arch.sync_warp()
        totals = [Float32(0.0), Float32(0.0), Float32(0.0), Float32(0.0)]
        for part in range_constexpr(self.splits):
            factor = shared.load(factors + part * 32 + (lane % 4) * 8, 2)
            totals = [totals[c] + values[part][c] * factor[c % 2] for c in range(4)]
        return [(totals[0], totals[2]), (totals[1], totals[3])]
