"""A layer's routed experts on a prefill kernel's buffers, and the kernel's distance from them.

Buffers and shape are those of `dsv4.kernels.ops.prefill.experts_contract`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsv4.formats.numeric.operands import INTERLEAVE
from dsv4.kernels.core.bounds import blocked, rounded_range
from dsv4.kernels.core.contract import Buffers, Expected
from dsv4.kernels.ops.experts.reference import activated, matrix
from dsv4.kernels.reference.moe import split_gate_up

if TYPE_CHECKING:
    from dsv4.kernels.ops.experts.contract import Shape

_FLUSHED = 2.0**-119  # of silu, where its reciprocal is below 2^-126


def expected(shape: Shape, buffers: Buffers) -> Expected:
    """The sum of the exact rows rounded to bfloat16, and how far the kernels' sum may be from it.

    An activation of uncertainty d, from the sums (`blocked`), the scales and SwiGLU, may come out
    as anything between the roundings of a - d and a + d. That range meets |w2|, whose sums add
    their own uncertainty, and again a row may come out as the roundings in reach. k float32 sums
    follow, and a rounding of y by half a unit of 8 bits where it is bfloat16.
    """
    x, idx = buffers["x"][:, 0].to(torch.float64), buffers["topk_idx"].to(torch.int64)
    y, bound, sizes = (torch.zeros_like(x) for _ in range(3))
    for expert in range(shape.experts):
        tokens, choices = (idx == expert).nonzero(as_tuple=True)
        if len(tokens):
            weight = buffers["topk_weights"][tokens, choices].to(torch.float64)[:, None]
            row, spread = _expert(shape, buffers, expert, x[tokens], weight)
            y.index_add_(0, tokens, row)
            bound.index_add_(0, tokens, spread)
            sizes.index_add_(0, tokens, row.abs() + spread)
    bound += sizes * (shape.top_k * 2.0**-24)
    if buffers["y"].dtype is torch.bfloat16:
        bound += (y.abs() + bound) * 2.0**-8
    return Expected(y, bound)


def _expert(
    shape: Shape, buffers: Buffers, expert: int, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows of one expert's tokens and their uncertainty."""
    sums = blocked(x, matrix(shape, buffers, "13", expert))
    scales = buffers["global_scale13"][expert].to(torch.float64)
    halves = [split_gate_up(part, INTERLEAVE) for part in sums]
    gate, up = ((halves[0][i] * scales[i], halves[1][i] * scales[i]) for i in range(2))
    act, error = activated(gate, up, shape.limit)
    largest = up[0].abs() + up[1]
    error = error + _FLUSHED * (largest.clamp(max=shape.limit) if shape.limit else largest)
    act, error = act * weight, error * weight.abs()
    h, spread = rounded_range(act, error + act.abs() * 2.0**-23)
    w2 = matrix(shape, buffers, "2", expert)
    value, off = blocked(h, w2)
    off = off + spread @ w2.abs().T * (1 + 2.0**-12)  # these have uncertain sums, too
    scale = buffers["global_scale2"][expert, 0].to(torch.float64)
    value = value * scale
    return rounded_range(value, off * scale.abs() + value.abs() * 2.0**-23)
