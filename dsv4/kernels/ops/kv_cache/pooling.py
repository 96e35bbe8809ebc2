"""A compressor's pooling: per channel, the softmax of the gates over a block's slots weighs them.

Tokens of the step are read from its inputs, older ones from the ring, so that no CTA waits for
another: a ring is long enough that the step's tokens overwrite none that its rows still need.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, range_constexpr

from dsv4.kernels.device import async_copies, ring
from dsv4.kernels.ops.kv_cache.rows import CHANNELS

LOG2_E = 1.4426950408889634


class Compressor:
    """The sizes of one: `ratio` tokens a block, `width` channels an entry; overlap: see below.

    With overlap a token has `2 · width` channels; the block's first `ratio` slots are the block
    before with its first half of channels, the others its own tokens with their second half.
    """

    def __init__(self, ratio: int, width: int, overlap: bool) -> None:
        self.ratio, self.width, self.overlap = ratio, width, overlap
        self.channels = width * (2 if overlap else 1)
        self.slots = ratio * (2 if overlap else 1)
        self.batch = 8 if overlap else 4  # slots a thread reads at once
        self.stage_bytes = self.batch * 3 * ring.LANE_BYTES  # of shared memory for one thread


@cute.jit
def write_ring(
    sizes: cutlass.Constexpr,
    inputs: Any,
    token: Any,
    thread: Int32,
    threads: cutlass.Constexpr,
) -> None:
    """Put the token into the ring, its gate with `ape` added. inputs, token: see `pool`."""
    kv, gate, ape, ring_kv, ring_gate = inputs
    row, position, slot, _ = token
    length = ring_kv.shape[1]
    source = (row * sizes.channels).to(Int64)
    target = (slot.to(Int64) * length + position % length) * sizes.channels
    place = position % sizes.ratio * sizes.channels
    loaded = []
    for turn in range_constexpr(sizes.channels // (CHANNELS * threads)):
        column = (turn * threads + thread) * CHANNELS
        for tensor, offset in ((kv, source), (gate, source), (ape, place)):
            loaded.append(async_copies.load_f32x4((tensor.iterator + offset + column).toint()))
    for turn in range_constexpr(sizes.channels // (CHANNELS * threads)):
        column = (turn * threads + thread) * CHANNELS
        values, gates, added = loaded[3 * turn : 3 * turn + 3]
        async_copies.store_f32x4((ring_kv.iterator + target + column).toint(), values)
        async_copies.store_f32x4(
            (ring_gate.iterator + target + column).toint(),
            tuple(gates[i] + added[i] for i in range(CHANNELS)),
        )


@cute.jit
def place_of(sizes: cutlass.Constexpr, row: Int32, position: Any, slot: Any) -> Any:
    """-> (row, its position, its slot of the caches, how many rows of its sequence end with it).

    Rows of a sequence stand together in ascending order. The last number counts no further than
    a block's slots.
    """
    lane, own = cute.arch.lane_idx(), (position[row], slot[row])
    earlier = []
    for turn in range_constexpr(-(-sizes.slots // 32)):
        back = lane + 32 * turn
        other = cutlass.max(row - back, 0)
        earlier.append((position[other] + back, slot[other], back <= row))
    count = Int32(0)
    whole = Int32(1)
    for turn in range_constexpr(-(-sizes.slots // 32)):
        reached, beside, exists = earlier[turn]
        same = exists & (reached == own[0]) & (beside == own[1])
        others = ~cute.arch.vote_ballot_sync(same)
        run = cute.arch.clz(cute.arch.brev(others))
        count += run * whole
        whole = whole if others == 0 else Int32(0)
    return row, own[0], own[1], count


@cute.jit
def fetch(
    sizes: cutlass.Constexpr,
    inputs: Any,
    token: Any,
    first: Int32,
    column: Int32,
    stage: Int32,
    threads: cutlass.Constexpr,
) -> None:
    """Ask for a batch of slots from `first` on: their values, gates, and what is added to those.

    inputs: kv, gate, ape, ring_kv, ring_gate; token: the one that completes the block (see
    `place_of`). stage: the thread's bytes in shared memory, `[slot][3][thread][16]`. A token
    before the sequence's first counts as zeros.
    """
    kv, gate, ape, ring_kv, ring_gate = inputs
    row, position, slot, together = token
    length = ring_kv.shape[1]
    newest = position % length
    for i in range_constexpr(sizes.batch):
        back = (sizes.slots - 1) - (first + i)
        at = column
        if cutlass.const_expr(sizes.overlap):
            at = column + sizes.width if back < sizes.ratio else column
        index = newest - back
        index = index + length if index < 0 else index
        old = (slot.to(Int64) * length + index) * sizes.channels + at
        new = (row - back).to(Int64) * sizes.channels + at
        here = back < together
        kv_at = (kv.iterator + new).toint() if here else (ring_kv.iterator + old).toint()
        gate_at = (gate.iterator + new).toint() if here else (ring_gate.iterator + old).toint()
        place = (sizes.ratio - 1 - back % sizes.ratio) * sizes.channels + at
        ape_at = (ape.iterator + place).toint()
        exists = Int32(position >= back)
        target = stage + i * 3 * threads * ring.LANE_BYTES
        async_copies.copy_b128_or_zero(target, kv_at, exists)
        async_copies.copy_b128_or_zero(target + threads * ring.LANE_BYTES, gate_at, exists)
        async_copies.copy_b128_or_zero(target + 2 * threads * ring.LANE_BYTES, ape_at, Int32(here))
    ring.commit()


@cute.jit
def pool(
    sizes: cutlass.Constexpr,
    position: Int32,
    first: Int32,
    stage: Int32,
    threads: cutlass.Constexpr,
    state: cute.Tensor,
) -> None:
    """Add a batch of slots, fetched before, to the thread's running softmax.

    position: of the token that completes the block. state: float32 `[3, 4]`: the largest gate, the
    sum of weights, the weighted sum; the largest is -inf at first.
    """
    ring.wait(0)
    values, gates = [], []
    for i in range_constexpr(sizes.batch):
        source = stage + i * 3 * threads * ring.LANE_BYTES
        values.append(async_copies.load_shared_f32x4(source))
        raw = async_copies.load_shared_f32x4(source + threads * ring.LANE_BYTES)
        added = async_copies.load_shared_f32x4(source + 2 * threads * ring.LANE_BYTES)
        back = (sizes.slots - 1) - (first + i)
        absent = Float32(-float("inf"))
        gates.append([raw[c] + added[c] if position >= back else absent for c in range(CHANNELS)])
    for c in range_constexpr(CHANNELS):
        largest = state[0, c]
        for i in range_constexpr(sizes.batch):
            largest = cute.arch.fmax(largest, gates[i][c])
        shrink = _weight(state[0, c], largest)
        weight_sum, value_sum = state[1, c] * shrink, state[2, c] * shrink
        for i in range_constexpr(sizes.batch):
            weight = _weight(gates[i][c], largest)
            weight_sum += weight
            value_sum += weight * values[i][c]
        state[0, c], state[1, c], state[2, c] = largest, weight_sum, value_sum


@cute.jit
def merge(state: cute.Tensor, others: cute.Tensor, groups: cutlass.Constexpr, team: Int32) -> None:
    """Add what other groups of threads pooled: others float32 `[3, 4, groups, threads]`."""
    for c in range_constexpr(CHANNELS):
        largest = state[0, c]
        for group in range_constexpr(groups):
            largest = cute.arch.fmax(largest, others[0, c, group, team])
        shrink = _weight(state[0, c], largest)
        weight_sum, value_sum = state[1, c] * shrink, state[2, c] * shrink
        for group in range_constexpr(groups):
            shrink = _weight(others[0, c, group, team], largest)
            weight_sum += others[1, c, group, team] * shrink
            value_sum += others[2, c, group, team] * shrink
        state[0, c], state[1, c], state[2, c] = largest, weight_sum, value_sum


def _weight(gate: Float32, largest: Float32) -> Float32:
    return cute.math.exp2((gate - largest) * Float32(LOG2_E), fastmath=True)
