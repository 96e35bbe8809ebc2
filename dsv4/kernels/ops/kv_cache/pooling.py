"""A compressor's pooling: per channel, the softmax of the gates over a block's slots weighs them.

Tokens of the step are read from its inputs, older ones from the ring, so that no CTA waits for
another: a ring is long enough that the step's tokens overwrite none that its rows still need.
"""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, range_constexpr

from dsv4.kernels.device import async_copies, conversions, global_memory, shared_memory
from dsv4.kernels.device.async_copies import LANE_BYTES
from dsv4.kernels.device.elementary import LOG2_E
from dsv4.kernels.ops.kv_cache.rows import CHANNELS


class Softmax(NamedTuple):
    """A thread's running softmax over the slots of a block, registers, one a channel: the largest
    gate, -inf at first; the sum of the weights relative to it; the weighted sum.
    """

    largest: cute.Tensor
    weights: cute.Tensor
    values: cute.Tensor


LARGEST, WEIGHTS, VALUES = range(len(Softmax._fields))  # where groups lay them down for each other


class Inputs(NamedTuple):
    """Tensors of a compressor: what is projected from the tokens, kv and gate float32 `[T, C]`; ape
    `[ratio, C]`; the norm of an entry, `[width]`; ring_kv, ring_gate float32 `[S, ring, C]`;
    entries and scales uint8 `[S, capacity, ...]`.
    """

    kv: cute.Tensor
    gate: cute.Tensor
    ape: cute.Tensor
    norm: cute.Tensor
    ring_kv: cute.Tensor
    ring_gate: cute.Tensor
    entries: cute.Tensor
    scales: cute.Tensor


class Token(NamedTuple):
    """A row, its position, its slot of the caches; together: how many rows of its sequence end with
    it, counted no further than a block's slots.
    """

    row: Int32
    position: Int32
    slot: Int32
    together: Int32


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
        self.stage_bytes = self.batch * 3 * LANE_BYTES  # of shared memory for one thread


