"""An indexer's query heads as the A operand of MMAs: rotated, spread, rounded to E2M1 values.

A warp makes eight heads, the rows of an MMA of which the other eight are zero; lane `4g + t` reads
of head `g`, in each group of 16 channels, the pairs `2t` and `2t + 8`. The Hadamard matrix of 128
is that of 8 groups times that of the 16 in a group: the MMA does the second, exactly signed
products with float32 sums, and leaves each lane all 8 groups for the first. Its columns are
ordered so that a lane gets channels `t` and `t + 4` of each eight: the pairs in which the keys'
codes unfold (`rounding.e2m1_operands`).

The operand lies in shared memory as `[m-tile][step][chunk][4 words]`, a chunk for each lane that
reads it, in an order that neither writing nor reading stumbles over banks.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, range_constexpr

from dsv4.kernels.device import async_copies, ptx, rounding

BLOCK = 32  # channels per scale
PARTS = 4  # blocks of a head
WIDTH = BLOCK * PARTS
GROUP = 16  # channels of one MMA
GROUPS = WIDTH // GROUP
HEADS = 8  # of a warp
STEPS = WIDTH // 16
M_TILE = 16 * WIDTH * 2  # bytes of 16 heads
E2M1_MAX = 6.0
SMALLEST_AMAX = 6.0 * 2.0**-126


def raw_bytes(rotated: int) -> int:
    """Of shared memory for what a warp fetches: its heads, and the angles."""
    return HEADS * WIDTH * 4 + rotated * 4


def fetch(q: cute.Tensor, row: Int32, heads: int, raw: Int32) -> None:
    """Ask for the warp's heads, into its shared memory. q: float32 `[T, heads · 128]`.

    A lane's 16 bytes of head `g` lie where those that read two of each four rows do not collide.
    """
    lane = cute.arch.lane_idx()
    start = (Int64(row) * heads + cute.arch.warp_idx() * HEADS) * WIDTH + 4 * lane
    source = (q.iterator + start).toint()
    for g in range(HEADS):
        target = raw + g * (WIDTH * 4) + (lane ^ (2 * (g % 4))) * 16
        async_copies.copy_b128(target, source + g * (WIDTH * 4))


@cute.jit
def fetch_angles(
    cos: cute.Tensor, sin: cute.Tensor, position: Int32, rotated: cutlass.Constexpr, raw: Int32
) -> None:
    """Ask for the angles of the pairs that are turned. Tables: float32 `[P, rotated / 2]`."""
    lane = cute.arch.lane_idx()
    each = rotated // 8  # lanes that bring four
    if lane < 2 * each:
        own = position * (rotated // 2) + lane % each * 4
        address = cos.iterator + own if lane < each else sin.iterator + own
        async_copies.copy_b128(raw + HEADS * WIDTH * 4 + lane * 16, address.toint())


@cute.jit
def encode(raw: Int32, rotated: cutlass.Constexpr, operand: Int32) -> Uint32:
    """Make the warp's heads of what it fetched; -> E8M0 code of the largest scale of the lane's.

    operand: where it starts in shared memory. Values are relative to the head's largest scale.
    """
    warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    g, t = lane // 4, lane % 4
    still = (WIDTH - rotated) // 8  # halves of groups that are not turned
    angles = raw + HEADS * WIDTH * 4 + t * 4
    words = []
    for half in range_constexpr(2 * GROUPS):
        place = (2 * half + t // 2) ^ (2 * (g % 4))
        source = raw + g * (WIDTH * 4) + place * 16 + t % 2 * 8
        even, odd = async_copies.load_shared_f32x2(source)
        if cutlass.const_expr(half >= still):
            cos = async_copies.load_shared_f32(angles + 16 * (half - still))
            sin = async_copies.load_shared_f32(angles + 16 * (half - still) + rotated * 2)
            even, odd = rounding.rotate(even, odd, cos, sin)
        words.append(rounding.bf16_pair(even, odd))
    mixed = _hadamard(words, g, t)
    largest, scales, exponents = _scales(mixed)
    for part in range_constexpr(PARTS):
        for eight in range_constexpr(4):
            pair = rounding.e2m1_values(mixed[4 * part + eight], exponents[part])
            word = ptx.mul_bf16x2(pair, scales[part])
            step = 2 * eight + t // 2
            place = _chunk(warp // 2, step, g, Int32(part)) * 16
            half = (warp % 2) ^ (step % 2)
            async_copies.store_shared_b32(operand + place + half * 8 + (t % 2) * 4, word)
    return largest


def _chunk(tile: Any, step: Any, g: Int32, part: Any) -> Int32:
    """Which 16 bytes of the operand lane `4g + part` reads for a step."""
    return (tile * STEPS + step) * 32 + part * 8 + (g ^ (2 * part))


def fragment(operand: Int32, tile: int, step: int) -> tuple[Uint32, ...]:
    """The lane's part of the A operand for 16 heads and 16 channels."""
    lane = cute.arch.lane_idx()
    place = _chunk(tile, step, lane // 4, lane % 4)
    words = async_copies.load_shared_b128(operand + place * 16)
    first, second = (words[2:], words[:2]) if step % 2 else (words[:2], words[2:])
    return first[0], second[0], first[1], second[1]


def _hadamard(words: Any, g: Int32, t: Int32) -> list[Uint32]:
    """-> channels `t` and `t + 4` of each eight, as pairs of bfloat16."""
    signs = [
        [_signs(column + (g >> 1) + 4 * (g & 1), 2 * t + row) for row in (0, 8)]
        for column in (0, 8)
    ]
    zero, nothing = Uint32(0), Float32(0.0)
    sums: list[list[Float32]] = []
    for group in range(GROUPS):
        a = (words[2 * group], zero, words[2 * group + 1], zero)
        for b in signs:
            sums.append(list(ptx.mma_bf16((nothing,) * 4, a, (b[0], b[1]))[:2]))
    span = 2
    while span < 2 * GROUPS:
        for i in range(2 * GROUPS):
            if not i & span:
                low, high = sums[i], sums[i + span]
                sums[i] = [low[0] + high[0], low[1] + high[1]]
                sums[i + span] = [low[0] - high[0], low[1] - high[1]]
        span *= 2
    scale = Float32(WIDTH**-0.5)
    return [rounding.bf16_pair(low * scale, high * scale) for low, high in sums]


def _signs(column: Int32, row: Int32) -> Uint32:
    """Two elements below each other of the Hadamard matrix of 16: +-1 by the parity of `i & j`."""
    one = Uint32(0x3F803F80)
    even = cute.arch.popc(column & row) & 1
    odd = (even + (column & 1)) & 1  # the next row's number has bit 0 as well
    return one | Uint32(even << 15) | (Uint32(odd) << Uint32(31))


def _scales(mixed: Any) -> tuple[Uint32, list[Uint32], list[Uint32]]:
    """-> code of the head's largest scale, each block's scale over it, and each block's code."""
    exponents = []
    for part in range(PARTS):
        amax = cute.arch.fmax(
            rounding.magnitude_max(mixed[4 * part : 4 * part + 4]), Float32(SMALLEST_AMAX)
        )
        amax = cute.arch.warp_reduction_max(amax, threads_in_group=4)
        exponents.append(rounding.scale_exponent(amax, E2M1_MAX))
    largest = cutlass.max(
        cutlass.max(exponents[0], exponents[1]), cutlass.max(exponents[2], exponents[3])
    )
    scales = []
    for exponent in exponents:
        field = cutlass.max(Int32(exponent) - Int32(largest) + Int32(127), Int32(0))
        scales.append(Uint32(field << 7) * Uint32(0x00010001))
    return largest, scales, exponents
