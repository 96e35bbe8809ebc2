"""Fake quantisation: round to FP8 or FP4 and back, as the weights saw it in training.

One power-of-two scale per block of consecutive columns. A last block that is shorter than the
others (small models) takes its own scale from the columns it has.
Source of the rules: DeepSeek's inference `kernel.py` (act_quant, fp4_act_quant).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dsv4.formats.numeric.codecs import E2M1_MAX, E4M3_MAX, e4m3_decode, e4m3_encode
from dsv4.kernels.reference.accumulate import deliver

ACTIVATION_BLOCK = 128  # columns per scale of an activation entering a quantised weight
KV_BLOCK = 64  # columns per scale of a key/value vector
INDEXER_BLOCK = 32  # columns per scale of an indexer query or key

_SMALLEST_FP8_AMAX = 1e-4
_SMALLEST_FP4_AMAX = 6.0 * 2.0**-126


def fake_quant_fp8(x: Tensor, block: int, *, out: Tensor | None = None) -> Tensor:
    """Round `x` to E4M3 with one scale `2^ceil(log2(amax / 448))` per `block` columns, and back.

    x: float32 or bfloat16 `[..., K]`. Returns the same shape and dtype; exact in both dtypes.
    """
    return deliver(_blockwise(x, block, _SMALLEST_FP8_AMAX, E4M3_MAX, _round_e4m3), out)


def fake_quant_fp4(x: Tensor, block: int, *, out: Tensor | None = None) -> Tensor:
    """Round `x` to E2M1 with one scale `2^ceil(log2(amax / 6))` per `block` columns, and back.

    x: float32 or bfloat16 `[..., K]`. Returns the same shape and dtype. Ties go to the even code.
    """
    return deliver(_blockwise(x, block, _SMALLEST_FP4_AMAX, E2M1_MAX, _round_e2m1), out)


def power_of_two_scale(amax: Tensor, largest: float) -> Tensor:
    """`2^ceil(log2(amax · (1/largest)))`, exact, from the bits of the FP32 product.

    amax: float32, positive. Returns float32 of the same shape.
    """
    bits = (amax * (1.0 / largest)).view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    return (exponent << 23).to(torch.int32).view(torch.float32)


def _round_e4m3(x: Tensor) -> Tensor:
    return e4m3_decode(e4m3_encode(x))


def _round_e2m1(x: Tensor) -> Tensor:
    """Nearest E2M1 value; NaN stays NaN, so that a broken model shows in its logits.

    The grid steps by .5 below 2, by 1 below 4, by 2 up to 6; `round` breaks a tie to an even
    multiple of the step, which is the even code.
    """
    magnitude = x.abs().clamp(max=E2M1_MAX)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign(torch.round(magnitude / step) * step, x)


def _blockwise(
    x: Tensor, block: int, floor: float, largest: float, encode: Callable[[Tensor], Tensor]
) -> Tensor:
    columns = x.shape[-1]
    padded = functional.pad(x.to(torch.float32), (0, -columns % block))
    blocks = torch.unflatten(padded, -1, (-1, block))
    amax = blocks.abs().amax(-1, keepdim=True).clamp(min=floor)
    scale = power_of_two_scale(amax, largest)
    return (encode(blocks / scale) * scale).flatten(-2)[..., :columns].to(x.dtype)
