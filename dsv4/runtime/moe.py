"""The mixture of experts: a router, the experts it picks, and one expert for everybody."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.kernels.reference.linear import linear
from dsv4.kernels.reference.moe import routed_experts, shared_expert
from dsv4.kernels.reference.numerics import Numerics
from dsv4.kernels.reference.router import route_by_hash, route_by_score
from dsv4.runtime.weights import WeightReader


class ScoreRouter:
    """Chooses the experts with the highest biased affinity."""

    def __init__(self, read: WeightReader, prefix: str) -> None:
        c = read.weights.config
        self.top_k = c.num_experts_per_tok
        self.scaling = c.routed_scaling_factor
        self.weight = read.matrix(f"{prefix}.weight", c.n_routed_experts, c.hidden_size)
        self.bias = read.parameter(f"{prefix}.bias", c.n_routed_experts)

    def __call__(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """x: `[T, D]` -> `(topk_idx, topk_weights)`, both `[T, top_k]`."""
        logits = linear(x, self.weight, dtype=torch.float32)
        return route_by_score(logits, self.bias, self.top_k, self.scaling)


class HashRouter:
    """Chooses experts by token id; only their weights come from the input."""

    def __init__(self, read: WeightReader, prefix: str) -> None:
        c = read.weights.config
        self.scaling = c.routed_scaling_factor
        self.weight = read.matrix(f"{prefix}.weight", c.n_routed_experts, c.hidden_size)
        self.tid2eid = _expert_table(read, f"{prefix}.tid2eid")

    def __call__(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """x: `[T, D]`, ids: int64 `[T]` -> as `ScoreRouter`."""
        logits = linear(x, self.weight, dtype=torch.float32)
        return route_by_hash(logits, ids, self.tid2eid, self.scaling)


class MixtureOfExperts:
    """The feed-forward sublayer of one layer."""

    def __init__(self, read: WeightReader, layer: int, numerics: Numerics) -> None:
        c = read.weights.config
        prefix = f"{c.block_name(layer)}.ffn"
        inter, hidden = c.moe_intermediate_size, c.hidden_size
        self.numerics = numerics
        self.limit = c.swiglu_limit
        router = HashRouter if c.is_hash_layer(layer) else ScoreRouter
        self.router: HashRouter | ScoreRouter = router(read, f"{prefix}.gate")
        self.experts = read.experts(f"{prefix}.experts", c.n_routed_experts, hidden, inter)
        self.w1 = read.matrix(f"{prefix}.shared_experts.w1.weight", inter, hidden)
        self.w2 = read.matrix(f"{prefix}.shared_experts.w2.weight", hidden, inter)
        self.w3 = read.matrix(f"{prefix}.shared_experts.w3.weight", inter, hidden)

    def __call__(self, x: Tensor, ids: Tensor) -> Tensor:
        """x: `[T, D]`, normed; ids: int64 `[T]`, the tokens themselves; returns `[T, D]`."""
        topk_idx, topk_weights = self.router(x, ids)
        routed = routed_experts(
            x, topk_idx, topk_weights, self.experts, limit=self.limit, numerics=self.numerics
        )
        shared = shared_expert(
            x, self.w1, self.w2, self.w3, limit=self.limit, numerics=self.numerics
        )
        return (routed + shared.to(torch.float32)).to(x.dtype)


def _expert_table(read: WeightReader, name: str) -> Tensor:
    """Experts by token id, int64 `[vocab, top_k]`; an entry out of range would be read blindly."""
    c = read.weights.config
    table = read.table(name, c.vocab_size, c.num_experts_per_tok)
    if table.is_floating_point():
        raise RuntimeRefusal(f"{name}: found {table.dtype}, expected integers")
    lowest, highest = table.aminmax()
    if lowest < 0 or highest >= c.n_routed_experts:
        raise RuntimeRefusal(
            f"{name}: experts {int(lowest)} to {int(highest)} are listed, "
            f"expected 0 to {c.n_routed_experts - 1}"
        )
    return table.to(torch.int64)
