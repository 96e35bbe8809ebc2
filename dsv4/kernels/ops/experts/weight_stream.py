"""The order in which a warp reads the weights of the experts, and its ring of copies.

A CTA takes units of `w13`, first the shared expert's (8 gate and 8 up rows), then the chosen ones'
(64 packed rows), and then bands of `w2` (32 rows, for the shared expert and all chosen ones), each
warp its part of the columns. What a warp reads is one sequence of slots of 128 columns: 32 rows
of NVFP4 with their scales, or 16 of FP8 with the words that hold theirs. The ring runs ahead
through this sequence whatever the warp waits for, so that weights of `w2` arrive while the last
rows of `w13` are summed, and the shared expert's before anybody knows which experts are chosen.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from dsv4.kernels.core.sizes import SCALE_TILE_BYTES, SCALE_TILE_COLUMNS, SCALE_TILE_ROWS
from dsv4.kernels.device import async_copies
from dsv4.kernels.device.async_copies import PIECE_BYTES
from dsv4.kernels.device.weight_operands import ROW_STRIDE, ROWS_PER_LANE, STEP
from dsv4.kernels.ops.experts.record import W2_SLABS as SLABS
from dsv4.kernels.ops.experts.record import Record

PIECES = 5
FP8_PIECES = 4
SCALE_AT = FP8_PIECES * PIECE_BYTES  # words of a slot of FP8
SLOT_BYTES = PIECES * PIECE_BYTES
UNIT_ROWS = 64  # of w13: two bands, gate and up of the same outputs
SHARED_ROWS = 8  # of gate and of up
BAND_ROWS = 32
SHARED = -1  # in the place of a chosen expert

_UP, _DOWN, _SHARED_UP, _SHARED_DOWN = range(4)  # what is being read


class State(enum.IntEnum):
    """Registers that say where a warp is in the sequence: its next units and band, the next expert
    of the band, what is being read, how many slots of it are left, the slot that is read next.
    """

    SHARED_UNIT = 0
    UNIT = 1
    BAND = 2
    EXPERT = 3
    KIND = 4
    LEFT = 5
    SLOT = 6


class Source(enum.IntEnum):
    """Registers with the addresses of what the lane asks for next."""

    CODES = 0
    SCALES = 1


class Shape:
    """Sizes of one expert's matrices, rows, tiles and whole ones in bytes, and its parts.

    warps: of a CTA, 8 or 16. shared: whether there is a shared expert.
    """

    def __init__(self, hidden: int, inter: int, warps: int, shared: bool) -> None:
        if hidden % (warps * STEP) or inter % (warps * STEP):
            raise ValueError(f"{hidden} x {inter} does not divide into {warps} times {STEP}")
        self.hidden, self.inter, self.warps, self.shared = hidden, inter, warps, shared
        self.units = 2 * inter // UNIT_ROWS
        self.shared_units = inter // SHARED_ROWS if shared else 0
        self.bands = hidden // BAND_ROWS
        self.steps13 = hidden // STEP // warps  # of a warp
        self.steps2 = inter // STEP // warps
        self.row13, self.row2 = hidden // 2, inter // SLABS // 2
        self.tiles13, self.tiles2 = (
            hidden // SCALE_TILE_COLUMNS,
            inter // SLABS // SCALE_TILE_COLUMNS,
        )
        self.per_slab = warps // SLABS
        self.record = Record(hidden, inter)


class Shared(NamedTuple):
    """The shared expert's w1, w3 and w2, its codes and scales: tensors, or their addresses."""

    up: Any
    up_scales: Any
    up3: Any
    up3_scales: Any
    down: Any
    down_scales: Any

    @classmethod
    def of(cls, w13: Any, w2: Any) -> Shared | None:
        """Addresses of what follows the global scales among the arguments; None for nothing."""
        tensors = (*w13[1:], *w2[1:])
        return cls(*(one.iterator.toint() for one in tensors)) if tensors else None


