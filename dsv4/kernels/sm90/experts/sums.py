"""Sums of a CTA's warps: each warp has a part of the columns, a thread finishes one row and token.

Sums lie as the MMAs leave them: in 32 rows and eight tokens, lane `4g + t` has rows `g + 8 i` and
tokens `2t`, `2t + 1`, the two tokens together.
"""

from __future__ import annotations

from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr, range_constexpr

MOST = 16  # sums of a lane


class Sums:
    """`[lane, sum, warp]`, twice: who is late still reads what the others do not write next."""

    def __init__(self, smem: Any, warps: int, buffers: int) -> None:
        self.warps, self.buffers = warps, buffers
        layout = cute.make_layout((32, MOST, warps, buffers))
        self.parts = smem.allocate_tensor(Float32, layout, 16)
        self.turn = cute.make_rmem_tensor(1, Int32)
        self.turn.fill(0)


@cute.jit
def exchange(sums: Any, acc: Any, count: int) -> None:
    """A warp's first `count` sums to all threads."""
    warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    if const_expr(sums.buffers == 1):
        cute.arch.sync_threads()
    else:
        sums.turn[0] = 1 - sums.turn[0]
    for c in range_constexpr(count):
        sums.parts[lane, c, warp, sums.turn[0]] = acc[c]
    cute.arch.sync_threads()


@cute.jit
def total(sums: Any, c: Int32) -> Float32:
    """This lane's sum `c` over the warps, in their order."""
    value = Float32(0.0)
    for warp in range_constexpr(sums.warps):
        value += sums.parts[cute.arch.lane_idx(), c, warp, sums.turn[0]]
    return value


@cute.jit
def item() -> tuple[Int32, Int32, Int32, Int32]:
    """What a thread of the first eight warps finishes: (which eight of the rows, where its sums
    lie, row of the eight, token).
    """
    warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    eight, odd = warp // 2, warp % 2
    c = eight // 2 * 4 + eight % 2 * 2 + odd
    return eight, c, lane // 4, lane % 4 * 2 + odd
