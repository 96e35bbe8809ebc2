"""Which experts a token visits, and with what weight.

Affinity is `sqrt(softplus(logit))`. Ordinary layers take the experts with the highest affinity
plus a load-balancing bias; the first `num_hash_layers` take fixed experts by token id. Either way
the weights are the chosen affinities *without* bias, normalised and scaled.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dsv4.kernels.reference.accumulate import WIDE

# Keeps the quotient finite if every chosen affinity underflows; too small to change any other.
_TINY = 1e-20


def route_by_score(
    logits: Tensor, bias: Tensor, top_k: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """The `top_k` experts of highest biased affinity; equal ones in order of their number.

    logits: float32 `[T, E]`; bias: float32 `[E]`.
    Returns `(topk_idx int64 [T, top_k], topk_weights float32 [T, top_k])`.
    """
    affinity = _affinity(logits)
    order = (affinity + bias).sort(dim=-1, descending=True, stable=True).indices
    topk_idx = order[:, :top_k].contiguous()
    return topk_idx, _weights(affinity, topk_idx, scaling)


def route_by_hash(
    logits: Tensor, ids: Tensor, tid2eid: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """The experts that the table lists for each token.

    logits: float32 `[T, E]`; ids: int64 `[T]`; tid2eid: int64 `[vocab, top_k]`.
    Returns as `route_by_score`.
    """
    topk_idx = tid2eid[ids]
    return topk_idx, _weights(_affinity(logits), topk_idx, scaling)


def _affinity(logits: Tensor) -> Tensor:
    return functional.softplus(logits.to(WIDE)).sqrt().to(torch.float32)


def _weights(affinity: Tensor, topk_idx: Tensor, scaling: float) -> Tensor:
    chosen = affinity.gather(-1, topk_idx).to(WIDE)
    return (chosen / (chosen.sum(-1, keepdim=True) + _TINY) * scaling).to(torch.float32)
