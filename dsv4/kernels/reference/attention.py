"""Sparse multi-query attention with sinks: the core of every layer.

One key/value head serves all query heads, and a key is its own value. A query sees two sets: the
sliding window's tokens and some compressed entries, each given as a list of rows, so that one
kernel serves prefill and decoding, a ring buffer and a plain one, all blocks or the indexer's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels.reference.accumulate import WIDE, deliver, spans


def sparse_attention(
    q: Tensor,
    window_kv: Tensor,
    window_idx: Tensor,
    compressed_kv: Tensor | None,
    compressed_idx: Tensor | None,
    sinks: Tensor,
    scale: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Softmax attention over the listed rows.

    q: float32 or bfloat16 `[T, H, d]`; window_kv: `[w, d]`, window_idx: int `[T, W]`;
    compressed_kv: `[n, d]`, compressed_idx: int `[T, k]`, or None where there is nothing to see;
    an index of -1 is padding. sinks: float32 `[H]`, a logit per head that takes weight and gives
    no value. Returns `[T, H, d]` in `q`'s dtype; scores, softmax and sums are not rounded to it.
    """
    sources = [(window_kv, window_idx)]
    if compressed_kv is not None and compressed_idx is not None and compressed_idx.shape[1]:
        sources.append((compressed_kv, compressed_idx))
    listed = sum(idx.shape[1] for _, idx in sources)
    parts = [
        _attend(q[first:last], [(kv, idx[first:last]) for kv, idx in sources], sinks, scale)
        for first, last in spans(q.shape[0], listed * q.shape[2])
    ]
    return deliver(parts[0] if len(parts) == 1 else torch.cat(parts), out)


def _attend(q: Tensor, sources: list[tuple[Tensor, Tensor]], sinks: Tensor, scale: float) -> Tensor:
    idx = torch.cat([rows for _, rows in sources], 1)
    # Padding reads row 0, which holds something finite whenever anything is visible.
    kv = torch.cat([_gather(table, rows.clamp(min=0)) for table, rows in sources], 1)
    scores = (q.to(WIDE) @ kv.transpose(1, 2)) * scale
    scores = scores.masked_fill((idx < 0)[:, None], float("-inf"))
    sink = sinks.to(WIDE)[:, None]
    largest = torch.maximum(scores.amax(-1, keepdim=True), sink)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True) + (sink - largest).exp()
    return ((weights @ kv) / total).to(q.dtype)


def _gather(kv: Tensor, idx: Tensor) -> Tensor:
    return torch.unflatten(kv.index_select(0, idx.flatten()).to(WIDE), 0, idx.shape)