class Stream:
    """State of one warp.

    records: address of the first record; shared: of the shared expert. first: the lane's part of
    the first slot. count: how many experts are chosen, once that is known; places: their records'.
    """

    def __init__(
        self,
        shape: Shape,
        slots: int,
        records: Int64,
        shared: Shared | None,
        first: Int32,
        cta: Int32,
        ctas: Int32,
    ) -> None:
        self.shape, self.slots, self.records, self.shared = shape, slots, records, shared
        self.first, self.cta, self.ctas = first, cta, ctas
        self.last_cta = ctas - 1 - cta
        self.places: Any = None
        self.count: Any = None
        self.state = cute.make_rmem_tensor(len(State), Int32)
        self.at = cute.make_rmem_tensor(len(Source), Int64)

    def units(self) -> tuple[Int32, Int32, Int32]:
        """Bounds and stride of the CTA's units of the chosen experts."""
        return self.cta, self.count * self.shape.units, self.ctas

    def shared_units(self) -> tuple[Int32, int, Int32]:
        """Of the shared expert: CTAs that have most units of the chosen ones begin last."""
        return self.last_cta, self.shape.shared_units, self.ctas

    def bands(self) -> tuple[Int32, int, Int32]:
        """Of rows of w2."""
        return self.last_cta, self.shape.bands, self.ctas


@cute.jit
def start(stream: Any) -> None:
    """Ask for the first slots, as far as they are the shared expert's."""
    state = stream.state
    state.fill(0)
    stream.at.fill(0)
    state[State.SHARED_UNIT], state[State.UNIT], state[State.BAND] = (
        stream.last_cta,
        stream.cta,
        stream.last_cta,
    )
    state[State.EXPERT] = Int32(SHARED if stream.shape.shared else 0)
    state[State.SLOT] = stream.first
    if cutlass.const_expr(stream.shape.shared):
        known = _shared_slots(stream)
        for index in cutlass.range(stream.slots, unroll=1):
            if index < known:
                refill(stream, stream.first + index * SLOT_BYTES, chosen=False)


@cute.jit
def go_on(stream: Any, places: Any, count: Int32) -> None:
    """Ask for the other slots. places: of the chosen experts' records, in shared memory."""
    stream.places, stream.count = places, count
    known = Int32(0)
    if cutlass.const_expr(stream.shape.shared):
        known = _shared_slots(stream)
    for index in cutlass.range(stream.slots, unroll=1):
        if index >= known:
            refill(stream, stream.first + index * SLOT_BYTES)


def _shared_slots(stream: Any) -> Int32:
    first, end, stride = stream.shared_units()
    return (end - first + stride - 1) // stride * stream.shape.steps13


@cute.jit
def take(stream: Any) -> Int32:
    """-> the slot that is read next; the one behind it is next then."""
    state = stream.state
    slot = state[State.SLOT]
    following = slot + SLOT_BYTES
    if following == stream.first + stream.slots * SLOT_BYTES:
        following = stream.first
    state[State.SLOT] = following
    return slot


@cute.jit
def refill(stream: Any, free: Int32, phase: str = "shared", chosen: bool = True) -> None:
    """Ask for the next slot of the sequence, to lie in `free`; close a group in any case.

    phase: what the warp is reading: what it asks for lies there or behind. Every place that asks
    has all this code, and the kernels of a step share the instruction cache: with 122 KB of code
    this launch took 47.5 us back to back and 72 us in a layer, with 77 KB 43.8 and 56. chosen:
    whether the experts are known.
    """
    shape, state = stream.shape, stream.state
    if state[State.LEFT] == 0:
        if cutlass.const_expr(phase == "bands"):
            if state[State.BAND] < shape.bands:
                _band(stream)
        elif cutlass.const_expr(phase == "units" or not shape.shared):
            _chosen_up(stream)
        else:
            if state[State.SHARED_UNIT] < shape.shared_units:
                _shared_up(stream)
            elif cutlass.const_expr(chosen):
                _chosen_up(stream)
    if state[State.LEFT] > 0:
        if cutlass.const_expr(not chosen):
            _copy_shared_up(stream, free)
        elif cutlass.const_expr(phase == "bands"):
            _copy_down_any(stream, free)
        else:
            if state[State.KIND] == _UP:
                _copy_up(stream, free)
            elif cutlass.const_expr(phase == "units" or not shape.shared):
                _copy_down_any(stream, free)
            else:
                if state[State.KIND] == _SHARED_UP:
                    _copy_shared_up(stream, free)
                else:
                    _copy_down_any(stream, free)
        state[State.LEFT] -= 1
    async_copies.commit()


