"""The order in which a warp reads the weights of the experts, and its ring of copies.

A CTA takes units of `w13`, first the shared expert's (8 gate and 8 up rows), then the chosen ones'
(32 gate and 32 up rows), and then bands of `w2` (32 rows, for the shared expert and all chosen
ones), each warp its part of the columns. What a warp reads is one sequence of runs along columns,
and a run is slots of 128 columns: 32 rows of NVFP4 with their scales, or 16 of FP8 with the words
that hold theirs. The ring runs ahead through this sequence whatever the warp waits for, so that
weights of `w2` arrive while the last rows of `w13` are summed, and the shared expert's before
anybody knows which experts are chosen.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

from dsv4.kernels.sm90 import ring
from dsv4.kernels.sm90.experts import raw
from dsv4.kernels.sm90.operands import ROW_STRIDE, ROWS_PER_LANE, STEP

SLABS = 8  # of w2
PIECES = 5
FP8_PIECES = 4
SCALE_AT = FP8_PIECES * ring.PIECE_BYTES  # words of a slot of FP8
SLOT_BYTES = PIECES * ring.PIECE_BYTES
UNIT_ROWS = 64  # of w13: gate and up of the same outputs
SHARED_ROWS = 8  # of gate and of up
BAND_ROWS = 32
TILE_ROWS = 128
TILE_COLS = 64
TILE_BYTES = 512
SHARED = -1  # in the place of a chosen expert

SHARED_UP, UP, DOWN = 1, 2, 4  # kinds of runs, as bits; DOWN: also the shared expert's
EVERY = SHARED_UP | UP | DOWN

# state: the next run's unit or band, half and expert; of the run that is being read, whether it is
# FP8 and how many slots are left; the slot that is read next
_SHARED_UNIT, _UNIT, _BAND, _HALF, _EXPERT, _FP8, _LEFT, _SLOT = range(8)
# addresses: of codes and scales, and how far other rows of the lane are from them
_CODES, _SCALES, _APART, _SCALES_APART = range(4)


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
        self.early = min(slots, shape.steps13) if shape.shared else 0
        self.experts: Any = None
        self.count: Any = None
        self.state = cute.make_rmem_tensor(8, Int32)
        self.at = cute.make_rmem_tensor(4, Int64)

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
    """Ask for the first `early` slots, the shared expert's."""
    state = stream.state
    state.fill(0)
    stream.at.fill(0)
    state[_SHARED_UNIT], state[_UNIT], state[_BAND] = stream.last_cta, stream.cta, stream.last_cta
    state[_EXPERT] = Int32(SHARED if stream.shape.shared else 0)
    state[_SLOT] = stream.first
    if const_expr(stream.shape.shared):
        for index in cutlass.range(stream.early, unroll=1):
            refill(stream, stream.first + index * SLOT_BYTES, SHARED_UP)


@cute.jit
def go_on(stream: Any, experts: Any, count: Int32) -> None:
    """Ask for the other slots. experts: in shared memory, ascending."""
    stream.experts, stream.count = experts, count
    for index in cutlass.range(stream.early, stream.slots, unroll=1):
        refill(stream, stream.first + index * SLOT_BYTES, EVERY)


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
def refill(stream: Any, free: Int32, kinds: int) -> None:
    """Ask for the next slot of the sequence, to lie in `free`; close a group in any case.

    kinds: of the runs that may come here. Every place that asks has all their code, and the
    instruction cache is small.
    """
    state = stream.state
    if const_expr(not stream.shape.shared):
        kinds &= ~SHARED_UP
    if state[_LEFT] == 0:
        _next(stream, kinds)
    if state[_LEFT] > 0:
        if const_expr(kinds == SHARED_UP):
            _copy_fp8(stream, free)
        elif const_expr(not stream.shape.shared):
            _copy_nvfp4(stream, free)
        elif state[_FP8] != 0:
            _copy_fp8(stream, free)
        else:
            _copy_nvfp4(stream, free)
        state[_LEFT] -= 1
    ring.commit()


@cute.jit
def _copy_nvfp4(stream: Any, free: Int32) -> None:
    at = stream.at
    address = at[_CODES]
    for i in cutlass.range_constexpr(ROWS_PER_LANE):
        raw.copy_weights(free, i * ring.PIECE_BYTES, address, 0)
        address += at[_APART]
    raw.copy_weights(free, ROWS_PER_LANE * ring.PIECE_BYTES, at[_SCALES], 0)
    at[_CODES] += STEP // 2
    at[_SCALES] += 2 * TILE_BYTES


