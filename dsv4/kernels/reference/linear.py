"""Matrix products with packed weights.

A weight is dequantised where it is used, a bounded run of rows at a time, so that no whole matrix
exists twice. Packed weights keep their layout: K-slabs, tiled scale factors, interleaved rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dsv4.formats.numeric.layouts import dequantize
from dsv4.formats.numeric.operands import FP8_BLOCK, SF_ROWS, Fp8Matrix, Matrix, Nvfp4Matrix
from dsv4.kernels.reference.accumulate import WIDE, deliver, spans
from dsv4.kernels.reference.numerics import Numerics
from dsv4.kernels.reference.quant_sim import ACTIVATION_BLOCK, fake_quant_fp8


def linear(
    x: Tensor,
    w: Matrix,
    *,
    numerics: Numerics = Numerics.EXACT,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`x · wᵀ`.

    x: float32 or bfloat16 `[..., K]`; w: `[N, K]`, rows in packed order when they interleave.
    numerics: OFFICIAL rounds `x` to FP8 per 128 columns if `w` is FP8 or FP4.
    Returns `[..., N]` in `dtype`, by default `x`'s.
    """
    if numerics is Numerics.OFFICIAL and not isinstance(w, Tensor):
        x = fake_quant_fp8(x, ACTIVATION_BLOCK)
    wide = x.to(WIDE)
    parts = [wide @ rows.to(WIDE).T for rows in _row_runs(w, 0, matrix_shape(w)[0])]
    product = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return deliver(product.to(dtype or x.dtype), out)


def grouped_linear(x: Tensor, w: Matrix, *, out: Tensor | None = None) -> Tensor:
    """Block-diagonal product: group `g` of the input meets rows `[g·R, (g+1)·R)` of the weight.

    x: float32 or bfloat16 `[T, G, K]`; w: `[G·R, K]`. Returns `[T, G·R]` in `x`'s dtype. The
    input is never quantised: DeepSeek runs this product (`wo_a`) in BF16.
    """
    groups = x.shape[1]
    rank = matrix_shape(w)[0] // groups
    wide = x.to(WIDE)
    parts = [
        wide[:, group] @ rows.to(WIDE).T
        for group in range(groups)
        for rows in _row_runs(w, group * rank, (group + 1) * rank)
    ]
    return deliver(torch.cat(parts, -1).to(x.dtype), out)


def matrix_shape(w: Matrix) -> tuple[int, int]:
    """`(rows, columns)` of a weight operand."""
    return (w.shape[0], w.shape[1]) if isinstance(w, Tensor) else (w.rows, w.cols)


def dequantize_rows(w: Matrix, start: int, stop: int) -> Tensor:
    """Rows `[start, stop)` of a weight as float32 `[stop - start, K]`.

    Scale factors come in tiles of 128 rows, so the tiles around the run are decoded and trimmed.
    """
    if isinstance(w, Tensor):
        return w[start:stop].to(torch.float32)
    unit = _row_unit(w)
    first = start // unit * unit
    last = min(-(-stop // unit) * unit, w.rows)
    if (first, last) != (0, w.rows):
        w = _tile_rows(w, first, last)
    return dequantize(w)[start - first : stop - first]


def _row_runs(w: Matrix, start: int, stop: int) -> Iterator[Tensor]:
    unit = 1 if isinstance(w, Tensor) else _row_unit(w)
    for first, last in spans(stop - start, matrix_shape(w)[1], unit):
        yield dequantize_rows(w, start + first, start + last)


def _row_unit(w: Nvfp4Matrix | Fp8Matrix) -> int:
    """Rows that can be cut off together: whole scale tiles, whole gate/up periods."""
    if isinstance(w, Fp8Matrix):
        return FP8_BLOCK
    return math.lcm(SF_ROWS, 2 * w.interleave or 1)


def _tile_rows(w: Nvfp4Matrix | Fp8Matrix, first: int, last: int) -> Nvfp4Matrix | Fp8Matrix:
    """The sub-matrix of rows `[first, last)`; `first` is a multiple of `_row_unit`."""
    if isinstance(w, Fp8Matrix):
        scales = w.scales[first // FP8_BLOCK : -(-last // FP8_BLOCK)]
        return Fp8Matrix(w.codes[:, first:last], scales, last - first, w.cols)
    scales = w.scales[:, first // SF_ROWS : -(-last // SF_ROWS)]
    return Nvfp4Matrix(
        w.codes[:, first:last], scales, w.global_scales, last - first, w.cols, w.interleave
    )
