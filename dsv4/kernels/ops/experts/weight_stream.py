"""The order in which a warp reads the weights of the experts, and its ring of copies.

A CTA takes units of `w13`, first the shared expert's (8 gate and 8 up rows), then the chosen ones'
(64 packed rows), and then bands of `w2` (32 rows, for the shared expert and all chosen ones), each
warp its part of the columns. What a warp reads is one sequence of slots of 128 columns: 32 rows
of NVFP4 with their scales, or 16 of FP8 with the words that hold theirs. The ring runs ahead
through this sequence whatever the warp waits for, so that weights of `w2` arrive while the last
rows of `w13` are summed, and the shared expert's before anybody knows which experts are chosen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from dsv4.kernels.core.sizes import SCALE_TILE_BYTES, SCALE_TILE_COLUMNS, SCALE_TILE_ROWS
from dsv4.kernels.device import async_copies
from dsv4.kernels.device.async_copies import PIECE_BYTES
from dsv4.kernels.device.weight_operands import ROW_STRIDE, ROWS_PER_LANE, STEP

SLABS = 8  # of w2
PIECES = 5
FP8_PIECES = 4
SCALE_AT = FP8_PIECES * PIECE_BYTES  # words of a slot of FP8
SLOT_BYTES = PIECES * PIECE_BYTES
UNIT_ROWS = 64  # of w13: two bands, gate and up of the same outputs
SHARED_ROWS = 8  # of gate and of up
BAND_ROWS = 32
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
        self.tiles13, self.tiles2 = (
            hidden // SCALE_TILE_COLUMNS,
            inter // SLABS // SCALE_TILE_COLUMNS,
        )
        self.per_slab = warps // SLABS
        self.codes13, self.codes2 = 2 * inter * hidden // 2, hidden * inter // 2
        self.scales13, self.scales2 = self.codes13 // 8, self.codes2 // 8


class Stack(NamedTuple):
    """Tensors of w13 or w2 of all experts; then of a shared expert's w1 and w3, or of its w2."""

    codes: Any
    scales: Any
    global_scales: Any
    shared: Any = None
    shared_scales: Any = None
    shared_up: Any = None
    shared_up_scales: Any = None

    def addresses(self) -> Stack:
        """Numbers of bytes in place of the tensors."""
        return Stack(*(None if one is None else one.iterator.toint() for one in self))


class Stream:
    """State of one warp.

    w13, w2: addresses. first: the lane's
    part of the first slot. count: how many experts are chosen, once that is known.
    """

    def __init__(
        self, shape: Shape, slots: int, w13: Stack, w2: Stack, first: Int32, cta: Int32, ctas: Int32
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
    has all this code, and the kernels of a step share the instruction cache: with 122 KB of code
    this launch took 47.5 us back to back and 72 us in a layer, with 77 KB 43.8 and 56. chosen:
    whether the experts are known.
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
    async_copies.commit()


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
        async_copies.copy(
            free, at[_CODES], l2=256, to=i * PIECE_BYTES, of=i * ROW_STRIDE * row_bytes
        )
    async_copies.copy(free, at[_SCALES], l2=256, to=ROWS_PER_LANE * PIECE_BYTES)


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
        at[_SCALES] += 2 * SCALE_TILE_BYTES - 8 * 16


@cute.jit
def _copy_down(stream: Any, free: Int32) -> None:
    at = stream.at
    _copy_nvfp4(free, at, stream.shape.row2)
    at[_CODES] += STEP // 2
    at[_SCALES] += 2 * SCALE_TILE_BYTES


@cute.jit
def _copy_shared_up(stream: Any, free: Int32) -> None:
    """Gate rows and up rows, 64 bytes of each at a time."""
    at, w13 = stream.at, stream.w13
    async_copies.copy(free, at[_CODES], l2=256)
    async_copies.copy(free, at[_CODES], l2=256, to=PIECE_BYTES, of=STEP // 2)
    up = at[_CODES] + (w13.shared_up - w13.shared)
    async_copies.copy(free, up, l2=256, to=2 * PIECE_BYTES)
    async_copies.copy(free, up, l2=256, to=3 * PIECE_BYTES, of=STEP // 2)
    async_copies.copy_word_around(free, at[_SCALES], SCALE_AT)
    async_copies.copy_word_around(
        free, at[_SCALES] + (w13.shared_up_scales - w13.shared_scales), SCALE_AT + 4
    )
    at[_CODES] += STEP
    at[_SCALES] += 1


@cute.jit
def _copy_shared_down(stream: Any, free: Int32) -> None:
    """Two of the lane's four rows, then the other two, then the next columns."""
    at = stream.at
    row = ROW_STRIDE * 2 * stream.shape.row2
    for i in cutlass.range_constexpr(2):
        for half in cutlass.range_constexpr(2):
            slot = (2 * i + half) * PIECE_BYTES
            async_copies.copy(free, at[_CODES], l2=256, to=slot, of=i * row + half * STEP // 2)
    async_copies.copy_word_around(free, at[_SCALES], SCALE_AT)
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
    at[_CODES] = w13.shared + row * shape.hidden + warp * (shape.steps13 * STEP) + lane % 4 * 16
    at[_SCALES] = (
        w13.shared_scales + row // SCALE_TILE_ROWS * (shape.hidden // STEP) + warp * shape.steps13
    )
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
        column = (tile * SCALE_TILE_ROWS + row) * shape.row13 + warp * (shape.steps13 * STEP // 2)
        at[_CODES] = w13.codes + index * shape.codes13 + column + lane % 4 * 16
        place = tile * shape.tiles13 + warp * (2 * shape.steps13) + lane % 4 // 2
        at[_SCALES] = w13.scales + index * shape.scales13 + place * SCALE_TILE_BYTES + row * 16
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
    in_slab = (slab * shape.hidden + tile * SCALE_TILE_ROWS + row) * shape.row2 + part * (STEP // 2)
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
    at[_CODES] = w2.shared + 2 * in_slab + lane % 4 * 16
    at[_SCALES] = w2.shared_scales + tile * (shape.inter // STEP) + warp * shape.steps2
    state[_LEFT] = Int32(2 * shape.steps2)
    state[_KIND] = Int32(_SHARED_DOWN)


@cute.jit
def _chosen_down(stream: Any, in_slab: Int32, tile: Int32, row: Int32) -> None:
    shape, state, at, w2 = stream.shape, stream.state, stream.at, stream.w2
    warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    if stream.count > 0:
        index = Int64(stream.experts[state[_EXPERT]])
        at[_CODES] = w2.codes + index * shape.codes2 + in_slab + lane % 4 * 16
        slab, part = warp // shape.per_slab, warp % shape.per_slab * shape.steps2
        place = (
            (slab * (shape.hidden // SCALE_TILE_ROWS) + tile) * shape.tiles2
            + 2 * part
            + lane % 4 // 2
        )
        at[_SCALES] = w2.scales + index * shape.scales2 + place * SCALE_TILE_BYTES + row * 16
        state[_LEFT] = Int32(shape.steps2)
        state[_KIND] = Int32(_DOWN)
