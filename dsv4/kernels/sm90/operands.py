"""How a warp reads a weight of each format, and turns it into the A operand of an MMA.

A warp works on 32 rows at a time, `r + 32 i` for `i` in 0..3 and eight neighbouring `r`: the four
rows of a lane are the ones that share a 16-byte run of a scale tile (32x4x4). Lane `4g + t` reads
row `g` of the eight, and of a step of 128 columns the 32 that begin at `32 t`. Which of them meets
which column of the MMA does not matter as long as `b` pairs the activations alike.
"""

from __future__ import annotations

from typing import Any

from cutlass import Float32, Int32, Uint32

from dsv4.kernels.sm90 import ptx

STEP = 128  # columns a warp reads at once
MMAS = 8  # of 16 columns each
ROWS_PER_LANE = 4
ROW_STRIDE = 32

_SIGNS = 0x80008000


class Nvfp4Operand:
    """E2M1 codes with a tiled E4M3 scale per 16 columns, multiplied in bfloat16: exact.

    `value * scale` has at most 6 significant bits. Codes are moved into bfloat16's fields as they
    are, which scales them by 2^-126; scales are held as `scale * 2^118`.
    """

    factor = 2.0**8  # what undoes both
    step_scales = False

    def __init__(self, rows: int, cols: int, slabs: int) -> None:
        self.rows, self.cols, self.slabs = rows, cols, slabs
        self.slab_cols = cols // slabs
        self.words = 5 * 4

    def load(self, codes: Any, scales: Any, row: Int32, slab: Int32, col: Int32, t: Int32) -> Any:
        """16 words of codes (4 rows of 4), then the 4 words of scales of those rows."""
        half = self.slab_cols // 2
        words = []
        for i in range(ROWS_PER_LANE):
            offset = (slab * self.rows + row + ROW_STRIDE * i) * half + col // 2 + t * 16
            words.extend(ptx.load_b128_weights(codes + offset))
        tiles = self.slab_cols // 64
        tile = (slab * (-(-self.rows // 128)) + row // 128) * tiles + col // 64 + t // 2
        words.extend(ptx.load_b128_weights(scales + tile * 512 + (row % 32) * 16))
        return words

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

    def a(self, words: Any, prepared: Any, tile: int, mma: int) -> Any:
        """The lane's part of MMA `mma` of its step, for the two rows of `tile`."""
        low, high = [], []
        for i in range(2):
            row = 2 * tile + i
            word, scale = words[4 * row + mma // 2], prepared[row][mma // 4]
            low.append(ptx.mul_bf16x2(_e2m1_pair(word, 2 * (mma % 2)), scale))
            high.append(ptx.mul_bf16x2(_e2m1_pair(word, 2 * (mma % 2) + 1), scale))
        return low[0], low[1], high[0], high[1]

    def b(self, x: Any, mma: int) -> Any:
        """Activations in the order of `a`: columns i and i + 4 of eight go together."""
        first, second = x[4 * (mma // 2) + mma % 2], x[4 * (mma // 2) + 2 + mma % 2]
        return ptx.byte_permute(first, second, 0x5410), ptx.byte_permute(first, second, 0x7632)


def _e2m1_pair(word: Uint32, i: int) -> Uint32:
    """Codes i and i + 4 of a word as bfloat16, times 2^-126."""
    signs = word << (12 - 4 * i) if i < 3 else word
    magnitudes = word << (6 - 4 * i) if i < 2 else word >> (4 * i - 6)
    return (signs & Uint32(_SIGNS)) | (magnitudes & Uint32(0x01C001C0))


class Fp8Operand:
    """E4M3 codes with one scale per 128x128 tile, applied to a step's sums: exact products."""

    factor = 1.0
    step_scales = True

    def __init__(self, rows: int, cols: int, slabs: int) -> None:
        self.rows, self.cols, self.slabs = rows, cols, slabs
        self.slab_cols = cols // slabs
        self.words = 8 * 4

    def load(self, codes: Any, scales: Any, row: Int32, slab: Int32, col: Int32, t: Int32) -> Any:
        """8 words of codes for each of 4 rows."""
        words = []
        for i in range(ROWS_PER_LANE):
            offset = (slab * self.rows + row + ROW_STRIDE * i) * self.slab_cols + col + t * 32
            words.extend(ptx.load_b128_weights(codes + offset))
            words.extend(ptx.load_b128_weights(codes + offset + 16))
        return words

    def prepare(self, words: Any, t: Int32) -> Any:
        return None

    def step_scale(self, scales: Any, row: Int32, slab: Int32, col: Int32) -> Float32:
        """The E8M0 scale of the tile that a step lies in."""
        at = (row // 128) * (-(-self.cols // 128)) + (slab * self.slab_cols + col) // 128
        return ptx.e8m0_to_f32(Uint32((scales + at).load()))

    def a(self, words: Any, prepared: Any, tile: int, mma: int) -> Any:
        low, high = [], []
        for i in range(2):
            word = words[8 * (2 * tile + i) + mma]
            low.append(_e4m3_pair(word, 0))
            high.append(_e4m3_pair(word, 1))
        return low[0], low[1], high[0], high[1]

    def b(self, x: Any, mma: int) -> Any:
        first, second = x[2 * mma], x[2 * mma + 1]
        return ptx.byte_permute(first, second, 0x5410), ptx.byte_permute(first, second, 0x7632)


def _e4m3_pair(word: Uint32, i: int) -> Uint32:
    """Codes i and i + 2 of a word as bfloat16."""
    signs = word << 8 if i == 0 else word
    magnitudes = word << 4 if i == 0 else word >> 4
    pair = (signs & Uint32(_SIGNS)) | (magnitudes & Uint32(0x07F007F0))
    return ptx.mul_bf16x2(pair, Uint32(0x7B807B80))  # 2^120


class Bf16Operand:
    """Plain bfloat16."""

    factor = 1.0
    step_scales = False

    def __init__(self, rows: int, cols: int, slabs: int) -> None:
        self.rows, self.cols, self.slabs = rows, cols, slabs
        self.slab_cols = cols // slabs
        self.words = 16 * 4

    def load(self, codes: Any, scales: Any, row: Int32, slab: Int32, col: Int32, t: Int32) -> Any:
        words = []
        for i in range(ROWS_PER_LANE):
            offset = (row + ROW_STRIDE * i) * self.cols + col + t * 32
            for part in range(4):
                words.extend(ptx.load_b128_weights(codes + offset + 8 * part))
        return words

    def prepare(self, words: Any, t: Int32) -> Any:
        return None

    def a(self, words: Any, prepared: Any, tile: int, mma: int) -> Any:
        first, second = 16 * 2 * tile + 2 * mma, 16 * (2 * tile + 1) + 2 * mma
        return words[first], words[second], words[first + 1], words[second + 1]

    def b(self, x: Any, mma: int) -> Any:
        return x[2 * mma], x[2 * mma + 1]


OPERANDS: dict[str, Any] = {"nvfp4": Nvfp4Operand, "fp8": Fp8Operand, "bf16": Bf16Operand}
