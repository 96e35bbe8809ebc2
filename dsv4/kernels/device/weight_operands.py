"""How a warp reads a weight of each format, and turns it into the A operand of an MMA.

A warp works on 32 rows at a time, `r + 32 i` for `i` in 0..3 and eight neighbouring `r`: the four
rows of a lane are the ones that share a 16-byte run of a scale tile (32x4x4). Lane `4g + t` reads
row `g` of the eight, and 32 of a step's 128 columns, by pieces of 16 bytes: the four lanes of a row
read 64 bytes that lie together, so that no sector is fetched twice. Which column meets which of the
MMA's does not matter as long as the activations are read and paired alike (`x_column`, `b`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cutlass
from cutlass import Float32, Int32, Uint32

from dsv4.kernels.device import ptx

STEP = 128  # columns a warp reads at once
MMAS = 8  # of 16 columns each
ROWS_PER_LANE = 4
ROW_STRIDE = 32

_SIGNS = 0x80008000


class Operand:
    """A weight `[rows, cols]` in `slabs` along its columns. whole: rows are whole tiles of 128.

    pieces: of 16 bytes that a lane reads for a step. factor: what the sums are multiplied by.
    step_scales: whether a step's sums have a scale of their own, read by `step_scale`.
    """

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
    are, which scales them by 2^-126; scales are held as `scale * 2^118`.
    """

    pieces = 5
    factor = 2.0**8

    def addresses(
        self, codes: Any, scales: Any, row: Int32, step: Int32, t: Int32
    ) -> Iterator[Any]:
        slab, col = self.place(step)
        half = self.slab_cols // 2
        for i in range(ROWS_PER_LANE):
            yield codes + (slab * self.rows + self.row(row, i)) * half + col // 2 + t * 16
        tiles = self.slab_cols // 64
        tile = (slab * (-(-self.rows // 128)) + row // 128) * tiles + col // 64 + t // 2
        yield scales + tile * 512 + (row % 32) * 16

    def x_column(self, piece: int, t: Int32) -> Int32:
        return t * 32 + piece * 8

    def prepare(self, words: Any, t: Int32) -> Any:
        """-> per row, the two block scales of the lane's columns, each twice in a word."""
        selector = Uint32(0x4140) + Uint32(t % 2) * Uint32(0x0202)
        scales = []
        for i in range(ROWS_PER_LANE):
            pair = ptx.byte_permute(words[16 + i], Uint32(0), selector) << 4
            pair = ptx.mul_bf16x2(pair, Uint32(0x7F007F00))  # 2^127
            pair = ptx.mul_bf16x2(pair, Uint32(0x77007700))  # 2^111
            scales.append(
                (ptx.byte_permute(pair, pair, 0x1010), ptx.byte_permute(pair, pair, 0x3232))
            )
        return scales

    def a(self, words: Any, prepared: Any, tile: int, mma: int) -> tuple[Any, ...]:
        low, high = [], []
        for row in (2 * tile, 2 * tile + 1):
            word, scale = words[4 * row + mma // 2], prepared[row][mma // 4]
            half = word >> 8 if mma % 2 else word
            low.append(ptx.mul_bf16x2(_e2m1_pair(half, 0), scale))
            high.append(ptx.mul_bf16x2(_e2m1_pair(half, 1), scale))
        return (*low, *high)

    def b(self, x: Any, mma: int) -> tuple[Any, Any]:
        """Columns i and i + 4 of eight go together."""
        first, second = x[4 * (mma // 2) + mma % 2], x[4 * (mma // 2) + 2 + mma % 2]
        return ptx.byte_permute(first, second, 0x5410), ptx.byte_permute(first, second, 0x7632)


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
        return ptx.e8m0_to_f32(Uint32(code))

    def a(self, words: Any, prepared: Any, tile: int, mma: int) -> tuple[Any, ...]:
        rows = [words[8 * row + mma] for row in (2 * tile, 2 * tile + 1)]
        return (*(_e4m3_pair(word, 0) for word in rows), *(_e4m3_pair(word, 1) for word in rows))

    def b(self, x: Any, mma: int) -> tuple[Any, Any]:
        """Columns i and i + 2 of four go together."""
        first, second = x[2 * mma], x[2 * mma + 1]
        return ptx.byte_permute(first, second, 0x5410), ptx.byte_permute(first, second, 0x7632)


def _e4m3_pair(word: Uint32, i: int) -> Uint32:
    """Codes i and i + 2 of a word as bfloat16."""
    signs = word << 8 if i == 0 else word
    magnitudes = word << 4 if i == 0 else word >> 4
    pair = (signs & Uint32(_SIGNS)) | (magnitudes & Uint32(0x07F007F0))
    return ptx.mul_bf16x2(pair, Uint32(0x7B807B80))  # 2^120


class Bf16Operand(Operand):
    """Plain bfloat16."""

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
