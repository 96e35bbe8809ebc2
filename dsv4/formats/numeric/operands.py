"""The weight operands as they lie in memory: what the store maps and the kernels read.

A matrix is `[N, K]` = `[out, in]`, K contiguous. When tensor parallelism cuts it by input
columns, it is stored as `S` *K-slabs*, each a dense `[N, Ks]` matrix with `K = S * Ks`; a rank
takes a run of slabs. A matrix cut by output rows is one slab (`S = 1`), and so is every small one.

NVFP4 value: `e2m1(code) * e4m3(block scale) * global_scale`, one block scale per 16 columns.
FP8 value: `e4m3(code) * scale`, one scale per 128x128 tile of the whole matrix.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dsv4.formats.errors import FormatError

NVFP4_BLOCK = 16
NVFP4_K_ALIGN = 64  # columns of one scale tile; codes are zero-padded to it
SF_ROWS = 128
SF_TILE_BYTES = 512
FP8_BLOCK = 128
SLABS = 8  # of a matrix that is cut by columns, where its shape allows
INTERLEAVE = 8  # rows r and r+8 of a wgmma accumulator live in one thread: gate beside up


@dataclasses.dataclass(frozen=True)
class Nvfp4Matrix:
    """An NVFP4 operand in its packed layout (`nvfp4.kmajor.sf32x4x4`).

    codes: uint8 `[S, N, Ks/2]`, low nibble = even column.
    scales: uint8 E4M3 `[S, ceil(N/128), ceil(Ks/64), 512]`, tiled 32x4x4.
    global_scales: float32 `[P]`; `P = 2` when rows interleave two projections (gate, up).
    interleave: rows of gate then of up, alternating; 0 when there is one projection.
    """

    codes: Tensor
    scales: Tensor
    global_scales: Tensor
    rows: int
    cols: int
    interleave: int = 0

    def __post_init__(self) -> None:
        slabs, rows, half = _dims(self.codes, 3, "NVFP4 codes")
        expected = (slabs, -(-rows // SF_ROWS), -(-half * 2 // NVFP4_K_ALIGN), SF_TILE_BYTES)
        _require("NVFP4 codes", "rows", rows, self.rows)
        _require("NVFP4 scales", "shape", tuple(self.scales.shape), expected)
        _require(
            "NVFP4 global scales",
            "shape",
            tuple(self.global_scales.shape),
            (2 if self.interleave else 1,),
        )
        if slabs * half * 2 < self.cols or (slabs > 1 and slabs * half * 2 != self.cols):
            raise FormatError(
                f"NVFP4 codes hold {slabs} x {half * 2} columns, expected {self.cols}"
            )


@dataclasses.dataclass(frozen=True)
class Fp8Matrix:
    """An FP8 operand with one scale per 128x128 tile (`fp8.block128`).

    codes: float8_e4m3fn `[S, N, Ks]`.
    scales: float8_e8m0fnu, float32 or bfloat16 `[ceil(N/128), ceil(K/128)]`, never cut.
    """

    codes: Tensor
    scales: Tensor
    rows: int
    cols: int

    def __post_init__(self) -> None:
        slabs, rows, per_slab = _dims(self.codes, 3, "FP8 codes")
        _require("FP8 codes", "dtype", self.codes.dtype, torch.float8_e4m3fn)
        _require("FP8 codes", "shape", (rows, slabs * per_slab), (self.rows, self.cols))
        _require(
            "FP8 scales",
            "shape",
            tuple(self.scales.shape),
            (-(-self.rows // FP8_BLOCK), -(-self.cols // FP8_BLOCK)),
        )


Matrix = Nvfp4Matrix | Fp8Matrix | Tensor
"""A weight operand; a plain Tensor is `[N, K]` in bfloat16 or float32."""


def _dims(tensor: Tensor, rank: int, what: str) -> tuple[int, ...]:
    if tensor.dim() != rank:
        raise FormatError(f"{what} have shape {tuple(tensor.shape)}, expected rank {rank}")
    return tuple(tensor.shape)


def _require(what: str, attribute: str, found: object, expected: object) -> None:
    if found != expected:
        raise FormatError(f"{what}: {attribute} is {found}, expected {expected}")