@cute.jit
def _copy_fp8(stream: Any, free: Int32) -> None:
    """Two rows, 64 bytes of each at a time, and the words of their scales."""
    at = stream.at
    for i in cutlass.range_constexpr(2):
        row = at[_CODES] if i == 0 else at[_CODES] + at[_APART]
        scale = at[_SCALES] if i == 0 else at[_SCALES] + at[_SCALES_APART]
        raw.copy_weights(free, 2 * i * ring.PIECE_BYTES, row, 0)
        raw.copy_weights(free, (2 * i + 1) * ring.PIECE_BYTES, row, STEP // 2)
        raw.copy_word(free, SCALE_AT + 4 * i, scale)
    at[_CODES] += STEP
    at[_SCALES] += 1


@cute.jit
def _next(stream: Any, kinds: int) -> None:
    """The next run; none after the last."""
    shape, state = stream.shape, stream.state
    if const_expr(kinds == SHARED_UP):
        if state[_SHARED_UNIT] < shape.shared_units:
            _shared_up(stream)
    elif const_expr(kinds == DOWN):
        if state[_BAND] < shape.bands:
            _down(stream)
    elif const_expr(not kinds & SHARED_UP):
        _chosen(stream)
    elif state[_SHARED_UNIT] < shape.shared_units:
        _shared_up(stream)
    else:
        _chosen(stream)


@cute.jit
def _chosen(stream: Any) -> None:
    shape, state = stream.shape, stream.state
    if state[_UNIT] < stream.count * shape.units:
        _up(stream)
    elif state[_BAND] < shape.bands:
        _down(stream)


@cute.jit
def _shared_up(stream: Any) -> None:
    """A unit of the shared expert, its gate and up rows together."""
    shape, state, at, w13 = stream.shape, stream.state, stream.at, stream.w13
    warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    row = state[_SHARED_UNIT] * SHARED_ROWS + lane // 4
    at[_CODES] = w13[2] + row * shape.hidden + warp * (shape.steps13 * STEP) + lane % 4 * 16
    at[_SCALES] = w13[3] + row // TILE_ROWS * (shape.hidden // STEP) + warp * shape.steps13
    at[_APART], at[_SCALES_APART] = w13[4] - w13[2], w13[5] - w13[3]
    state[_FP8], state[_LEFT] = Int32(1), Int32(shape.steps13)
    state[_SHARED_UNIT] += stream.ctas


@cute.jit
def _up(stream: Any) -> None:
    """Gate rows of a unit of a chosen expert, or its up rows."""
    shape, state, at, w13 = stream.shape, stream.state, stream.at, stream.w13
    warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    unit, half = state[_UNIT], state[_HALF]
    index, place = Int64(stream.experts[unit // shape.units]), unit % shape.units
    tile, row = place // 2, place % 2 * 16 + half * 8 + lane // 4
    column = (tile * TILE_ROWS + row) * shape.row13 + warp * (shape.steps13 * STEP // 2)
    at[_CODES] = w13[0] + index * shape.codes13 + column + lane % 4 * 16
    scale = tile * shape.tiles13 + warp * (2 * shape.steps13) + lane % 4 // 2
    at[_SCALES] = w13[1] + index * shape.scales13 + scale * TILE_BYTES + row * 16
    at[_APART] = Int64(ROW_STRIDE * shape.row13)
    state[_FP8], state[_LEFT] = Int32(0), Int32(shape.steps13)
    state[_UNIT] = unit + half * stream.ctas
    state[_HALF] = 1 - half


@cute.jit
def _down(stream: Any) -> None:
    """One expert's part of a band; two runs of 16 rows for the shared expert."""
    state = stream.state
    if const_expr(not stream.shape.shared):
        if stream.count > 0:
            _chosen_down(stream)
    elif state[_EXPERT] == SHARED:
        _shared_down(stream)
    else:
        _chosen_down(stream)
    if state[_EXPERT] >= stream.count:
        state[_EXPERT] = Int32(SHARED if stream.shape.shared else 0)
        state[_BAND] += stream.ctas


@cute.jit
def _in_band(stream: Any) -> tuple[Int32, Int32, Int32, Int32]:
    """-> slab, first of the warp's steps in it, tile of rows, row in the tile."""
    shape, band = stream.shape, stream.state[_BAND]
    warp, lane = cute.arch.warp_idx(), cute.arch.lane_idx()
    slab, step = warp // shape.per_slab, warp % shape.per_slab * shape.steps2
    return slab, step, band // 4, band % 4 * 8 + lane // 4


@cute.jit
def _shared_down(stream: Any) -> None:
    shape, state, at, w2 = stream.shape, stream.state, stream.at, stream.w2
    slab, step, tile, row = _in_band(stream)
    row += tile * TILE_ROWS + state[_HALF] * (2 * ROW_STRIDE)
    column = (slab * shape.hidden + row) * (2 * shape.row2) + step * STEP
    at[_CODES] = w2[2] + column + cute.arch.lane_idx() % 4 * 16
    at[_SCALES] = w2[3] + tile * (shape.inter // STEP) + cute.arch.warp_idx() * shape.steps2
    at[_APART], at[_SCALES_APART] = Int64(ROW_STRIDE * 2 * shape.row2), Int64(0)
    state[_FP8], state[_LEFT] = Int32(1), Int32(shape.steps2)
    state[_EXPERT] = SHARED + state[_HALF]
    state[_HALF] = 1 - state[_HALF]


@cute.jit
def _chosen_down(stream: Any) -> None:
    shape, state, at, w2 = stream.shape, stream.state, stream.at, stream.w2
    slab, step, tile, row = _in_band(stream)
    t = cute.arch.lane_idx() % 4
    index = Int64(stream.experts[state[_EXPERT]])
    column = (slab * shape.hidden + tile * TILE_ROWS + row) * shape.row2 + step * (STEP // 2)
    at[_CODES] = w2[0] + index * shape.codes2 + column + t * 16
    scale = (slab * (shape.hidden // TILE_ROWS) + tile) * shape.tiles2 + 2 * step + t // 2
    at[_SCALES] = w2[1] + index * shape.scales2 + scale * TILE_BYTES + row * 16
    at[_APART] = Int64(ROW_STRIDE * shape.row2)
    state[_FP8], state[_LEFT] = Int32(0), Int32(shape.steps2)
    state[_EXPERT] += 1
