"""How far float32 arithmetic of the tensor cores may be from the exact value.

An MMA of 16 products adds 17 numbers. The tensor cores align them to the largest one, cut each at
2^-25 of it, and cut the sum to 24 bits: at most 17/4 + 1 < 6 units of 2^-23 of the largest number
there, addend or sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

MMA_COLUMNS = 16
_UNITS = 6 * 2.0**-23
_ROWS_AT_ONCE = 2048
_NUMBERS_AT_ONCE = 1 << 26
BLOCK = 64


def chained(x: Tensor, weight: Tensor, chains: int, kind: str) -> tuple[Tensor, Tensor]:
    """`weight @ x` and its uncertainty, for float64 `[N, K]` and `[K]`, exactly: `[N]` each.

    Every chain sums its run of K/chains columns, MMA by MMA in the order of `mma_order`, starting
    from zero; then the chains are added, each passing through at most as many sums as there are.
    """
    values, errors = [], []
    order = mma_order(weight.shape[1], kind).to(weight.device)
    for first in range(0, len(weight), _ROWS_AT_ONCE):
        products = (weight[first : first + _ROWS_AT_ONCE] * x)[:, order]
        products = products.view(len(products), chains, -1, MMA_COLUMNS)
        sums = products.sum(-1).cumsum(-1)
        largest = torch.maximum(products.abs().amax(-1), sums.abs())
        largest[..., 1:] = torch.maximum(largest[..., 1:], sums[..., :-1].abs())
        parts = sums[..., -1]
        values.append(parts.sum(-1))
        errors.append(_UNITS * largest.sum((-2, -1)) + chains * 2.0**-24 * parts.abs().sum(-1))
    return torch.cat(values), torch.cat(errors)


def blocked(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`x @ weightᵀ` and its uncertainty, for float64 `[T, K]` and `[N, K]`, exactly: `[T, N]` each.

    One chain sums 64 columns after 64, these in whatever order: no addend or sum there is larger
    than the sum before them and their Σ|x w| together.
    """
    blocks = weight.shape[1] // BLOCK
    columns = x.reshape(len(x), blocks, BLOCK).transpose(0, 1)
    at_once = max(1, _NUMBERS_AT_ONCE // (len(x) * blocks))
    values, errors = [], []
    for first in range(0, len(weight), at_once):
        rows = weight[first : first + at_once]
        sums = (columns @ rows.reshape(len(rows), blocks, BLOCK).permute(1, 2, 0)).cumsum(0)
        largest = sums[:-1].abs().sum(0) + x.abs() @ rows.abs().T
        values.append(sums[-1])
        errors.append(BLOCK // MMA_COLUMNS * _UNITS * largest)
    return torch.cat(values, 1), torch.cat(errors, 1)


def mma_order(columns: int, kind: str) -> Tensor:
    """Columns as operands meet MMAs (`device/weight_operands.py`), 128 after 128.

    "nvfp4": four lanes have 32 each; an MMA takes four of each lane's: of eight columns those with
    i % 4 < 2, the next one the others. "fp8": the lanes have 16 of 64 each, and 16 of the other
    64; an MMA takes four of each lane's that lie together.
    """
    index = torch.arange(columns)
    if kind == "fp8":
        place = index.view(-1, 2, 4, 4, 4)  # step, half, lane, four, one
        return place.permute(0, 1, 3, 2, 4).reshape(-1)
    place = index.view(-1, 4, 4, 2, 2, 2)  # step, lane, eight, half, pair, one
    return place.permute(0, 2, 4, 1, 3, 5).reshape(-1)


def rounded_range(value: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """`value` rounded to bfloat16, and how far the rounding of something within `error` may be."""

    def rounded(exact: Tensor) -> Tensor:
        return exact.to(torch.float32).to(torch.bfloat16).to(torch.float64)

    middle = rounded(value)
    above, below = rounded(value + error) - middle, middle - rounded(value - error)
    return middle, torch.maximum(above, below)
