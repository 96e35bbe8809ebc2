"""A vector held by a team of threads, four neighbouring channels each: its norm, its cache row.

A team is as many whole warps as the vector has quarters; `column` is a thread's first channel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Float64, Int32, Int64, Uint32, range_constexpr

from dsv4.kernels.device import arithmetic, conversions, global_memory, rounding

CHANNELS = 4  # of one thread
KV_BLOCK = 64  # channels per scale of a key/value row
KV_SCALES = 8  # bytes of a row's scales
E4M3_MAX = 448.0
SMALLEST_KV_AMAX = 1e-4
INDEXER_BLOCK = 32
E2M1_MAX = 6.0
SMALLEST_INDEXER_AMAX = 6.0 * 2.0**-126


class Turn(NamedTuple):
    """Cosines and sines for the thread's two pairs of channels."""

    cos: tuple[Float32, ...]
    sin: tuple[Float32, ...]


def square_sum(values: Any) -> Float64:
    """Of the thread's float32 values: exact products, FP64 sums, two chains of them."""
    sums = [Float64(0.0), Float64(0.0)]
    for i, value in enumerate(values):
        wide = value.to(Float64)
        sums[i % 2] = sums[i % 2] + wide * wide
    return sums[0] + sums[1]


@cute.jit
def team_sum(own: Float64, partial: cute.Tensor, warps: cutlass.Constexpr) -> Float64:
    """Over a team of `warps` warps, of which warp 0 is the CTA's first; partial: float64 `[warps]`.

    Every thread gets the same sum, made in the same order.
    """
    warp_sum = cute.arch.warp_reduction_sum(own)
    own_warp = cute.arch.warp_idx()  # shuffles: not in a branch of some lanes
    if cute.arch.lane_idx() == 0:
        partial[own_warp] = warp_sum
    cute.arch.barrier(barrier_id=1, number_of_threads=32 * warps)
    whole = Float64(0.0)
    for warp in range_constexpr(warps):
        whole += partial[warp]
    return whole


def normed(values: Any, weights: Any, squares: Float64, width: int, eps: float) -> list[Float32]:
    """`weight · (value · rsqrt(mean square + eps))`, rounded to bfloat16's values."""
    inverse = rounding.inverse_root(squares * Float64(1.0 / width) + Float64(eps))
    return conversions.to_bf16(
        [
            arithmetic.product(weight, arithmetic.product(value, inverse))
            for value, weight in zip(values, weights, strict=True)
        ]
    )


def rotated(values: Any, turn: Turn) -> tuple[Uint32, Uint32]:
    """The thread's two pairs of channels, turned, as pairs of bfloat16."""
    words = []
    for i in range(2):
        even, odd = rounding.rotate(values[2 * i], values[2 * i + 1], turn.cos[i], turn.sin[i])
        words.append(conversions.bf16_pair(even, odd))
    return words[0], words[1]


def turn_of(
    tables: tuple[cute.Tensor, cute.Tensor], position: Int32, column: Int32, nope: int
) -> Turn:
    """From tables of cosines and sines; of any pairs where the thread has no rotated channel."""
    return Turn(*(_angles(table, position, column, nope) for table in tables))


@cute.jit
def _angles(table: cute.Tensor, position: Int32, column: Int32, nope: cutlass.Constexpr) -> Any:
    pair = cutlass.max(column - nope, 0) // 2
    return global_memory.load_floats((table.iterator + position * table.shape[1] + pair).toint(), 2)


@cute.jit
def store_kv_row(
    values: Any,
    turn: Turn,
    column: Int32,
    nope: cutlass.Constexpr,
    row: Int64,
    scales: Int64,
) -> None:
    """Round a key/value vector (values of bfloat16) into its cache row.

    row: address of `nope` E4M3 bytes and the rotated channels as bfloat16; scales: of its E8M0
    bytes, one for each 64 channels, then 0.
    """
    if column >= nope:
        global_memory.store_words(row + nope + 2 * (column - nope).to(Int64), rotated(values, turn))
    amax = Float32(SMALLEST_KV_AMAX)
    for value in values:
        amax = cute.arch.fmax(amax, cute.arch.fmax(value, -value))
    threads = KV_BLOCK // CHANNELS
    amax = cute.arch.warp_reduction_max(amax, threads_in_group=threads)
    exponent = rounding.scale_exponent(amax, E4M3_MAX)
    if column < nope:
        inverse = rounding.inverse_scale(exponent)
        codes = conversions.e4m3_word([arithmetic.product(value, inverse) for value in values])
        global_memory.store_word(row + column.to(Int64), codes)
    block = column // KV_BLOCK
    if (column % KV_BLOCK == 0) & (block < KV_SCALES):
        global_memory.store_byte(scales + block.to(Int64), exponent if column < nope else Uint32(0))


@cute.jit
def store_index_key(
    values: Any,
    turn: Turn,
    column: Int32,
    width: cutlass.Constexpr,
    nope: cutlass.Constexpr,
    row: Int64,
    scales: Int64,
) -> None:
    """Rotate, spread (Hadamard) and round an indexer key, held by one warp.

    row: address of `width / 2` bytes of E2M1 codes, the even channel low; scales: of one E8M0 byte
    for each 32 channels.
    """
    first, second = rotated(values, turn)
    turned = [
        conversions.bf16_low(first),
        conversions.bf16_high(first),
        conversions.bf16_low(second),
        conversions.bf16_high(second),
    ]
    mixed = [turned[i] if column >= nope else values[i] for i in range(CHANNELS)]
    a, b, c, d = hadamard_lane(mixed, width)
    pairs = (conversions.bf16_pair(a, c), conversions.bf16_pair(b, d))
    amax = cutlass.max(rounding.magnitude_max(pairs).bitcast(Uint32), _bits(SMALLEST_INDEXER_AMAX))
    threads = INDEXER_BLOCK // CHANNELS
    amax = cute.arch.warp_reduction(amax, cutlass.max, threads_in_group=threads)
    exponent = rounding.scale_exponent(amax.bitcast(Float32), E2M1_MAX)
    nibbles = rounding.e2m1_codes(pairs[0], exponent)
    nibbles |= rounding.e2m1_codes(pairs[1], exponent) << 4
    global_memory.store_half(row + (column // 2).to(Int64), (nibbles | (nibbles >> 8)) & 0xFFFF)
    if column % INDEXER_BLOCK == 0:
        global_memory.store_byte(scales + (column // INDEXER_BLOCK).to(Int64), exponent)


def hadamard_lane(values: Any, width: int) -> list[Float32]:
    """Walsh-Hadamard transform over a warp that holds four neighbouring channels a lane."""
    a, b, c, d = values
    a, b, c, d = a + b, a - b, c + d, c - d
    mixed = [a + c, b + d, a - c, b - d]
    lane = cute.arch.lane_idx()
    for stage in range(5):
        # The upper lane of two subtracts its own from what it gets.
        sign = (1 - 2 * ((lane >> stage) & 1)).to(Float32)
        mixed = [
            value * sign + cute.arch.shuffle_sync_bfly(value, offset=1 << stage) for value in mixed
        ]
    return [value * Float32(width**-0.5) for value in mixed]


def _bits(value: float) -> Uint32:
    return Float32(value).bitcast(Uint32)
