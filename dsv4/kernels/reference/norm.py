"""Root-mean-square norms. FP32 arithmetic and one rounding into the activations' dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels.reference.accumulate import WIDE, deliver
from dsv4.kernels.reference.numerics import Numerics


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """`rsqrt(mean(x²) + eps)` over the last dimension: float32 `[..., 1]`."""
    return (x.to(WIDE).square().mean(-1, keepdim=True) + eps).rsqrt().to(torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None) -> Tensor:
    """`weight · x · rsqrt(mean(x²) + eps)`.

    x: float32 or bfloat16 `[..., D]`; weight: float32 `[D]`. Returns `x`'s shape and dtype.
    """
    normed = weight * (x.to(torch.float32) * inverse_rms(x, eps))
    return deliver(normed.to(x.dtype), out)


def head_norm(
    q: Tensor,
    eps: float,
    *,
    numerics: Numerics = Numerics.EXACT,
    out: Tensor | None = None,
) -> Tensor:
    """The same without a weight, per query head. q: `[T, H, head_dim]`; same shape and dtype.

    numerics: OFFICIAL rounds to `q`'s dtype after every operation. In bfloat16 that is the largest
    rounding of a layer; with it, a layer equals DeepSeek's code but for the order of sums.
    """
    if numerics is not Numerics.OFFICIAL:
        return deliver((q.to(torch.float32) * inverse_rms(q, eps)).to(q.dtype), out)
    mean = q.square().to(WIDE).mean(-1, keepdim=True).to(q.dtype)
    return deliver(q * (mean + eps).to(WIDE).rsqrt().to(q.dtype), out)
