"""The Lightning indexer: which compressed entries a query of a CSA layer attends to.

    score(b) = Σ_h w_h · relu(q_h · k_b)

over small query heads and one key per block; the `index_topk` best visible blocks are taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels.reference.accumulate import WIDE, deliver, spans


def hadamard(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Walsh-Hadamard transform of the last dimension, natural order, scaled by `d^-0.5`.

    x: float32 or bfloat16 `[..., d]`, `d` a power of two. Returns the same shape and dtype.
    """
    d = x.shape[-1]
    y = x.to(WIDE)
    span = 1
    while span < d:
        low, high = torch.unflatten(y, -1, (-1, 2, span)).unbind(-2)
        y = torch.stack((low + high, low - high), -2).flatten(-3)
        span *= 2
    return deliver((y * d**-0.5).to(x.dtype), out)


def index_scores(q: Tensor, weights: Tensor, keys: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Scores of all blocks for all queries, without a mask.

    q: float32 or bfloat16 `[T, h, d]`; weights: `[T, h]`, already scaled by `(d·h)^-0.5`;
    keys: `[n, d]`. Returns float32 `[T, n]`.
    """
    transposed = keys.to(WIDE).T
    parts = []
    for first, last in spans(q.shape[0], q.shape[1] * keys.shape[0]):
        hits = (q[first:last].to(WIDE) @ transposed).relu_()
        parts.append((weights[first:last].to(WIDE)[:, None] @ hits)[:, 0].to(torch.float32))
    return deliver(torch.cat(parts), out)


def top_blocks(scores: Tensor, visible: Tensor, top_k: int) -> Tensor:
    """The best `top_k` visible blocks of each query; equal scores by ascending block.

    scores: float32 `[T, n]`; visible: int64 `[T]`, a query sees blocks `0 ... visible - 1`.
    Returns int64 `[T, min(top_k, n)]`, -1 where a query sees fewer.
    """
    blocks = torch.arange(scores.shape[1], device=scores.device)
    masked = scores.masked_fill(blocks >= visible[:, None], float("-inf"))
    best = masked.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    return best.masked_fill(best >= visible[:, None], -1)