@cute.jit
def write_ring(
    sizes: cutlass.Constexpr,
    inputs: Inputs,
    token: Token,
    thread: Int32,
    threads: cutlass.Constexpr,
) -> None:
    """Put the token into the ring, its gate with `ape` added."""
    kv, gate, ape = inputs.kv, inputs.gate, inputs.ape
    ring_kv, ring_gate = inputs.ring_kv, inputs.ring_gate
    row, position, slot, _ = token
    length = ring_kv.shape[1]
    source = (row * sizes.channels).to(Int64)
    target = (slot.to(Int64) * length + position % length) * sizes.channels
    place = position % sizes.ratio * sizes.channels
    loaded = []
    for turn in range_constexpr(sizes.channels // (CHANNELS * threads)):
        column = (turn * threads + thread) * CHANNELS
        for tensor, offset in ((kv, source), (gate, source), (ape, place)):
            loaded.append(global_memory.load_floats((tensor.iterator + offset + column).toint(), 4))
    for turn in range_constexpr(sizes.channels // (CHANNELS * threads)):
        column = (turn * threads + thread) * CHANNELS
        values, gates, added = loaded[3 * turn : 3 * turn + 3]
        global_memory.store_floats((ring_kv.iterator + target + column).toint(), values)
        global_memory.store_floats(
            (ring_gate.iterator + target + column).toint(),
            tuple(gates[i] + added[i] for i in range(CHANNELS)),
        )


@cute.jit
def place_of(
    sizes: cutlass.Constexpr, row: Int32, position: cute.Tensor, slot: cute.Tensor
) -> Token:
    """The token of a row. Rows of a sequence stand together in ascending order."""
    lane = cute.arch.lane_idx()
    own_position, own_slot = position[row], slot[row]
    earlier = []
    for turn in range_constexpr(-(-sizes.slots // 32)):
        back = lane + 32 * turn
        other = cutlass.max(row - back, 0)
        earlier.append((position[other] + back, slot[other], back <= row))
    count = Int32(0)
    whole = Int32(1)
    for turn in range_constexpr(-(-sizes.slots // 32)):
        reached, beside, exists = earlier[turn]
        same = exists & (reached == own_position) & (beside == own_slot)
        others = ~cute.arch.vote_ballot_sync(same)
        run = cute.arch.clz(cute.arch.brev(others))
        count += run * whole
        whole = whole if others == 0 else Int32(0)
    return Token(row, own_position, own_slot, count)


@cute.jit
def fetch(
    sizes: cutlass.Constexpr,
    inputs: Inputs,
    token: Token,
    first: Int32,
    column: Int32,
    stage: Int32,
    threads: cutlass.Constexpr,
) -> None:
    """Ask for a batch of slots from `first` on: their values, gates, and what is added to those.

    token: the one that completes the block. stage: the thread's bytes in shared memory,
    `[slot][3][thread][16]`. A token before the sequence's first counts as zeros.
    """
    kv, gate, ape = inputs.kv, inputs.gate, inputs.ape
    ring_kv, ring_gate = inputs.ring_kv, inputs.ring_gate
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
        target = stage + i * 3 * threads * LANE_BYTES
        async_copies.copy_or_zero(target, kv_at, exists)
        async_copies.copy_or_zero(target + threads * LANE_BYTES, gate_at, exists)
        async_copies.copy_or_zero(target + 2 * threads * LANE_BYTES, ape_at, Int32(here))
    async_copies.commit()


@cute.jit
def pool(
    sizes: cutlass.Constexpr,
    position: Int32,
    first: Int32,
    stage: Int32,
    threads: cutlass.Constexpr,
    state: Softmax,
) -> None:
    """Add a batch of slots, fetched before, to the thread's running softmax.

    position: of the token that completes the block.
    """
    async_copies.wait(0)
    values, gates = [], []
    for i in range_constexpr(sizes.batch):
        source = stage + i * 3 * threads * LANE_BYTES
        values.append(shared_memory.load_floats(source, 4))
        raw = shared_memory.load_floats(source + threads * LANE_BYTES, 4)
        added = shared_memory.load_floats(source + 2 * threads * LANE_BYTES, 4)
        back = (sizes.slots - 1) - (first + i)
        absent = Float32(-float("inf"))
        gates.append([raw[c] + added[c] if position >= back else absent for c in range(CHANNELS)])
    for c in range_constexpr(CHANNELS):
        largest = state.largest[c]
        for i in range_constexpr(sizes.batch):
            largest = cute.arch.fmax(largest, gates[i][c])
        shrink = _weight(state.largest[c], largest)
        weight_sum, value_sum = state.weights[c] * shrink, state.values[c] * shrink
        for i in range_constexpr(sizes.batch):
            weight = _weight(gates[i][c], largest)
            weight_sum += weight
            value_sum += weight * values[i][c]
        state.largest[c], state.weights[c], state.values[c] = largest, weight_sum, value_sum


@cute.jit
def give(state: Softmax, others: cute.Tensor, group: Int32, team: Int32) -> None:
    """Leave what a group of threads pooled for another: others float32 `[3, 4, groups, threads]`,
    the softmax's fields in their order.
    """
    for c in range_constexpr(CHANNELS):
        for field in range_constexpr(len(Softmax._fields)):
            others[field, c, group, team] = state[field][c]


@cute.jit
def merge(state: Softmax, others: cute.Tensor, groups: cutlass.Constexpr, team: Int32) -> None:
    """Add what other groups gave (`give`), in their order."""
    for c in range_constexpr(CHANNELS):
        largest = state.largest[c]
        for group in range_constexpr(groups):
            largest = cute.arch.fmax(largest, others[LARGEST, c, group, team])
        shrink = _weight(state.largest[c], largest)
        weight_sum, value_sum = state.weights[c] * shrink, state.values[c] * shrink
        for group in range_constexpr(groups):
            shrink = _weight(others[LARGEST, c, group, team], largest)
            weight_sum += others[WEIGHTS, c, group, team] * shrink
            value_sum += others[VALUES, c, group, team] * shrink
        state.largest[c], state.weights[c], state.values[c] = largest, weight_sum, value_sum


def empty() -> Softmax:
    """Over no slots."""
    state = Softmax(*(cute.make_rmem_tensor(CHANNELS, Float32) for _ in Softmax._fields))
    state.largest.fill(-float("inf"))
    state.weights.fill(0.0)
    state.values.fill(0.0)
    return state


def pooled(state: Softmax) -> list[Float32]:
    """The weighted mean, rounded to bfloat16's values."""
    return conversions.to_bf16([state.values[c] / state.weights[c] for c in range(CHANNELS)])


def _weight(gate: Float32, largest: Float32) -> Float32:
    return cute.math.exp2((gate - largest) * Float32(LOG2_E), fastmath=True)
