"""Sums of a CTA's warps: each warp has a part of the columns, a thread finishes one row and token.

Sums lie as the MMAs leave them: in 32 rows and eight tokens, lane `4g + t` has rows `g + 8 i` and
tokens `2t`, `2t + 1`, the two tokens together.
"""

from __future__ import annotations

from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32, range_constexpr

MOST = 16  # sums of a lane


class Sums:
    """`[lane, sum, warp]`."""

    def __init__(self, smem: Any, warps: int) -> None:
        self.warps = warps
        self.parts = smem.allocate_tensor(Float32, cute.make_layout((32, MOST, warps)), 16)


@cute.jit
def exchange(sums: Any, acc: Any, count: int) -> None:
    """A warp's first `count` sums to all threads."""
    warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    cute.arch.sync_threads()  # those before are read
    for c in range_constexpr(count):
        sums.parts[lane, c, warp] = acc[c]
    cute.arch.sync_threads()


@cute.jit
def total(sums: Any, c: Int32) -> Float32:
    """This lane's sum `c` over the warps, in their order."""
    value = Float32(0.0)
    for warp in range_constexpr(sums.warps):
        value += sums.parts[cute.arch.lane_idx(), c, warp]
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
