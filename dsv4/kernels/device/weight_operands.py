"""How a warp reads a weight of each format, and turns it into the A operand of an MMA.

A warp works on 32 rows at a time, `r + 32 i` for `i` in 0..3 and eight neighbouring `r`: the four
rows of a lane are the ones that share a 16-byte run of a scale tile (32x4x4). Lane `4g + t` reads
row `g` of the eight, and 32 of a step's 128 columns, by pieces of 16 bytes: the four lanes of a row
read 64 bytes that lie together, so that no sector is fetched twice (with a stride of 32 or 64 bytes
between lanes every sector is: 22 us for 13). Which column meets which of the
MMA's does not matter as long as the activations are read and paired alike (`x_column`, `b`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import cutlass
from cutlass import Float32, Int32, Uint32

from dsv4.kernels.core.sizes import (
    SCALE_TILE_BYTES,
    SCALE_TILE_COLUMNS,
    SCALE_TILE_ROWS,
    STEP_COLUMNS,
)
from dsv4.kernels.device.arithmetic import byte_permute, mul_bf16x2
from dsv4.kernels.device.conversions import e8m0_to_f32

STEP = STEP_COLUMNS
MMAS = 8  # of 16 columns each
ROWS_PER_LANE = 4
ROW_STRIDE = 32
BAND_SUMS = 256  # of a warp's 32 rows with the eight columns of an MMA
TILE_BANDS = 4  # bands of 32 rows in a tile of 128, interleaved by eight rows

_SIGNS = 0x80008000


class WeightTensors(NamedTuple):
    """Tensors of a weight, as its format has them (`Operand.tensors`), with FP8 scales or tiled."""

    codes: Any
    scales: Any = None
    global_scale: Any = None


def first_row(band: Int32) -> Int32:
    """The first of a band's rows; the others are 1 to 7 and 32, 64 and 96 behind."""
    return (band // TILE_BANDS) * SCALE_TILE_ROWS + (band % TILE_BANDS) * 8


def sum_place(item: Int32) -> tuple[Int32, Int32]:
    """-> where number `item` of a band's sums lies among a warp's accumulators, kept as
    `[8][lane]`, and its column of the activations.

    Sums are numbered so that neighbours have neighbouring rows (`sum_row`): threads that take one
    each then write memory that lies together.
    """
    g, quarter, column = item % 8, (item // 8) % 4, item // 32
    place = ((quarter // 2) * 4 + (quarter % 2) * 2 + column % 2) * 32 + g * 4 + column // 2
    return place, column


def sum_row(band: Int32, item: Int32) -> Int32:
    """The row of the weight that number `item` of a band's sums is of."""
    return first_row(band) + item % 8 + ROW_STRIDE * ((item // 8) % 4)


class Operand:
    """A weight `[rows, cols]` in `slabs` along its columns. whole: rows are whole tiles of 128.

    tensors: how many of `WeightTensors` it has. pieces: of 16 bytes that a lane reads for a step.
    factor: what the sums are multiplied by. step_scales: whether a step's sums have a scale of
    their own, read by `step_scale`.
    """

    tensors: int
    pieces: int
    factor = 1.0
    step_scales = False

    def __init__(self, rows: Any, cols: int, slabs: int, whole: bool = True) -> None:
        self.rows, self.cols, self.slabs, self.whole = rows, cols, slabs, whole
        self.slab_cols = cols // slabs
        self.steps = cols // STEP

    def place(self, step: Int32) -> tuple[Int32, Int32]:
        """-> (slab, first column in it) of a step; slabs are whole steps."""
        if self.slabs == 1:
            return Int32(0), step * STEP
        per_slab = self.slab_cols // STEP
        return step // per_slab, (step % per_slab) * STEP

    def row(self, row: Int32, i: int) -> Int32:
        """Row `i` of the lane's four; the last row again where a tile of 128 is not full."""
        at = row + ROW_STRIDE * i
        return at if self.whole else cutlass.min(at, self.rows - 1)

    def addresses(
        self, codes: Any, scales: Any, row: Int32, step: Int32, t: Int32
    ) -> Iterator[Any]:
        """Pointers to the pieces of a step, in the order in which `a` and `prepare` know them."""
        raise NotImplementedError

    def x_column(self, piece: int, t: Int32) -> Int32:
        """Of a step's columns, the first of the eight that a lane's piece of activations holds."""
        raise NotImplementedError

    def prepare(self, words: Any, t: Int32) -> Any:
        """What several MMAs of a step share, from the words of its pieces."""
        return None

    def a(self, words: Any, prepared: Any, tile: int, mma: int) -> tuple[Any, ...]:
        """The lane's part of MMA `mma`, for the two rows of `tile`."""
        raise NotImplementedError

    def b(self, x: Any, mma: int) -> tuple[Any, Any]:
        """Activations for the same columns: x is the lane's 32, two in a word."""
        raise NotImplementedError

    def step_scale(self, scales: Any, row: Int32, step: Int32) -> Float32:
        """The scale of a step's tile."""
        raise NotImplementedError


class Nvfp4Operand(Operand):
    """E2M1 codes with a tiled E4M3 scale per 16 columns, multiplied in bfloat16: exact.

    `value * scale` has at most 6 significant bits. Codes are moved into bfloat16's fields as they
    are, which scales them by 2^-126; scales are held as `scale * 2^118`. Unpacking takes about four
    integer instructions for a pair of codes, which on an H200 is near the integer pipe's limit.
    """

    tensors = 3
    pieces = 5
    factor = 2.0**8

    def addresses(
        self, codes: Any, scales: Any, row: Int32, step: Int32, t: Int32
    ) -> Iterator[Any]:
        slab, col = self.place(step)
        half = self.slab_cols // 2
        for i in range(ROWS_PER_LANE):
            yield codes + (slab * self.rows + self.row(row, i)) * half + col // 2 + t * 16
        tiles = self.slab_cols // SCALE_TILE_COLUMNS
        tile_row = slab * (-(-self.rows // SCALE_TILE_ROWS)) + row // SCALE_TILE_ROWS
        tile = tile_row * tiles + col // SCALE_TILE_COLUMNS + t // 2
        yield scales + tile * SCALE_TILE_BYTES + (row % 32) * 16

    def x_column(self, piece: int, t: Int32) -> Int32:
        return t * 32 + piece * 8

    def prepare(self, words: Any, t: Int32) -> Any:
        """-> per row, the two block scales of the lane's columns, each twice in a word."""
        selector = Uint32(0x4140) + Uint32(t % 2) * Uint32(0x0202)
        scales = []
        for i in range(ROWS_PER_LANE):
            pair = byte_permute(words[16 + i], Uint32(0), selector) << 4
            pair = mul_bf16x2(pair, Uint32(0x7F007F00))  # 2^127
            pair = mul_bf16x2(pair, Uint32(0x77007700))  # 2^111
            scales.append(
                (
                    byte_permute(pair, pair, 0x1010),
                    byte_permute(pair, pair, 0x3232),
                )
            )
        return scales

    def a(self, words: Any, prepared: Any, tile: int, mma: int) -> tuple[Any, ...]:
        low, high = [], []
        for row in (2 * tile, 2 * tile + 1):
            word, scale = words[4 * row + mma // 2], prepared[row][mma // 4]
            half = word >> 8 if mma % 2 else word
            low.append(mul_bf16x2(_e2m1_pair(half, 0), scale))
            high.append(mul_bf16x2(_e2m1_pair(half, 1), scale))
        return (*low, *high)

    def b(self, x: Any, mma: int) -> tuple[Any, Any]:
        """Columns i and i + 4 of eight go together."""
        first, second = x[4 * (mma // 2) + mma % 2], x[4 * (mma // 2) + 2 + mma % 2]
        return byte_permute(first, second, 0x5410), byte_permute(first, second, 0x7632)


def _e2m1_pair(half: Uint32, i: int) -> Uint32:
    """Codes i and i + 4 of a word as bfloat16, times 2^-126; i is 0 or 1.

    A nibble `seem` times 2^12 + 2^6 is `seem00seem000000`: its sign is where bfloat16's sign is and
    its magnitude where the lowest two bits of the exponent and the highest of the mantissa are. A
    mask leaves just these. One multiplication takes the place of two shifts.
    """
    nibbles = half & Uint32(0x000F000F << 4 * i)
    return (nibbles * Uint32(0x1040 >> 4 * i)) & Uint32(0x81C081C0)


class Fp8Operand(Operand):
    """E4M3 codes with one E8M0 scale per 128x128 tile, applied to a step's sums: exact products."""

    tensors = 2
    pieces = 8
    step_scales = True

    def addresses(
        self, codes: Any, scales: Any, row: Int32, step: Int32, t: Int32
    ) -> Iterator[Any]:
        slab, col = self.place(step)
        for i in range(ROWS_PER_LANE):
            at = (slab * self.rows + self.row(row, i)) * self.slab_cols + col + t * 16
            yield codes + at
            yield codes + at + 64

    def x_column(self, piece: int, t: Int32) -> Int32:
        return (piece // 2) * 64 + t * 16 + (piece % 2) * 8

    def step_scale(self, scales: Any, row: Int32, step: Int32) -> Float32:
        code = (scales + (row // 128) * self.steps + step).load()
        return e8m0_to_f32(Uint32(code))

    def a(self, words: Any, prepared: Any, tile: int, mma: int) -> tuple[Any, ...]:
        rows = [words[8 * row + mma] for row in (2 * tile, 2 * tile + 1)]
        return (*(_e4m3_pair(word, 0) for word in rows), *(_e4m3_pair(word, 1) for word in rows))

    def b(self, x: Any, mma: int) -> tuple[Any, Any]:
        """Columns i and i + 2 of four go together."""
        first, second = x[2 * mma], x[2 * mma + 1]
        return byte_permute(first, second, 0x5410), byte_permute(first, second, 0x7632)


def _e4m3_pair(word: Uint32, i: int) -> Uint32:
    """Codes i and i + 2 of a word as bfloat16."""
    signs = word << 8 if i == 0 else word
    magnitudes = word << 4 if i == 0 else word >> 4
    pair = (signs & Uint32(_SIGNS)) | (magnitudes & Uint32(0x07F007F0))
    return mul_bf16x2(pair, Uint32(0x7B807B80))  # 2^120


class Bf16Operand(Operand):
    """Plain bfloat16."""

    tensors = 1
    pieces = 16

    def addresses(
        self, codes: Any, scales: Any, row: Int32, step: Int32, t: Int32
    ) -> Iterator[Any]:
        for i in range(ROWS_PER_LANE):
            at = codes + self.row(row, i) * self.cols + step * STEP + t * 8
            for part in range(4):
                yield at + 32 * part

    def x_column(self, piece: int, t: Int32) -> Int32:
        return piece * 32 + t * 8

    def a(self, words: Any, prepared: Any, tile: int, mma: int) -> tuple[Any, ...]:
        first, second = 16 * 2 * tile + 2 * mma, 16 * (2 * tile + 1) + 2 * mma
        return words[first], words[second], words[first + 1], words[second + 1]

    def b(self, x: Any, mma: int) -> tuple[Any, Any]:
        return x[2 * mma], x[2 * mma + 1]


OPERANDS: dict[str, type[Operand]] = {
    "nvfp4": Nvfp4Operand,
    "fp8": Fp8Operand,
    "bf16": Bf16Operand,
}
