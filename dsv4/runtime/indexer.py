"""The Lightning indexer of a CSA layer: small keys beside the compressed entries, and a choice."""

from __future__ import annotations

from torch import Tensor

from dsv4.kernels.reference.indexer import hadamard, index_scores, top_blocks
from dsv4.kernels.reference.linear import linear
from dsv4.kernels.reference.numerics import Numerics
from dsv4.kernels.reference.quant_sim import INDEXER_BLOCK, fake_quant_fp4
from dsv4.kernels.reference.rope import apply_rope
from dsv4.runtime.cache import CompressedCache
from dsv4.runtime.compressor import Compressor
from dsv4.runtime.positions import Step
from dsv4.runtime.weights import WeightReader


class Indexer:
    """Keeps a key per block and picks the `index_topk` blocks that matter to a query."""

    def __init__(self, read: WeightReader, prefix: str, ratio: int, numerics: Numerics) -> None:
        config = read.weights.config
        heads, width = config.index_n_heads, config.index_head_dim
        self.numerics = numerics
        self.ratio = ratio
        self.heads = heads
        self.top_k = config.index_topk
        self.weight_scale = width**-0.5 * heads**-0.5
        self.wq_b = read.matrix(f"{prefix}.wq_b.weight", heads * width, config.q_lora_rank)
        self.weights_proj = read.matrix(f"{prefix}.weights_proj.weight", heads, config.hidden_size)
        self.compressor = Compressor(
            read, f"{prefix}.compressor", width, ratio, overlap=True, finish=self._finish
        )

    def __call__(self, x: Tensor, qr: Tensor, step: Step, cache: CompressedCache) -> Tensor:
        """Append the tokens' keys, then list the blocks that each of them attends to.

        x: `[T, D]`, the sublayer's input; qr: `[T, q_lora_rank]`, the attention's low-rank query.
        Returns int64 `[T, <= index_topk]`, -1 for padding.
        """
        self.compressor(x, step, cache)
        if step.most_blocks(self.ratio) <= self.top_k:
            return step.all_blocks(self.ratio)
        return top_blocks(
            self.scores(x, qr, step, cache), step.visible_blocks(self.ratio), self.top_k
        )

    def scores(self, x: Tensor, qr: Tensor, step: Step, cache: CompressedCache) -> Tensor:
        """Float32 `[T, blocks]`: how much each token wants each block, visible or not."""
        cos, sin = step.tables.compressed.at(step.position, step.length)
        q = linear(qr, self.wq_b, numerics=self.numerics).view(step.length, self.heads, -1)
        q = self._finish(apply_rope(q, cos, sin))
        weights = linear(x, self.weights_proj) * self.weight_scale
        keys = cache.entries[: step.most_blocks(self.ratio)]
        return index_scores(q, weights, keys)

    def _finish(self, vectors: Tensor) -> Tensor:
        """Queries and keys alike. The rotation spreads outliers before FP4; else it cancels."""
        if self.numerics is Numerics.EXACT:
            return vectors
        return fake_quant_fp4(hadamard(vectors), INDEXER_BLOCK)
