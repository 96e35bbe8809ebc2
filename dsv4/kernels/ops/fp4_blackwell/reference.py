"""Activations in NVFP4, and products of them with NVFP4 weights.

The rule is ModelOpt's, with the global scale from the activations themselves:

    g  = max|x| / (6 * 448)                    in float32; 1 when all of x is zero
    s  = E4M3(clamp(max|block| / (6 g), 2^-9, 448)), 1 when the quotient is zero
    q  = E2M1(x / (s g))                       true division, ties to even, saturating at 6

A checkpoint's `input_scale` is never used: it belongs to other tokens than these.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.formats.numeric.codecs import (
    E2M1_MAX,
    E4M3_MAX,
    e2m1_codes_of,
    e4m3_decode,
    e4m3_encode,
    pack_nibbles,
)
from dsv4.formats.numeric.layouts import tile_scales
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor, dequantize_nvfp4
from dsv4.formats.numeric.operands import NVFP4_BLOCK
from dsv4.kernels.reference.accumulate import WIDE

SMALLEST_SCALE = 2.0**-9


class Activations(NamedTuple):
    """codes: uint8 `[T, K/2]`; scales: uint8 `[T, K/16]`; global_scale: float32 `[1]` or `[T]`."""

    codes: Tensor
    scales: Tensor
    global_scale: Tensor


def quantize_activations(
    x: Tensor, *, per_row: bool = False, signed_zero: bool = True
) -> Activations:
    """Quantise bfloat16 `x` `[T, K]`, K a multiple of 16; finite values.

    per_row: a global scale for each row, so that a row does not depend on its neighbours.
    signed_zero: a negative value that rounds to zero has code 8, as ModelOpt has it; otherwise 0,
    as in packed weights.
    """
    wide = x.to(torch.float32)
    amax = wide.abs().amax(1) if per_row else wide.abs().max().view(1)
    # Tensors, not numbers, divide: by a number torch multiplies with the reciprocal on a GPU.
    largest = torch.full_like(amax, E2M1_MAX * E4M3_MAX)
    g = torch.where(amax > 0, amax / largest, torch.ones_like(amax))
    blocks = wide.view(x.shape[0], -1, NVFP4_BLOCK)
    quotient = blocks.abs().amax(2) / (E2M1_MAX * g).view(-1, 1)
    scale = quotient.clamp(SMALLEST_SCALE, E4M3_MAX)
    raw = e4m3_encode(torch.where(quotient > 0, scale, torch.ones_like(scale)))
    divisor = e4m3_decode(raw) * g.view(-1, 1)
    q = (blocks / divisor.unsqueeze(-1)).flatten(1)
    codes = e2m1_codes_of(q.contiguous()).to(torch.uint8)
    if signed_zero:
        codes |= (q < 0).to(torch.uint8) << 3
    return Activations(pack_nibbles(codes), raw, g)


def dequantize_activations(a: Activations) -> Tensor:
    """Float64 `[T, K]`, exact."""
    shape = (a.codes.shape[0], a.codes.shape[1] * 2)
    one = torch.ones((), device=a.codes.device)
    values = dequantize_nvfp4(NVFP4Tensor(a.codes, a.scales, one, shape))
    return values.to(WIDE) * a.global_scale.to(WIDE).view(-1, 1)


def tile_group_scales(scales: Tensor, offsets: Tensor) -> Tensor:
    """Scale bytes `[T, K/16]` of rows sorted by group -> `[tiles, K/64, 512]`.

    offsets: `[G + 1]`, of at least one row. Each group begins a new row tile; where a tile has no
    row it is zero.
    """
    spans = itertools.pairwise(offsets.tolist())
    return torch.cat([tile_scales(scales[begin:end]) for begin, end in spans if begin < end])
