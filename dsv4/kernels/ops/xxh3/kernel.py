"""XXH3-64 accumulators of chunks in device memory, a CTA a chunk.

Sums of a block are free of order, the step from block to block is not: eight warps take 64 blocks
at a time, a thread two of a block's eight lanes, and leave sums in shared memory; eight threads of
a ninth warp run the chain over the 64 blocks before. Two buffers, one barrier a turn. The chain
bounds a single chunk to about 50 GB/s; a load has thousands of chunks at once.
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, Uint64, range_constexpr

from dsv4.kernels.device import vectors
from dsv4.kernels.reference.xxh3 import (
    BLOCK_BYTES,
    INITIAL,
    LANES,
    SCRAMBLE_PRIME,
    STRIPES,
)

BLOCKS = 64  # of a turn
PAIRS = LANES // 2
THREADS = BLOCKS * PAIRS


class Xxh3:
    """data: uint8 `[lines, 4096]`; places: int64 `[C, 2]`; secret: int64 `[32]`; acc: `[C, 8]`."""

    @cute.jit
    def __call__(
        self,
        data: cute.Tensor,
        places: cute.Tensor,
        secret: cute.Tensor,
        acc: cute.Tensor,
        stream: cuda.CUstream,
    ) -> None:
        self.kernel(data, places, secret, acc).launch(
            grid=[acc.shape[0], 1, 1], block=[THREADS + 32, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self, data: cute.Tensor, places: cute.Tensor, secret: cute.Tensor, acc: cute.Tensor
    ) -> None:
        thread, _, _ = cute.arch.thread_idx()
        chunk, _, _ = cute.arch.block_idx()
        smem = cutlass.memory.SmemAllocator()
        sums = smem.allocate_tensor(Uint64, cute.make_layout(2 * BLOCKS * LANES), 16)
        first, size = Int64(places[chunk, 0]), Int64(places[chunk, 1])
        blocks = Int32(size // BLOCK_BYTES)
        turns = (blocks + BLOCKS - 1) // BLOCKS
        lane = thread % LANES
        state = _initial(lane)
        scramble = Uint64(secret[16 + lane])
        pair, own = thread % PAIRS, thread // PAIRS
        keys = [Uint64(secret[2 * pair + n]) for n in range(STRIPES + 1)]
        last = [Uint64(secret[24 + 2 * pair + n]) for n in range(2)]
        for turn in cutlass.range(turns + 1, unroll=1):
            if thread < THREADS:
                block = turn * BLOCKS + own
                if block < blocks:
                    source = data.iterator + (first + Int64(block) * BLOCK_BYTES + pair * 16)
                    low, high = _sums(source, keys, last, block == blocks - 1)
                    at = (turn % 2) * (BLOCKS * LANES) + own * LANES + 2 * pair
                    sums[at] = low
                    sums[at + 1] = high
            if (thread >= THREADS) & (thread < THREADS + LANES) & (turn > 0):
                begin = (turn - 1) * BLOCKS
                count = cutlass.min(blocks - begin, BLOCKS)
                at = ((turn - 1) % 2) * (BLOCKS * LANES) + lane
                for step in cutlass.range(count, unroll=4):
                    state += sums[at + step * LANES]
                    if begin + step < blocks - 1:
                        state = (state ^ (state >> Uint64(47)) ^ scramble) * Uint64(SCRAMBLE_PRIME)
            cute.arch.sync_threads()
        if (thread >= THREADS) & (thread < THREADS + LANES):
            acc[chunk, lane] = Int64(state)


@cute.jit
def _sums(source: Any, keys: Any, last: Any, ends: Any) -> tuple[Uint64, Uint64]:
    """Two lanes' sums over a block. keys: of both lanes, each stripe's one further."""
    loaded = [vectors.load_b128_if(Int32(1), source + 64 * n) for n in range(STRIPES)]
    low, high = Uint64(0), Uint64(0)
    for n in range_constexpr(STRIPES):
        a, b = _word(loaded[n][0], loaded[n][1]), _word(loaded[n][2], loaded[n][3])
        key_a, key_b = keys[n], keys[n + 1]
        if n == STRIPES - 1:
            key_a, key_b = _chosen(ends, last[0], key_a), _chosen(ends, last[1], key_b)
        low += b + _product(a ^ key_a)
        high += a + _product(b ^ key_b)
    return low, high


@cute.jit
def _chosen(condition: Any, this: Uint64, other: Uint64) -> Uint64:
    if condition:
        other = this
    return other


def _word(low: Uint32, high: Uint32) -> Uint64:
    return Uint64(low) | (Uint64(high) << Uint64(32))


def _product(word: Uint64) -> Uint64:
    """Low half times high half."""
    return (word & Uint64(0xFFFFFFFF)) * (word >> Uint64(32))


@cute.jit
def _initial(lane: Int32) -> Uint64:
    state = Uint64(INITIAL[0])
    for n in range_constexpr(1, LANES):
        if lane == n:
            state = Uint64(INITIAL[n])
    return state
