"""The order in which a warp reads the weights of the experts, and its ring of copies.

A CTA takes units of `w13`, first the shared expert's (8 gate and 8 up rows), then the chosen ones'
(64 packed rows), and then bands of `w2` (32 rows, for the shared expert and all chosen ones), each
warp its part of the columns. What a warp reads is one sequence of slots of 128 columns: 32 rows
of NVFP4 with their scales, or 16 of FP8 with the words that hold theirs. The ring runs ahead
through this sequence whatever the warp waits for, so that weights of `w2` arrive while the last
rows of `w13` are summed, and the shared expert's before anybody knows which experts are chosen.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from dsv4.kernels.device import raw_memory, ring
from dsv4.kernels.device.weight_operands import ROW_STRIDE, ROWS_PER_LANE, STEP

SLABS = 8  # of w2
PIECES = 5
FP8_PIECES = 4
SCALE_AT = FP8_PIECES * ring.PIECE_BYTES  # words of a slot of FP8
SLOT_BYTES = PIECES * ring.PIECE_BYTES
UNIT_ROWS = 64  # of w13: two bands, gate and up of the same outputs
SHARED_ROWS = 8  # of gate and of up
BAND_ROWS = 32
TILE_ROWS = 128
TILE_COLS = 64
TILE_BYTES = 512
SHARED = -1  # in the place of a chosen expert

# state: next units and band, next expert of the band, what is being read, slots of it left
_SHARED_UNIT, _UNIT, _BAND, _EXPERT, _KIND, _LEFT, _SLOT = range(7)
_UP, _DOWN, _SHARED_UP, _SHARED_DOWN = range(4)
_CODES, _SCALES = range(2)


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
        self.tiles13, self.tiles2 = hidden // TILE_COLS, inter // SLABS // TILE_COLS
        self.per_slab = warps // SLABS
        self.codes13, self.codes2 = 2 * inter * hidden // 2, hidden * inter // 2
        self.scales13, self.scales2 = self.codes13 // 8, self.codes2 // 8


class Stream:
    """State of one warp.

    w13, w2: addresses of the operands, the shared expert's behind the stacks'. first: the lane's
    part of the first slot. count: how many experts are chosen, once that is known.
    """

    def __init__(
        self, shape: Shape, slots: int, w13: Any, w2: Any, first: Int32, cta: Int32, ctas: Int32
    ) -> None:
        self.shape, self.slots, self.w13, self.w2 = shape, slots, w13, w2
        self.first, self.cta, self.ctas = first, cta, ctas
        self.last_cta = ctas - 1 - cta
        self.experts: Any = None
        self.count: Any = None
        self.state = cute.make_rmem_tensor(7, Int32)
        self.at = cute.make_rmem_tensor(2, Int64)

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
    state[_SHARED_UNIT], state[_UNIT], state[_BAND] = stream.last_cta, stream.cta, stream.last_cta
    state[_EXPERT] = Int32(SHARED if stream.shape.shared else 0)
    state[_SLOT] = stream.first
    if cutlass.const_expr(stream.shape.shared):
        known = _shared_slots(stream)
        for index in cutlass.range(stream.slots, unroll=1):
            if index < known:
                refill(stream, stream.first + index * SLOT_BYTES, chosen=False)


@cute.jit
def go_on(stream: Any, experts: Any, count: Int32) -> None:
    """Ask for the other slots. experts: in shared memory, ascending."""
    stream.experts, stream.count = experts, count
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
    slot = state[_SLOT]
    following = slot + SLOT_BYTES
    if following == stream.first + stream.slots * SLOT_BYTES:
        following = stream.first
    state[_SLOT] = following
    return slot


@cute.jit
def refill(stream: Any, free: Int32, phase: str = "shared", chosen: bool = True) -> None:
    """Ask for the next slot of the sequence, to lie in `free`; close a group in any case.

    phase: what the warp is reading: what it asks for lies there or behind. Every place that asks
    has all this code, and the instruction cache is small. chosen: whether the experts are known.
    """
    shape, state = stream.shape, stream.state
    if state[_LEFT] == 0:
        if cutlass.const_expr(phase == "bands"):
            if state[_BAND] < shape.bands:
                _band(stream)
        elif cutlass.const_expr(phase == "units" or not shape.shared):
            _chosen_up(stream)
        else:
            if state[_SHARED_UNIT] < shape.shared_units:
                _shared_up(stream)
            elif cutlass.const_expr(chosen):
                _chosen_up(stream)
    if state[_LEFT] > 0:
        if cutlass.const_expr(not chosen):
            _copy_shared_up(stream, free)
        elif cutlass.const_expr(phase == "bands"):
            _copy_down_any(stream, free)
        else:
            if state[_KIND] == _UP:
                _copy_up(stream, free)
            elif cutlass.const_expr(phase == "units" or not shape.shared):
                _copy_down_any(stream, free)
            else:
                if state[_KIND] == _SHARED_UP:
                    _copy_shared_up(stream, free)
                else:
                    _copy_down_any(stream, free)
        state[_LEFT] -= 1
    ring.commit()


@cute.jit
def _copy_down_any(stream: Any, free: Int32) -> None:
    if cutlass.const_expr(not stream.shape.shared):
        _copy_down(stream, free)
    else:
        if stream.state[_KIND] == _DOWN:
            _copy_down(stream, free)
        else:
            _copy_shared_down(stream, free)


@cute.jit
def _copy_nvfp4(free: Int32, at: Any, row_bytes: int) -> None:
    for i in cutlass.range_constexpr(ROWS_PER_LANE):
        raw_memory.copy_weights(free, i * ring.PIECE_BYTES, at[_CODES], i * ROW_STRIDE * row_bytes)
    raw_memory.copy_weights(free, ROWS_PER_LANE * ring.PIECE_BYTES, at[_SCALES], 0)


@cute.jit
def _copy_up(stream: Any, free: Int32) -> None:
    """Gate rows, then the up rows beside them, then the next columns."""
    at, down = stream.at, 8 * stream.shape.row13
    _copy_nvfp4(free, at, stream.shape.row13)
    if stream.state[_LEFT] % 2 == 0:
        at[_CODES] += down
        at[_SCALES] += 8 * 16
    else:
        at[_CODES] += STEP // 2 - down
        at[_SCALES] += 2 * TILE_BYTES - 8 * 16


@cute.jit
def _copy_down(stream: Any, free: Int32) -> None:
    at = stream.at
    _copy_nvfp4(free, at, stream.shape.row2)
    at[_CODES] += STEP // 2
    at[_SCALES] += 2 * TILE_BYTES


@cute.jit
def _copy_shared_up(stream: Any, free: Int32) -> None:
    """Gate rows and up rows, 64 bytes of each at a time."""
    at, w13 = stream.at, stream.w13
    raw_memory.copy_weights(free, 0, at[_CODES], 0)
    raw_memory.copy_weights(free, ring.PIECE_BYTES, at[_CODES], STEP // 2)
    up = at[_CODES] + (w13[4] - w13[2])
    raw_memory.copy_weights(free, 2 * ring.PIECE_BYTES, up, 0)
    raw_memory.copy_weights(free, 3 * ring.PIECE_BYTES, up, STEP // 2)
    raw_memory.copy_word(free, SCALE_AT, at[_SCALES])
    raw_memory.copy_word(free, SCALE_AT + 4, at[_SCALES] + (w13[5] - w13[3]))
    at[_CODES] += STEP
    at[_SCALES] += 1


@cute.jit
def _copy_shared_down(stream: Any, free: Int32) -> None:
    """Two of the lane's four rows, then the other two, then the next columns."""
    at = stream.at
    row = ROW_STRIDE * 2 * stream.shape.row2
    for i in cutlass.range_constexpr(2):
        for half in cutlass.range_constexpr(2):
            slot = (2 * i + half) * ring.PIECE_BYTES
            raw_memory.copy_weights(free, slot, at[_CODES], i * row + half * STEP // 2)
    raw_memory.copy_word(free, SCALE_AT, at[_SCALES])
    if stream.state[_LEFT] % 2 == 0:
        at[_CODES] += 2 * row
    else:
        at[_CODES] += STEP - 2 * row
        at[_SCALES] += 1


@cute.jit
def _shared_up(stream: Any) -> None:
    """A unit of the shared expert."""
    shape, state, at, w13 = stream.shape, stream.state, stream.at, stream.w13
    warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    row = state[_SHARED_UNIT] * SHARED_ROWS + lane // 4
    at[_CODES] = w13[2] + row * shape.hidden + warp * (shape.steps13 * STEP) + lane % 4 * 16
    at[_SCALES] = w13[3] + row // TILE_ROWS * (shape.hidden // STEP) + warp * shape.steps13
    state[_LEFT] = Int32(shape.steps13)
    state[_KIND] = Int32(_SHARED_UP)
    state[_SHARED_UNIT] += stream.ctas


@cute.jit
def _chosen_up(stream: Any) -> None:
    """A unit of a chosen expert; what follows when there are no more."""
    shape, state, at, w13 = stream.shape, stream.state, stream.at, stream.w13
    warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    if state[_UNIT] < stream.count * shape.units:
        expert, unit = state[_UNIT] // shape.units, state[_UNIT] % shape.units
        tile, row = unit // 2, unit % 2 * 16 + lane // 4
        index = Int64(stream.experts[expert])
        column = (tile * TILE_ROWS + row) * shape.row13 + warp * (shape.steps13 * STEP // 2)
        at[_CODES] = w13[0] + index * shape.codes13 + column + lane % 4 * 16
        place = tile * shape.tiles13 + warp * (2 * shape.steps13) + lane % 4 // 2
        at[_SCALES] = w13[1] + index * shape.scales13 + place * TILE_BYTES + row * 16
        state[_LEFT] = Int32(2 * shape.steps13)
        state[_KIND] = Int32(_UP)
        state[_UNIT] += stream.ctas
    elif state[_BAND] < shape.bands:
        _band(stream)


@cute.jit
def _band(stream: Any) -> None:
    """One expert's part of a band."""
    shape, state = stream.shape, stream.state
    warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    tile, row = state[_BAND] // 4, state[_BAND] % 4 * 8 + lane // 4
    slab, part = warp // shape.per_slab, warp % shape.per_slab * shape.steps2
    in_slab = (slab * shape.hidden + tile * TILE_ROWS + row) * shape.row2 + part * (STEP // 2)
    if cutlass.const_expr(not shape.shared):
        _chosen_down(stream, in_slab, tile, row)
    else:
        if state[_EXPERT] == SHARED:
            _shared_down(stream, in_slab, tile)
        else:
            _chosen_down(stream, in_slab, tile, row)
    state[_EXPERT] += 1
    if state[_EXPERT] >= stream.count:
        state[_EXPERT] = Int32(SHARED if shape.shared else 0)
        state[_BAND] += stream.ctas


@cute.jit
def _shared_down(stream: Any, in_slab: Int32, tile: Int32) -> None:
    shape, state, at, w2 = stream.shape, stream.state, stream.at, stream.w2
    warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    at[_CODES] = w2[2] + 2 * in_slab + lane % 4 * 16
    at[_SCALES] = w2[3] + tile * (shape.inter // STEP) + warp * shape.steps2
    state[_LEFT] = Int32(2 * shape.steps2)
    state[_KIND] = Int32(_SHARED_DOWN)


@cute.jit
def _chosen_down(stream: Any, in_slab: Int32, tile: Int32, row: Int32) -> None:
    shape, state, at, w2 = stream.shape, stream.state, stream.at, stream.w2
    warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    if stream.count > 0:
        index = Int64(stream.experts[state[_EXPERT]])
        at[_CODES] = w2[0] + index * shape.codes2 + in_slab + lane % 4 * 16
        slab, part = warp // shape.per_slab, warp % shape.per_slab * shape.steps2
        place = (
            (slab * (shape.hidden // TILE_ROWS) + tile) * shape.tiles2 + 2 * part + lane % 4 // 2
        )
        at[_SCALES] = w2[1] + index * shape.scales2 + place * TILE_BYTES + row * 16
        state[_LEFT] = Int32(shape.steps2)
        state[_KIND] = Int32(_DOWN)