@cute.jit
def _copy_down_any(stream: Any, free: Int32) -> None:
    if cutlass.const_expr(not stream.shape.shared):
        _copy_down(stream, free)
    else:
        if stream.state[State.KIND] == _DOWN:
            _copy_down(stream, free)
        else:
            _copy_shared_down(stream, free)


@cute.jit
def _copy_nvfp4(free: Int32, at: Any, row_bytes: int) -> None:
    for i in cutlass.range_constexpr(ROWS_PER_LANE):
        async_copies.copy(
            free, at[Source.CODES], l2=256, to=i * PIECE_BYTES, of=i * ROW_STRIDE * row_bytes
        )
    async_copies.copy(free, at[Source.SCALES], l2=256, to=ROWS_PER_LANE * PIECE_BYTES)


@cute.jit
def _copy_up(stream: Any, free: Int32) -> None:
    """Gate rows, then the up rows beside them, then the next columns."""
    at, down = stream.at, 8 * stream.shape.row13
    _copy_nvfp4(free, at, stream.shape.row13)
    if stream.state[State.LEFT] % 2 == 0:
        at[Source.CODES] += down
        at[Source.SCALES] += 8 * 16
    else:
        at[Source.CODES] += STEP // 2 - down
        at[Source.SCALES] += 2 * SCALE_TILE_BYTES - 8 * 16


@cute.jit
def _copy_down(stream: Any, free: Int32) -> None:
    at = stream.at
    _copy_nvfp4(free, at, stream.shape.row2)
    at[Source.CODES] += STEP // 2
    at[Source.SCALES] += 2 * SCALE_TILE_BYTES


