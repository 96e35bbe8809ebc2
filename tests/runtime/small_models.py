"""Small models of the real architecture: their configs and their random weights.

Weights are hub-named float32 tensors. Nothing is left at a neutral value: norms differ from one,
sinks, `ape`, biases and mixing matrices from zero, or a dropped term would go unnoticed.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dsv4.formats.model.config import AttentionKind, ModelConfig, YarnConfig
from dsv4.formats.model.inventory import DSPARK_TAPS, DraftKind

YARN = YarnConfig(factor=16.0, original_max_position_embeddings=65536)

# All three attention kinds, hash and score routing, and the real window and ratios.
REAL_SHAPED = ModelConfig(
    vocab_size=500,
    hidden_size=256,
    num_hidden_layers=5,
    num_attention_heads=4,
    head_dim=128,
    qk_rope_head_dim=64,
    q_lora_rank=64,
    o_lora_rank=64,
    o_groups=2,
    moe_intermediate_size=128,
    n_routed_experts=8,
    num_experts_per_tok=3,
    num_hash_layers=2,
    compress_ratios=(0, 0, 4, 128, 4),
    index_n_heads=4,
    index_head_dim=128,
    yarn=YARN,
)

# No dimension is a multiple of 128, or of the quantisation blocks; the SwiGLU clamp often binds.
ODD_SHAPED = ModelConfig(
    vocab_size=333,
    hidden_size=120,
    num_hidden_layers=4,
    num_attention_heads=6,
    head_dim=72,
    qk_rope_head_dim=24,
    q_lora_rank=40,
    o_lora_rank=20,
    o_groups=3,
    moe_intermediate_size=56,
    n_routed_experts=12,
    num_experts_per_tok=5,
    num_hash_layers=1,
    compress_ratios=(4, 128, 0, 4),
    routed_scaling_factor=2.5,
    swiglu_limit=1.5,
    sliding_window=37,
    index_n_heads=3,
    index_head_dim=32,
    yarn=YARN,
)

# The config of transformers' own DeepSeek-V4 tests (no YaRN, two residual streams).
TRANSFORMERS_TINY = ModelConfig(
    vocab_size=99,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=32,
    qk_rope_head_dim=8,
    q_lora_rank=32,
    o_lora_rank=16,
    o_groups=2,
    moe_intermediate_size=64,
    n_routed_experts=4,
    num_experts_per_tok=2,
    num_hash_layers=0,
    compress_ratios=(128, 4),
    sliding_window=8,
    index_n_heads=2,
    index_head_dim=16,
    index_topk=1024,
    hc_mult=2,
    hc_sinkhorn_iters=3,
)


# Draft layers over a window that a few dozen tokens fill; every attention kind below them. Sizes
# suit DeepSeek's own code: its cache rounds 64 columns at a time.
DSPARK_SMALL = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=5,
    num_attention_heads=4,
    head_dim=96,
    qk_rope_head_dim=32,
    q_lora_rank=32,
    o_lora_rank=16,
    o_groups=2,
    moe_intermediate_size=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
    num_hash_layers=1,
    compress_ratios=(0, 4, 128, 0, 4),
    sliding_window=16,
    index_n_heads=2,
    index_head_dim=64,
    index_topk=64,
    yarn=YARN,
    num_draft_layers=3,
    dspark_markov_rank=16,
    dspark_block_size=5,
    dspark_noise_token_id=95,
    dspark_target_layer_ids=(1, 3, 4),
)
MTP_SMALL = dataclasses.replace(
    DSPARK_SMALL,
    num_draft_layers=1,
    dspark_markov_rank=None,
    dspark_block_size=None,
    dspark_noise_token_id=None,
    dspark_target_layer_ids=None,
)


def random_ids(config: ModelConfig, count: int, seed: int = 0) -> Tensor:
    """int64 `[count]`."""
    return torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def random_weights(
    config: ModelConfig, seed: int = 0, draft: DraftKind = DraftKind.NONE
) -> dict[str, Tensor]:
    """Every tensor of the backbone and of its draft layers, float32 (`tid2eid` int64), under its
    hub name."""
    maker = _Maker(config, seed)
    if draft is not DraftKind.NONE:
        maker.draft(draft)
    return maker.weights


class _Maker:
    """Draws tensor after tensor, so that a seed gives the same weights everywhere."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config = config
        self.rng = torch.Generator().manual_seed(seed)
        self.weights: dict[str, Tensor] = {}
        self.normal("embed.weight", config.vocab_size, config.hidden_size)
        for layer in range(config.num_hidden_layers):
            self.block(layer)
        self.hyper("hc_head", config.hc_mult, 1)
        self.norm("norm", config.hidden_size)
        self.matrix("head", config.vocab_size, config.hidden_size)

    def block(self, layer: int) -> None:
        prefix, config = self.config.block_name(layer), self.config
        self.norm(f"{prefix}.attn_norm", config.hidden_size)
        self.norm(f"{prefix}.ffn_norm", config.hidden_size)
        self.hyper(f"{prefix}.hc_attn", config.hc_mix, 3)
        self.hyper(f"{prefix}.hc_ffn", config.hc_mix, 3)
        self.attention(f"{prefix}.attn", layer)
        self.experts(f"{prefix}.ffn", layer)

    def draft(self, kind: DraftKind) -> None:
        c, hidden = self.config, self.config.hidden_size
        for stage in range(c.num_draft_layers):
            self.block(c.num_hidden_layers + stage)
        last = f"mtp.{c.num_draft_layers - 1}"
        self.hyper(f"{last}.hc_head", c.hc_mult, 1)
        self.norm(f"{last}.norm", hidden)
        if kind is DraftKind.MTP:
            for name in ("e", "h"):
                self.matrix(f"mtp.0.{name}_proj", hidden, hidden)
                self.norm(f"mtp.0.{name}norm", hidden)
            return
        rank = c.dspark_markov_rank or 0
        self.matrix("mtp.0.main_proj", hidden, DSPARK_TAPS * hidden)
        self.norm("mtp.0.main_norm", hidden)
        self.normal(f"{last}.markov_head.markov_w1.weight", c.vocab_size, rank)
        self.matrix(f"{last}.markov_head.markov_w2", c.vocab_size, rank)
        self.matrix(f"{last}.confidence_head.proj", 1, hidden + rank)

    def normal(self, name: str, *shape: int, mean: float = 0.0, std: float = 1.0) -> None:
        self.weights[name] = mean + std * torch.randn(shape, generator=self.rng)

    def matrix(self, name: str, rows: int, cols: int) -> None:
        self.normal(f"{name}.weight", rows, cols, std=cols**-0.5)

    def norm(self, name: str, width: int) -> None:
        self.normal(f"{name}.weight", width, mean=1.0, std=0.2)

    def hyper(self, prefix: str, rows: int, scales: int) -> None:
        width = self.config.hc_mult * self.config.hidden_size
        self.normal(f"{prefix}_fn", rows, width, std=width**-0.5)
        self.normal(f"{prefix}_base", rows, std=0.5)
        self.normal(f"{prefix}_scale", scales, mean=1.0, std=0.2)

    def compressor(self, prefix: str, width: int, ratio: int, halves: int) -> None:
        self.normal(f"{prefix}.ape", ratio, halves * width, std=0.5)
        self.norm(f"{prefix}.norm", width)
        self.matrix(f"{prefix}.wkv", halves * width, self.config.hidden_size)
        self.matrix(f"{prefix}.wgate", halves * width, self.config.hidden_size)

    def attention(self, prefix: str, layer: int) -> None:
        c = self.config
        heads = c.num_attention_heads * c.head_dim
        self.matrix(f"{prefix}.wq_a", c.q_lora_rank, c.hidden_size)
        self.norm(f"{prefix}.q_norm", c.q_lora_rank)
        self.matrix(f"{prefix}.wq_b", heads, c.q_lora_rank)
        self.matrix(f"{prefix}.wkv", c.head_dim, c.hidden_size)
        self.norm(f"{prefix}.kv_norm", c.head_dim)
        self.normal(f"{prefix}.attn_sink", c.num_attention_heads)
        self.matrix(f"{prefix}.wo_a", c.o_groups * c.o_lora_rank, heads // c.o_groups)
        self.matrix(f"{prefix}.wo_b", c.hidden_size, c.o_groups * c.o_lora_rank)
        kind, ratio = c.attention_kind(layer), c.compress_ratio(layer)
        if kind is not AttentionKind.SLIDING:
            halves = 2 if kind is AttentionKind.CSA else 1
            self.compressor(f"{prefix}.compressor", c.head_dim, ratio, halves)
        if kind is AttentionKind.CSA:
            indexer = f"{prefix}.indexer"
            self.matrix(f"{indexer}.wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank)
            self.matrix(f"{indexer}.weights_proj", c.index_n_heads, c.hidden_size)
            self.compressor(f"{indexer}.compressor", c.index_head_dim, ratio, 2)

    def experts(self, prefix: str, layer: int) -> None:
        c = self.config
        self.matrix(f"{prefix}.gate", c.n_routed_experts, c.hidden_size)
        if c.is_hash_layer(layer):
            scores = torch.rand((c.vocab_size, c.n_routed_experts), generator=self.rng)
            table = scores.argsort(-1)[:, : c.num_experts_per_tok]
            self.weights[f"{prefix}.gate.tid2eid"] = table
        else:
            self.normal(f"{prefix}.gate.bias", c.n_routed_experts, std=0.2)
        for member in ("shared_experts", *(f"experts.{e}" for e in range(c.n_routed_experts))):
            self.matrix(f"{prefix}.{member}.w1", c.moe_intermediate_size, c.hidden_size)
            self.matrix(f"{prefix}.{member}.w3", c.moe_intermediate_size, c.hidden_size)
            self.matrix(f"{prefix}.{member}.w2", c.hidden_size, c.moe_intermediate_size)
