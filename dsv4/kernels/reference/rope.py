"""Rotary position embedding on the last dimensions of a vector.

DeepSeek-V4 rotates *interleaved* pairs `(x[2i], x[2i+1])`, only in the last `qk_rope_head_dim`
dimensions; the leading ("nope") ones stay. Layers without a compressor use `rope_theta` as it
is; layers with one use `compress_rope_theta` under YaRN at every length, with no magnitude factor.
The rotation is FP32, from FP32 tables.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4.formats.model.config import YarnConfig
from dsv4.kernels.reference.accumulate import WIDE, deliver


def inverse_frequencies(rotary_dim: int, theta: float, yarn: YarnConfig | None) -> Tensor:
    """Angles per position: float32 `[rotary_dim / 2]`, `theta^(-2i / rotary_dim)`.

    With YaRN (arXiv 2309.00071), pairs that turn less than `beta_slow` times within the original
    length are slowed by `factor`, those that turn more than `beta_fast` times are kept, and the
    pairs between are blended linearly.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    frequencies = 1.0 / (theta**exponents)
    if yarn is None:
        return frequencies
    length = yarn.original_max_position_embeddings

    def pair_that_turns(times: float) -> float:
        return rotary_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(yarn.beta_slow)), rotary_dim - 1)
    width = last - first if last != first else 0.001
    slowed = ((torch.arange(rotary_dim // 2) - first) / width).clamp(0, 1)
    return frequencies / yarn.factor * slowed + frequencies * (1 - slowed)


def rope_table(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """`(cos, sin)`, each float32 `[P, rotary_dim / 2]`, for `positions` int64 `[P]`."""
    angles = positions.to(torch.float32)[:, None] * frequencies.to(positions.device)
    wide = angles.to(WIDE)
    return wide.cos().to(torch.float32), wide.sin().to(torch.float32)


def apply_rope(
    x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False, out: Tensor | None = None
) -> Tensor:
    """Rotate the last `2·cos.shape[-1]` dimensions of each vector by its token's angle.

    x: float32 or bfloat16 `[T, head_dim]` or `[T, H, head_dim]`; cos, sin: float32 `[T, R / 2]`.
    inverse: rotate back (the conjugate). Returns `x`'s shape and dtype.
    """
    rotary_dim = 2 * cos.shape[-1]
    if x.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    rotary = x[..., -rotary_dim:].to(torch.float32)
    even, odd = torch.unflatten(rotary, -1, (-1, 2)).unbind(-1)
    if inverse:
        sin = -sin
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    return deliver(torch.cat((x[..., :-rotary_dim], rotated.to(x.dtype)), -1), out)
