"""The feed-forward half: SwiGLU experts, routed and shared.

    expert(x) = w2 · (silu(min(g, limit)) · clamp(u, -limit, limit)),   g = w1·x, u = w3·x

A routed expert's activation is scaled by its routing weight *before* `w2`, as DeepSeek does it,
so that the rounding of `w2`'s input sees the weighted values.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dsv4.formats.numeric.operands import Matrix
from dsv4.kernels.reference.accumulate import WIDE, deliver
from dsv4.kernels.reference.linear import linear
from dsv4.kernels.reference.numerics import Numerics


class ExpertStack(Protocol):
    """The routed experts of one layer, still packed."""

    @property
    def interleave(self) -> int:
        """Rows of `w1` (gate) and then of `w3` (up) that alternate in `w13`; 0: all `w1` first."""
        ...

    def __len__(self) -> int: ...

    def w13(self, expert: int) -> Matrix:
        """`[2·I, D]`: gate and up projections of one expert."""
        ...

    def w2(self, expert: int) -> Matrix:
        """`[D, I]`: down projection of one expert."""
        ...


def routed_experts(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    experts: ExpertStack,
    *,
    limit: float,
    numerics: Numerics = Numerics.EXACT,
    out: Tensor | None = None,
) -> Tensor:
    """Each token's chosen experts, weighted and summed in ascending order of expert.

    x: float32 or bfloat16 `[T, D]`; topk_idx: int64 `[T, k]`; topk_weights: float32 `[T, k]`;
    limit: the clamp of gate and up, 0 for none. Returns float32 `[T, D]`.
    """
    total = torch.zeros(x.shape, dtype=WIDE, device=x.device)
    top_k = topk_idx.shape[1]
    flat_idx, flat_weights = topk_idx.flatten(), topk_weights.flatten()
    by_expert = flat_idx.argsort(stable=True)
    hit, counts = torch.unique_consecutive(flat_idx[by_expert], return_counts=True)
    for expert, slots in zip(hit.tolist(), torch.split(by_expert, counts.tolist()), strict=True):
        tokens = slots // top_k
        gate_up = linear(x[tokens], experts.w13(expert), numerics=numerics)
        gate, up = split_gate_up(gate_up, experts.interleave)
        act = swiglu(gate, up, limit) * flat_weights[slots, None]
        y = linear(act.to(x.dtype), experts.w2(expert), numerics=numerics)
        total.index_add_(0, tokens, y.to(WIDE))
    return deliver(total.to(torch.float32), out)


def shared_expert(
    x: Tensor,
    w1: Matrix,
    w2: Matrix,
    w3: Matrix,
    *,
    limit: float,
    numerics: Numerics = Numerics.EXACT,
    out: Tensor | None = None,
) -> Tensor:
    """The expert every token visits. x: `[T, D]`; returns `[T, D]` in `x`'s dtype."""
    gate = linear(x, w1, numerics=numerics)
    up = linear(x, w3, numerics=numerics)
    act = swiglu(gate, up, limit).to(x.dtype)
    return deliver(linear(act, w2, numerics=numerics), out)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """`silu(gate)·up` with gate clamped from above and up from both sides: float32 `[T, I]`."""
    gate, up = gate.to(WIDE), up.to(WIDE)
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (functional.silu(gate) * up).to(torch.float32)


def split_gate_up(gate_up: Tensor, interleave: int) -> tuple[Tensor, Tensor]:
    """Undo the row interleave of `w13` on its product `[T, 2·I]`: two of `[T, I]`."""
    rows = interleave or gate_up.shape[1] // 2
    pairs = torch.unflatten(gate_up, 1, (-1, 2, rows))
    return pairs[:, :, 0].flatten(1), pairs[:, :, 1].flatten(1)
