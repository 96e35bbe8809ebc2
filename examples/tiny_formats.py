"""Rounding to the formats of the released checkpoints, on any device, and writing one.

MXFP4: E2M1 codes, a power of two per 32 columns, of three candidates the one with the least squared
error. FP8: E4M3 codes, the smallest power of two per 128x128 tile that overflows nowhere. Both give
back what they are given when it has been rounded before, so a model whose weights were rounded
while it trained is written without further loss.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv4.formats.numeric.codecs import E2M1_MAX, E4M3_MAX, MXFP4_BLOCK, e2m1_encode, pack_nibbles
from dsv4.formats.numeric.operands import FP8_BLOCK

_E8M0_BIAS = 127
_SMALLEST = 2.0**-100


def mxfp4_scales(w: Tensor) -> Tensor:
    """Exponents of the best powers of two, int32 `[..., K/32]`, for float32 `[..., K]`."""
    blocks = w.unflatten(-1, (-1, MXFP4_BLOCK))
    amax = blocks.abs().amax(-1).clamp(min=_SMALLEST)
    top = _ceil_log2(amax / E2M1_MAX)
    best = torch.full_like(amax, float("inf"))
    chosen = top
    for step in (0, 1, -1):
        scale = torch.exp2((top + step).float())[..., None]
        error = (e2m1_round(blocks / scale) * scale - blocks).square().sum(-1)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, top + step, chosen)
    return chosen


def e2m1_round(x: Tensor) -> Tensor:
    """The nearest E2M1 value of every element, ties to the even code, saturating."""
    size = x.abs().clamp(max=E2M1_MAX)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.copysign(torch.round(size / step) * step, x)


def round_mxfp4(w: Tensor) -> Tensor:
    """The values MXFP4 would hold, float32 of the same shape."""
    scale = torch.exp2(mxfp4_scales(w).float())[..., None]
    return (e2m1_round(w.unflatten(-1, (-1, MXFP4_BLOCK)) / scale) * scale).flatten(-2)


def encode_mxfp4(w: Tensor) -> tuple[Tensor, Tensor]:
    """-> packed codes int8 `[N, K/2]`, scales float8_e8m0fnu `[N, K/32]`."""
    exponents = mxfp4_scales(w)
    scaled = w.unflatten(-1, (-1, MXFP4_BLOCK)) / torch.exp2(exponents.float())[..., None]
    codes = pack_nibbles(e2m1_encode(scaled.flatten(-2)))
    return codes.view(torch.int8), _e8m0(exponents)


def fp8_scales(w: Tensor) -> Tensor:
    """Exponents per tile, int32 `[ceil(N/128), ceil(K/128)]`, for float32 `[N, K]`."""
    rows, cols = w.shape
    padded = F.pad(w, (0, -cols % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    tiles = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    return _ceil_log2(tiles.abs().amax((1, 3)).clamp(min=_SMALLEST) / E4M3_MAX)


def round_fp8(w: Tensor) -> Tensor:
    """The values FP8 with a scale per tile would hold, float32 `[N, K]`."""
    scale = _spread(torch.exp2(fp8_scales(w).float()), w)
    return (w / scale).to(torch.float8_e4m3fn).float() * scale


def encode_fp8(w: Tensor) -> tuple[Tensor, Tensor]:
    """-> codes float8_e4m3fn `[N, K]`, scales float8_e8m0fnu per tile."""
    exponents = fp8_scales(w)
    return (w / _spread(torch.exp2(exponents.float()), w)).to(torch.float8_e4m3fn), _e8m0(exponents)


def _spread(scales: Tensor, w: Tensor) -> Tensor:
    wide = scales.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    return wide[: w.shape[0], : w.shape[1]]


def _ceil_log2(x: Tensor) -> Tensor:
    """Exact, from the bits of a positive normal float32."""
    bits = x.contiguous().view(torch.int32)
    return (bits >> 23) - _E8M0_BIAS + ((bits & 0x7FFFFF) != 0)


def _e8m0(exponents: Tensor) -> Tensor:
    return (exponents + _E8M0_BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)
