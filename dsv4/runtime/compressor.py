"""The compressor of a layer, or of its indexer: hidden states in, cache entries out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv4.kernels.reference.compressor import compress
from dsv4.kernels.reference.linear import linear
from dsv4.kernels.reference.norm import rms_norm
from dsv4.kernels.reference.rope import apply_rope
from dsv4.runtime.cache import CompressedCache
from dsv4.runtime.positions import Step
from dsv4.runtime.weights import WeightReader


class Compressor:
    """Pools each block of `ratio` tokens into one entry, norms and rotates it, and stores it.

    An entry is rotated to the position of its block's first token. `finish` is what happens to it
    last: the rounding its consumer was trained with.
    """

    def __init__(
        self,
        read: WeightReader,
        prefix: str,
        width: int,
        ratio: int,
        *,
        overlap: bool,
        finish: Callable[[Tensor], Tensor],
    ) -> None:
        config = read.weights.config
        channels = 2 * width if overlap else width
        self.ratio = ratio
        self.width = width
        self.eps = config.rms_norm_eps
        self.finish = finish
        self.ape = read.parameter(f"{prefix}.ape", ratio, channels)
        self.wkv = read.matrix(f"{prefix}.wkv.weight", channels, config.hidden_size)
        self.wgate = read.matrix(f"{prefix}.wgate.weight", channels, config.hidden_size)
        self.norm = read.parameter(f"{prefix}.norm.weight", width)

    def __call__(self, x: Tensor, step: Step, cache: CompressedCache) -> None:
        """Append the tokens `x [T, D]`; write the entries of the blocks they complete."""
        kv = linear(x, self.wkv, dtype=torch.float32)
        gate = linear(x, self.wgate, dtype=torch.float32)
        pooled = compress(kv, gate, self.ape, cache.ring_kv, cache.ring_gate, step.position)
        count = pooled.shape[0]
        if count == 0:
            return
        first = step.position // self.ratio
        entries = rms_norm(pooled.to(x.dtype), self.norm, self.eps)
        cos, sin = step.tables.compressed.at(first * self.ratio, count, self.ratio)
        cache.entries[first : first + count] = self.finish(apply_rope(entries, cos, sin))
