"""A weight's way into a warpgroup product: global memory, a stage in shared memory, registers.

A stage holds `rows` rows of the weight and a few runs of 64 columns, in boxes of up to 256 rows:
`[box][run][row][bytes of 64 columns]`, then the scale tiles `[rows / 128][run][512]`.

Of a run, lane `4g + t` takes the 16 columns from `16 t` of rows g and g + 8, and pairs columns i
and i + 4 of eight in a register. So the product's 64 columns come in another order than the
matrix's: `arranged_column` says which. Activations are arranged alike (routing.py). A plain
bfloat16 weight keeps its order: it goes from shared memory to the tensor cores as it is.
"""

from __future__ import annotations

from typing import Any

from cutlass import Int32, Int64, Uint32

from dsv4.kernels.device import matrix_memory, ptx
from dsv4.kernels.device.warpgroup import product
from dsv4.kernels.device.warpgroup.layout import TILE_ROW_BYTES

RUN = 64  # columns
MAX_BOX = 256  # rows that the copy unit copies at once
SF_TILE = 512
SF_ROWS = 128
_SIGNS = 0x80008000


def arranged_column(place: int) -> int:
    """The column of 64 that stands at `place` of arranged activations."""
    step, high, t, second = place // 16, place // 8 % 2, place // 2 % 4, place % 2
    return 16 * t + 8 * (step // 2) + 2 * (step % 2) + high + 4 * second


class Fragments:
    """What the formats share: codes in K-slabs `[S, N, K/S]`, `row_elements` of them a run."""

    row_elements = 0
    row_bytes = 0
    factor = 1.0
    swizzled = False
    arranged = True
    block_scales = False  # one scale per 128 x 128, asked for by `block_scale`

    def __init__(self, n: int, k: int, slabs: int, rows: int, runs: int) -> None:
        self.n, self.k, self.slabs, self.rows, self.runs = n, k, slabs, rows, runs
        self.box = min(rows, MAX_BOX)
        self.run_bytes = self.box * self.row_bytes
        self.pitch = k // slabs // RUN * self.row_elements
        self.slab_runs = k // slabs // RUN
        self.slab_steps = self.slab_runs // runs
        self.code_bytes = runs * rows * self.row_bytes
        self.scale_bytes = 0
        if k % (slabs * runs * RUN) or n % rows:
            raise ValueError(
                f"{n} x {k} in {slabs} slabs is not whole tiles of {rows} x {runs * RUN}"
            )

    @property
    def stage_bytes(self) -> int:
        """Of codes and scales."""
        return self.code_bytes + self.scale_bytes

    def place(self, matrix: Int32, row: Int32, step: Int32) -> tuple[Int32, Int32]:
        """Row and run of the codes, all matrices one below the other, that a stage begins at."""
        slab, within = step // self.slab_steps, step % self.slab_steps
        return (matrix * self.slabs + slab) * self.n + row, within * self.runs

    def row_place(self, row: Int32) -> Any:
        """Where the codes of a row of the CTA's begin in a stage, in run 0."""
        return row // self.box * (self.runs * self.run_bytes) + row % self.box * self.row_bytes

    def copy_scales(
        self, scales: Int64, place: tuple[Int32, Int32], stage: Int32, barrier: Int32
    ) -> None:
        """One thread begins to copy a stage's scales."""

    def block_scale(self, scales: Int64, row: Int32, step: Int32) -> Uint32:
        """What `a` multiplies a whole stage by, read from global memory."""
        return Uint32(0)


class Nvfp4Fragments(Fragments):
    """E2M1 codes with a tiled E4M3 scale per 16 columns: exact products in bfloat16.

    `value * scale` has at most 6 significant bits. Codes are moved into bfloat16's fields as they
    are, which scales them by 2^-126; scales are held as `scale * 2^118`.
    """

    row_elements = 32
    row_bytes = 32
    factor = 2.0**8

    def __init__(self, n: int, k: int, slabs: int, rows: int, runs: int) -> None:
        super().__init__(n, k, slabs, rows, runs)
        self.scale_bytes = runs * rows // SF_ROWS * SF_TILE

    def copy_scales(
        self, scales: Int64, place: tuple[Int32, Int32], stage: Int32, barrier: Int32
    ) -> None:
        """Tiles of one band of 128 rows follow each other."""
        nbytes = self.runs * SF_TILE
        first = Int64(place[0] // SF_ROWS) * (self.slab_runs * SF_TILE) + Int64(place[1] * SF_TILE)
        for band in range(self.rows // SF_ROWS):
            matrix_memory.copy_bulk(
                stage + self.code_bytes + band * nbytes,
                scales + first + band * (self.slab_runs * SF_TILE),
                nbytes,
                barrier,
            )

    def lane(self, row: Int32, t: Int32) -> tuple[Int32, Int32]:
        """Places of a lane's codes and scale: row, its first of the CTA's rows."""
        scale = row // SF_ROWS * (self.runs * SF_TILE) + row % 32 * 16 + row % SF_ROWS // 32 * 4 + t
        return Int32(self.row_place(row) + t * 8), Int32(self.code_bytes + scale)

    def load(self, stage: Int32, run: int, lane: tuple[Int32, Int32]) -> Any:
        """A lane's codes of two rows, and their scales."""
        at = stage + run * self.run_bytes + lane[0]
        scale = stage + run * SF_TILE + lane[1]
        low, high = matrix_memory.load_b64(at), matrix_memory.load_b64(at + 8 * self.row_bytes)
        return low, high, matrix_memory.load_u8(scale), matrix_memory.load_u8(scale + 8 * 16)

    def a(self, loaded: Any, block_scale: Uint32) -> list[Any]:
        """The A operands of a run's four products."""
        low, high, first, second = loaded
        pair = ptx.byte_permute(first, second, 0x3430) << 4
        pair = ptx.mul_bf16x2(pair, Uint32(0x7F007F00))  # 2^127
        pair = ptx.mul_bf16x2(pair, Uint32(0x77007700))  # 2^111
        scales = ptx.byte_permute(pair, pair, 0x1010), ptx.byte_permute(pair, pair, 0x3232)
        operands = []
        for step in range(4):
            word, i = step // 2, 2 * (step % 2)
            operands.append(
                tuple(
                    ptx.mul_bf16x2(_e2m1_pair(codes[word], i + half), scale)
                    for half in range(2)
                    for codes, scale in zip((low, high), scales, strict=True)
                )
            )
        return operands


def _e2m1_pair(word: Uint32, i: int) -> Uint32:
    """Codes i and i + 4 of a word as bfloat16, times 2^-126."""
    signs = word << (12 - 4 * i) if i < 3 else word
    magnitudes = word << (6 - 4 * i) if i < 2 else word >> (4 * i - 6)
    return (signs & Uint32(_SIGNS)) | (magnitudes & Uint32(0x01C001C0))


class Fp8Fragments(Fragments):
    """E4M3 codes with an E8M0 scale per 128 x 128: exact in bfloat16, above 2^-126 as a whole."""

    row_elements = 64
    row_bytes = 64
    block_scales = True

    def block_scale(self, scales: Int64, row: Int32, step: Int32) -> Uint32:
        """The scale of a stage as bfloat16, twice."""
        at = row // SF_ROWS * (-(-self.k // 128)) + step * (self.runs * RUN) // 128
        return matrix_memory.e8m0_to_bf16x2(matrix_memory.load_global_u8(scales + Int64(at)))

    def lane(self, row: Int32, t: Int32) -> tuple[Int32, Int32]:
        """Place of a lane's codes."""
        return Int32(self.row_place(row) + t * 16), Int32(0)

    def load(self, stage: Int32, run: int, lane: tuple[Int32, Int32]) -> Any:
        """A lane's codes of two rows."""
        at = stage + run * self.run_bytes + lane[0]
        return matrix_memory.load_b128(at), matrix_memory.load_b128(at + 8 * self.row_bytes)

    def a(self, loaded: Any, block_scale: Uint32) -> list[Any]:
        """The A operands of a run's four products."""
        operands = []
        for step in range(4):
            word, i = 2 * (step // 2), 2 * (step % 2)
            operands.append(
                tuple(
                    ptx.mul_bf16x2(_e4m3_pair(codes[word], codes[word + 1], i + half), block_scale)
                    for half in range(2)
                    for codes in loaded
                )
            )
        return operands


def _e4m3_pair(first: Uint32, second: Uint32, i: int) -> Uint32:
    """Code i of two words as bfloat16."""
    pair = ptx.byte_permute(first, second, (i + 4) << 12 | i << 8 | i << 4 | i)
    pair = (pair & Uint32(_SIGNS)) | ((pair >> 4) & Uint32(0x07F007F0))
    return ptx.mul_bf16x2(pair, Uint32(0x7B807B80))  # 2^120


class Bf16Fragments(Fragments):
    """Plain bfloat16, multiplied out of shared memory, hence swizzled there."""

    row_elements = RUN
    row_bytes = TILE_ROW_BYTES
    swizzled = True
    arranged = False

    def lane(self, row: Int32, t: Int32) -> tuple[Int32, Int32]:
        """Place of the warpgroup's tile."""
        return Int32(self.row_place(row // 64 * 64)), Int32(0)

    def load(self, stage: Int32, run: int, lane: tuple[Int32, Int32]) -> Any:
        """The tile."""
        return product.tile(stage + run * self.run_bytes + lane[0])

    def a(self, loaded: Any, block_scale: Uint32) -> list[Any]:
        """The A operands of a run's four products."""
        return [product.columns(loaded, step) for step in range(4)]


FRAGMENTS: dict[str, Any] = {"nvfp4": Nvfp4Fragments, "fp8": Fp8Fragments, "bf16": Bf16Fragments}
