"""A layer: attention, then experts, both inside hyper-connections; and the head behind layers.

The backbone's layers and the draft layers are the same; what differs is what they attend to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv4.formats.numeric.operands import Matrix
from dsv4.kernels.reference.linear import linear
from dsv4.kernels.reference.mhc import hc_head, mhc_post, mhc_pre
from dsv4.kernels.reference.norm import rms_norm
from dsv4.kernels.reference.numerics import Numerics
from dsv4.runtime.attention import Attention
from dsv4.runtime.cache import LayerCache
from dsv4.runtime.moe import MixtureOfExperts
from dsv4.runtime.positions import Step
from dsv4.runtime.weights import WeightReader


def embedded(table: Tensor, ids: Tensor, dtype: torch.dtype, streams: int) -> Tensor:
    """Rows of `table [vocab, D]`, each copied into the residual streams: `[T, streams, D]`."""
    return table[ids].to(dtype)[:, None].expand(-1, streams, -1)


class HyperConnection:
    """Collapses the streams into a sublayer's normed input and spreads its output over them."""

    def __init__(self, read: WeightReader, prefix: str, norm: str) -> None:
        c = read.weights.config
        self.config = c
        self.fn = read.parameter(f"{prefix}_fn", c.hc_mix, c.hc_mult * c.hidden_size)
        self.base = read.parameter(f"{prefix}_base", c.hc_mix)
        self.scale = read.parameter(f"{prefix}_scale", 3)
        self.norm = read.parameter(norm, c.hidden_size)

    def collapse(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[T, m, D]` -> the sublayer's input `[T, D]`, and `post`, `comb` for `spread`."""
        c = self.config
        y, post, comb = mhc_pre(
            streams,
            self.fn,
            self.base,
            self.scale,
            sinkhorn_iters=c.hc_sinkhorn_iters,
            hc_eps=c.hc_eps,
            norm_eps=c.rms_norm_eps,
        )
        return rms_norm(y, self.norm, c.rms_norm_eps), post, comb

    def spread(self, u: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """The sublayer's output `[T, D]` and the old streams -> the new streams."""
        return mhc_post(u, streams, post, comb)


class Layer:
    """Attention, then experts."""

    def __init__(self, read: WeightReader, layer: int, numerics: Numerics) -> None:
        prefix = read.weights.config.block_name(layer)
        self.attn_hc = HyperConnection(read, f"{prefix}.hc_attn", f"{prefix}.attn_norm.weight")
        self.attn = Attention(read, layer, numerics)
        self.ffn_hc = HyperConnection(read, f"{prefix}.hc_ffn", f"{prefix}.ffn_norm.weight")
        self.ffn = MixtureOfExperts(read, layer, numerics)

    def __call__(self, streams: Tensor, step: Step, cache: LayerCache) -> Tensor:
        """streams: `[T, m, D]` -> the same shape. The tokens are appended to `cache`."""
        return self.through(streams, step.ids, lambda x: self.attn(x, step, cache))

    def through(self, streams: Tensor, ids: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """The same with `attend` (`[T, D]`, normed -> `[T, D]`) as attention. ids: int64 `[T]`."""
        x, post, comb = self.attn_hc.collapse(streams)
        streams = self.attn_hc.spread(attend(x), streams, post, comb)

        x, post, comb = self.ffn_hc.collapse(streams)
        return self.ffn_hc.spread(self.ffn(x, ids), streams, post, comb)


class Head:
    """The last layer's streams -> logits.

    at: what its tensors' names begin with: "", or a draft layer's. shared: the matrix it multiplies
    with, where that is another head's.
    """

    def __init__(self, read: WeightReader, at: str = "", shared: Matrix | None = None) -> None:
        c = read.weights.config
        self.config = c
        self.fn = read.parameter(f"{at}hc_head_fn", c.hc_mult, c.hc_mult * c.hidden_size)
        self.base = read.parameter(f"{at}hc_head_base", c.hc_mult)
        self.scale = read.parameter(f"{at}hc_head_scale", 1)
        self.norm = read.parameter(f"{at}norm.weight", c.hidden_size)
        if shared is None:
            shared = read.matrix("head.weight", c.vocab_size, c.hidden_size)
        self.weight = shared

    def __call__(self, streams: Tensor, *, out: Tensor | None = None) -> Tensor:
        """`[T, m, D]` -> float32 `[T, vocab]`."""
        return self.logits(self.collapse(streams), out=out)

    def collapse(self, streams: Tensor) -> Tensor:
        """`[T, m, D]` -> `[T, D]`, not normed yet."""
        c = self.config
        return hc_head(
            streams, self.fn, self.base, self.scale, hc_eps=c.hc_eps, norm_eps=c.rms_norm_eps
        )

    def logits(self, y: Tensor, *, out: Tensor | None = None) -> Tensor:
        """`[T, D]`, not normed yet -> float32 `[T, vocab]`."""
        x = rms_norm(y, self.norm, self.config.rms_norm_eps)
        return linear(x, self.weight, dtype=torch.float32, out=out)
