"""Manifold-constrained hyper-connections: the residual path is several parallel streams.

Around every sublayer the streams `X [m, D]` of a token are collapsed into one input
(`pre`), and its output is spread over streams (`post`) that were mixed among themselves by a
doubly stochastic matrix `comb [m, m]`, row = source stream, column = destination:

    y   = Σ_j pre_j · X_j
    X'_k = post_k · sublayer(y) + Σ_j comb[j, k] · X_j

All three come from one projection of the token's own streams. Everything but `X` is FP32.
Source: DeepSeek-V4, section 2.2; Sinkhorn as in DeepSeek's inference `kernel.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels.reference.accumulate import WIDE, deliver
from dsv4.kernels.reference.norm import inverse_rms


def mhc_pre(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    sinkhorn_iters: int,
    hc_eps: float,
    norm_eps: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Collapse the streams into a sublayer's input; keep what `mhc_post` needs.

    streams: float32 or bfloat16 `[T, m, D]`; fn: float32 `[(2 + m)·m, m·D]`;
    base: float32 `[(2 + m)·m]`; scale: float32 `[3]`, for pre, post and comb.
    Returns `(y [T, D] in the streams' dtype, post float32 [T, m], comb float32 [T, m, m])`;
    `out` receives `y`.
    """
    m = streams.shape[1]
    mix = _project(streams, fn, norm_eps)
    pre_mix, post_mix, comb_mix = torch.split(mix, [m, m, m * m], -1)
    pre_base, post_base, comb_base = torch.split(base, [m, m, m * m])
    pre = _sigmoid(pre_mix * scale[0] + pre_base) + hc_eps
    post = 2 * _sigmoid(post_mix * scale[1] + post_base)
    comb = sinkhorn(
        torch.unflatten(comb_mix * scale[2] + comb_base, -1, (m, m)), sinkhorn_iters, hc_eps
    )
    return deliver(_collapse(streams, pre), out), post, comb


def mhc_post(
    u: Tensor, streams: Tensor, post: Tensor, comb: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Spread the sublayer's output `u [T, D]` over the mixed streams: `[T, m, D]`."""
    mixed = comb.to(WIDE).transpose(-1, -2) @ streams.to(WIDE)
    spread = post.to(WIDE)[..., None] * u.to(WIDE)[:, None]
    return deliver((spread + mixed).to(streams.dtype), out)


def hc_head(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    *,
    hc_eps: float,
    norm_eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """Collapse the last layer's streams for the output head.

    streams: `[T, m, D]`; fn: float32 `[m, m·D]`; base: float32 `[m]`; scale: float32 `[1]`.
    Returns `[T, D]` in the streams' dtype.
    """
    pre = _sigmoid(_project(streams, fn, norm_eps) * scale + base) + hc_eps
    return deliver(_collapse(streams, pre), out)


def sinkhorn(mix: Tensor, iterations: int, eps: float) -> Tensor:
    """Make `[..., m, m]` doubly stochastic: softmax of rows, then alternate normalisation.

    The first round normalises columns only, since the softmax has done the rows. float32.
    """
    comb = mix.to(WIDE).softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb.to(torch.float32)


def _project(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    """The normed, flattened streams times `fn`: float32 `[T, rows]`."""
    flat = streams.flatten(1)
    return (flat.to(WIDE) @ fn.to(WIDE).T).to(torch.float32) * inverse_rms(flat, eps)


def _sigmoid(x: Tensor) -> Tensor:
    return x.to(WIDE).sigmoid().to(torch.float32)


def _collapse(streams: Tensor, pre: Tensor) -> Tensor:
    return (pre.to(WIDE)[:, None] @ streams.to(WIDE))[:, 0].to(streams.dtype)
