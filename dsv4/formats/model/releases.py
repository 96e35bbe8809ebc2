"""The released models: the shapes that plans, layouts, kernels and measurements are held to.

Source: the hub's config.json of V4-Flash and V4-Pro, without draft layers but for `DRAFTING`.
"""

from __future__ import annotations

import dataclasses

from dsv4.formats.model.config import ModelConfig, YarnConfig

RELEASE_YARN = YarnConfig(factor=16.0, original_max_position_embeddings=65536)

FLASH = ModelConfig(
    vocab_size=129280,
    hidden_size=4096,
    num_hidden_layers=43,
    num_attention_heads=64,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1024,
    o_lora_rank=1024,
    o_groups=8,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    num_experts_per_tok=6,
    num_hash_layers=3,
    compress_ratios=(0, 0, *(4, 128) * 20, 4),
    yarn=RELEASE_YARN,
)
PRO = dataclasses.replace(
    FLASH,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    o_groups=16,
    moe_intermediate_size=3072,
    n_routed_experts=384,
    compress_ratios=(128, 128, *(4, 128) * 29, 4),
    routed_scaling_factor=2.5,
    index_topk=1024,
)
MODELS = {"flash": FLASH, "pro": PRO}


def _drafting(config: ModelConfig, rank: int) -> ModelConfig:
    """With three stages that read the last three layers."""
    last = config.num_hidden_layers
    return dataclasses.replace(
        config,
        num_draft_layers=3,
        dspark_markov_rank=rank,
        dspark_block_size=5,
        dspark_noise_token_id=128799,
        dspark_target_layer_ids=(last - 3, last - 2, last - 1),
    )


DRAFTING = {"flash": _drafting(FLASH, 256), "pro": _drafting(PRO, 512)}
"""The same with DSpark's draft layers: V4-Flash-0731 and V4-Pro-0813."""