@cute.jit
def _copy_shared_up(stream: Any, free: Int32) -> None:
    """Gate rows and up rows, 64 bytes of each at a time."""
    at, shared = stream.at, stream.shared
    async_copies.copy(free, at[Source.CODES], l2=256)
    async_copies.copy(free, at[Source.CODES], l2=256, to=PIECE_BYTES, of=STEP // 2)
    up = at[Source.CODES] + (shared.up3 - shared.up)
    async_copies.copy(free, up, l2=256, to=2 * PIECE_BYTES)
    async_copies.copy(free, up, l2=256, to=3 * PIECE_BYTES, of=STEP // 2)
    async_copies.copy_word_around(free, at[Source.SCALES], SCALE_AT)
    async_copies.copy_word_around(
        free, at[Source.SCALES] + (shared.up3_scales - shared.up_scales), SCALE_AT + 4
    )
    at[Source.CODES] += STEP
    at[Source.SCALES] += 1


@cute.jit
def _copy_shared_down(stream: Any, free: Int32) -> None:
    """Two of the lane's four rows, then the other two, then the next columns."""
    at = stream.at
    row = ROW_STRIDE * 2 * stream.shape.row2
    for i in cutlass.range_constexpr(2):
        for half in cutlass.range_constexpr(2):
            slot = (2 * i + half) * PIECE_BYTES
            async_copies.copy(
                free, at[Source.CODES], l2=256, to=slot, of=i * row + half * STEP // 2
            )
    async_copies.copy_word_around(free, at[Source.SCALES], SCALE_AT)
    if stream.state[State.LEFT] % 2 == 0:
        at[Source.CODES] += 2 * row
    else:
        at[Source.CODES] += STEP - 2 * row
        at[Source.SCALES] += 1


@cute.jit
def _shared_up(stream: Any) -> None:
    """A unit of the shared expert."""
    shape, state, at, shared = stream.shape, stream.state, stream.at, stream.shared
    warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    row = state[State.SHARED_UNIT] * SHARED_ROWS + lane // 4
    at[Source.CODES] = (
        shared.up + row * shape.hidden + warp * (shape.steps13 * STEP) + lane % 4 * 16
    )
    at[Source.SCALES] = (
        shared.up_scales + row // SCALE_TILE_ROWS * (shape.hidden // STEP) + warp * shape.steps13
    )
    state[State.LEFT] = Int32(shape.steps13)
    state[State.KIND] = Int32(_SHARED_UP)
    state[State.SHARED_UNIT] += stream.ctas


@cute.jit
def _record(stream: Any, expert: Int32) -> Int64:
    """Address of the record of the chosen expert number `expert`."""
    return stream.records + Int64(stream.places[expert]) * stream.shape.record.nbytes


@cute.jit
def _chosen_up(stream: Any) -> None:
    """A unit of a chosen expert; what follows when there are no more."""
    shape, state, at = stream.shape, stream.state, stream.at
    warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    if state[State.UNIT] < stream.count * shape.units:
        expert, unit = state[State.UNIT] // shape.units, state[State.UNIT] % shape.units
        tile, row = unit // 2, unit % 2 * 16 + lane // 4
        record = _record(stream, expert)
        column = (tile * SCALE_TILE_ROWS + row) * shape.row13 + warp * (shape.steps13 * STEP // 2)
        at[Source.CODES] = record + column + lane % 4 * 16
        place = tile * shape.tiles13 + warp * (2 * shape.steps13) + lane % 4 // 2
        at[Source.SCALES] = (
            record + shape.record.scales13_at + (place * SCALE_TILE_BYTES + row * 16)
        )
        state[State.LEFT] = Int32(2 * shape.steps13)
        state[State.KIND] = Int32(_UP)
        state[State.UNIT] += stream.ctas
    elif state[State.BAND] < shape.bands:
        _band(stream)


@cute.jit
def _band(stream: Any) -> None:
    """One expert's part of a band."""
    shape, state = stream.shape, stream.state
    warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    tile, row = state[State.BAND] // 4, state[State.BAND] % 4 * 8 + lane // 4
    slab, part = warp // shape.per_slab, warp % shape.per_slab * shape.steps2
    in_slab = (slab * shape.hidden + tile * SCALE_TILE_ROWS + row) * shape.row2 + part * (STEP // 2)
    if cutlass.const_expr(not shape.shared):
        _chosen_down(stream, in_slab, tile, row)
    else:
        if state[State.EXPERT] == SHARED:
            _shared_down(stream, in_slab, tile)
        else:
            _chosen_down(stream, in_slab, tile, row)
    state[State.EXPERT] += 1
    if state[State.EXPERT] >= stream.count:
        state[State.EXPERT] = Int32(SHARED if shape.shared else 0)
        state[State.BAND] += stream.ctas


@cute.jit
def _shared_down(stream: Any, in_slab: Int32, tile: Int32) -> None:
    shape, state, at, shared = stream.shape, stream.state, stream.at, stream.shared
    warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    at[Source.CODES] = shared.down + 2 * in_slab + lane % 4 * 16
    at[Source.SCALES] = shared.down_scales + tile * (shape.inter // STEP) + warp * shape.steps2
    state[State.LEFT] = Int32(2 * shape.steps2)
    state[State.KIND] = Int32(_SHARED_DOWN)


@cute.jit
def _chosen_down(stream: Any, in_slab: Int32, tile: Int32, row: Int32) -> None:
    shape, state, at = stream.shape, stream.state, stream.at
    warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    if stream.count > 0:
        record = _record(stream, state[State.EXPERT])
        at[Source.CODES] = record + shape.record.codes2_at + (in_slab + lane % 4 * 16)
        slab, part = warp // shape.per_slab, warp % shape.per_slab * shape.steps2
        place = (
            (slab * (shape.hidden // SCALE_TILE_ROWS) + tile) * shape.tiles2
            + 2 * part
            + lane % 4 // 2
        )
        at[Source.SCALES] = record + shape.record.scales2_at + (place * SCALE_TILE_BYTES + row * 16)
        state[State.LEFT] = Int32(shape.steps2)
        state[State.KIND] = Int32(_DOWN)
