"""Inputs of the indexer's cases: queries, keys and weights of several kinds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.core.contract import Buffers
from dsv4.kernels.ops.indexer.reference import BLOCK, weight_scale


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a step: their positions, and the caches that each reads."""

    positions: Sequence[int]
    slots: Sequence[int]

    @classmethod
    def last(cls, context: int, count: int) -> Rows:
        """The last `count` tokens of a sequence of `context`."""
        return cls(range(context - count, context), [0] * count)


Values = Callable[[ModelConfig, "Rows", int, torch.Generator], Buffers]
"""(config, rows, capacity, generator) -> q, weights, keys, key_scales, perhaps cos, sin."""


def coarse(config: ModelConfig, rows: Rows, capacity: int, rng: torch.Generator) -> Buffers:
    """Values whose sums all fit in 24 bits, so that scores are exact; quarter turns as RoPE."""
    c, device = config, rng.device

    def some(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=rng, device=device)

    count, slots = len(rows.positions), max(rows.slots) + 1
    turn = torch.arange(max(rows.positions) + 1, device=device)[:, None]
    turn = (turn + torch.arange(c.qk_rope_head_dim // 2, device=device)) % 4
    quarters = torch.tensor([1.0, 0.0, -1.0, 0.0], device=device)
    sizes = torch.tensor([-5, -4, -2, -1, 0, 1, 2, 4, 5], device=device)  # come out as they are
    target = sizes[some(0, 9, count, c.index_n_heads)] / 256
    return {
        "q": some(-24, 25, count, c.index_n_heads * c.index_head_dim) / 8,
        "weights": (target / weight_scale(c)).to(torch.bfloat16).to(torch.float32),
        "keys": some(0, 256, slots, capacity, c.index_head_dim // 2).to(torch.uint8),
        "key_scales": some(126, 128, slots, capacity, c.index_head_dim // BLOCK).to(torch.uint8),
        "cos": quarters[turn],
        "sin": quarters[(turn + 3) % 4],
    }


def equal(config: ModelConfig, rows: Rows, capacity: int, rng: torch.Generator) -> Buffers:
    """The same key everywhere, but for one in sixteen."""
    buffers = coarse(config, rows, capacity, rng)
    for name in ("keys", "key_scales"):
        other = torch.arange(capacity, device=rng.device) % 16 != 5
        buffers[name][:, other] = buffers[name][:, :1].clone()
    return buffers


def zeros(config: ModelConfig, rows: Rows, capacity: int, rng: torch.Generator) -> Buffers:
    """Queries of zeros: every score is 0 or -0."""
    buffers = coarse(config, rows, capacity, rng)
    return buffers | {"q": torch.zeros_like(buffers["q"])}


def normal(config: ModelConfig, rows: Rows, capacity: int, rng: torch.Generator) -> Buffers:
    """Any values, RoPE as it is."""
    buffers = coarse(config, rows, capacity, rng)
    del buffers["cos"], buffers["sin"]
    q = torch.randn(buffers["q"].shape, generator=rng, device=rng.device)
    weights = torch.randn(buffers["weights"].shape, generator=rng, device=rng.device)
    return buffers | {"q": q, "weights": weights}


def wide(config: ModelConfig, rows: Rows, capacity: int, rng: torch.Generator) -> Buffers:
    """Scales of queries and keys far apart, within a vector and between them."""
    buffers = normal(config, rows, capacity, rng)
    shape = (len(rows.positions), config.index_n_heads, config.index_head_dim // BLOCK, 1)
    spread = torch.randint(-40, 20, shape, generator=rng, device=rng.device)
    q = buffers["q"].view(*shape[:3], BLOCK) * torch.exp2(spread)
    scales = torch.randint(
        60, 150, buffers["key_scales"].shape, generator=rng, device=rng.device, dtype=torch.uint8
    )
    return buffers | {"q": q.flatten(1), "key_scales": scales}


def hard_scores(kind: str, rows: int, capacity: int, rng: torch.Generator) -> Tensor:
    """float32 `[rows, capacity]` to choose from, no NaN.

    "normal"; "few values": -3 ... 3, zeros of both signs; "extreme": any bits, infinities and
    subnormal numbers among them; "alike": one value but for a few; "ascending": each the best.
    """
    shape, device = (rows, capacity), rng.device
    if kind == "normal":
        return torch.randn(shape, generator=rng, device=device)
    if kind == "few values":
        values = torch.randint(-3, 4, shape, generator=rng, device=device).to(torch.float32)
        negative = torch.randint(0, 2, shape, generator=rng, device=device) > 0
        return torch.where((values == 0) & negative, -0.0, values)
    if kind == "extreme":
        bits = torch.randint(-(1 << 31), 1 << 31, shape, generator=rng, device=device)
        return bits.to(torch.int32).view(torch.float32).nan_to_num(0.0, torch.inf, -torch.inf)
    numbers = torch.arange(capacity, device=device, dtype=torch.float32).expand(shape)
    if kind == "ascending":
        return numbers.contiguous()
    rare = torch.randint(0, 100, shape, generator=rng, device=device) == 0
    return torch.where(rare, numbers, 5000.0)
