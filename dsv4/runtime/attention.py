"""Attention: 64 or 128 query heads over one shared key/value head.

A query sees the last `sliding_window` tokens and, in layers with a compressor, blocks of older
ones: all of them (HCA) or those the indexer picks (CSA). Keys are values, so rotated keys leave a
rotation in the output; it is undone at the query's position before the output projection.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.formats.model.config import AttentionKind
from dsv4.kernels.reference.attention import sparse_attention
from dsv4.kernels.reference.linear import grouped_linear, linear
from dsv4.kernels.reference.norm import head_norm, rms_norm
from dsv4.kernels.reference.numerics import Numerics
from dsv4.kernels.reference.quant_sim import KV_BLOCK, fake_quant_fp8
from dsv4.kernels.reference.rope import apply_rope
from dsv4.runtime.cache import LayerCache
from dsv4.runtime.compressor import Compressor
from dsv4.runtime.indexer import Indexer
from dsv4.runtime.positions import Step
from dsv4.runtime.weights import WeightReader


class Attention:
    """The attention sublayer of one layer, of any of the three kinds."""

    def __init__(self, read: WeightReader, layer: int, numerics: Numerics) -> None:
        c = read.weights.config
        prefix = f"{c.block_name(layer)}.attn"
        heads, width = c.num_attention_heads, c.head_dim
        self.numerics = numerics
        self.heads = heads
        self.groups = c.o_groups
        self.nope = width - c.qk_rope_head_dim
        self.scale = width**-0.5
        self.eps = c.rms_norm_eps
        self.ratio = c.compress_ratio(layer)

        self.wq_a = read.matrix(f"{prefix}.wq_a.weight", c.q_lora_rank, c.hidden_size)
        self.q_norm = read.parameter(f"{prefix}.q_norm.weight", c.q_lora_rank)
        self.wq_b = read.matrix(f"{prefix}.wq_b.weight", heads * width, c.q_lora_rank)
        self.wkv = read.matrix(f"{prefix}.wkv.weight", width, c.hidden_size)
        self.kv_norm = read.parameter(f"{prefix}.kv_norm.weight", width)
        self.sinks = read.parameter(f"{prefix}.attn_sink", heads)
        latent = c.o_groups * c.o_lora_rank
        self.wo_a = read.matrix(f"{prefix}.wo_a.weight", latent, heads * width // c.o_groups)
        self.wo_b = read.matrix(f"{prefix}.wo_b.weight", c.hidden_size, latent)

        csa = c.attention_kind(layer) is AttentionKind.CSA
        self.compressor = (
            Compressor(
                read,
                f"{prefix}.compressor",
                width,
                self.ratio,
                overlap=csa,
                finish=self._round_like_cache,
            )
            if self.ratio
            else None
        )
        self.indexer = Indexer(read, f"{prefix}.indexer", self.ratio, numerics) if csa else None

    def __call__(self, x: Tensor, step: Step, cache: LayerCache) -> Tensor:
        """x: `[T, D]`, normed; returns `[T, D]`. The tokens are appended to `cache`."""
        table = step.tables.compressed if self.ratio else step.tables.sliding
        cos, sin = table.at(step.position, step.length)

        q, qr = self._queries(x, cos, sin)
        window_kv = cache.window.extend(self.keys(x, cos, sin), step.position)
        entries, blocks = self._compressed(x, qr, step, cache)
        o = sparse_attention(q, window_kv, step.window_idx, entries, blocks, self.sinks, self.scale)
        return self._output(o, cos, sin)

    def keys(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The window's rows of `x [T, D]`: `[T, head_dim]`, rotated and rounded as they are kept.

        cos, sin: `[T, qk_rope_head_dim / 2]`, of the rows' positions.
        """
        kv = rms_norm(linear(x, self.wkv, numerics=self.numerics), self.kv_norm, self.eps)
        return self._round_like_cache(apply_rope(kv, cos, sin))

    def over(self, x: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The same where every row of `x [T, D]` attends to all of `keys [n, head_dim]`."""
        q, _ = self._queries(x, cos, sin)
        everything = torch.arange(keys.shape[0], device=x.device).expand(x.shape[0], -1)
        o = sparse_attention(q, keys, everything, None, None, self.sinks, self.scale)
        return self._output(o, cos, sin)

    def _queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """-> rotated queries `[T, H, head_dim]`, and their latent `[T, q_lora_rank]`."""
        qr = rms_norm(linear(x, self.wq_a, numerics=self.numerics), self.q_norm, self.eps)
        q = linear(qr, self.wq_b, numerics=self.numerics).view(x.shape[0], self.heads, -1)
        return apply_rope(head_norm(q, self.eps, numerics=self.numerics), cos, sin), qr

    def _output(self, o: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """What queries gathered `[T, H, head_dim]` -> `[T, D]`."""
        o = apply_rope(o, cos, sin, inverse=True)
        z = grouped_linear(o.view(o.shape[0], self.groups, -1), self.wo_a)
        return linear(z, self.wo_b, numerics=self.numerics)

    def _compressed(
        self, x: Tensor, qr: Tensor, step: Step, cache: LayerCache
    ) -> tuple[Tensor | None, Tensor | None]:
        """Append to the compressed cache; -> its entries and the blocks each token attends to."""
        if self.compressor is None or cache.compressed is None:
            return None, None
        self.compressor(x, step, cache.compressed)
        if self.indexer is None or cache.index_keys is None:
            blocks = step.all_blocks(self.ratio)
        else:
            blocks = self.indexer(x, qr, step, cache.index_keys)
        return cache.compressed.entries, blocks

    def _round_like_cache(self, kv: Tensor) -> Tensor:
        """The official cache holds the unrotated dimensions in FP8."""
        if self.numerics is not Numerics.EXACT:
            fake_quant_fp8(kv[..., : self.nope], KV_BLOCK, out=kv[..., : self.nope])
        return kv
