"""transformers' DeepSeek-V4 as the oracle of the forward pass, given hub-named weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Indexer

from dsv4.formats.config import ModelConfig

_KINDS = {0: "sliding_attention", 128: "heavily_compressed_attention"}

_SAME_NAME = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "q_lora_rank",
    "o_lora_rank",
    "o_groups",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "swiglu_limit",
    "sliding_window",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "hc_mult",
    "hc_sinkhorn_iters",
    "hc_eps",
    "rms_norm_eps",
]

# Applied in order; hub name -> transformers name.
_RENAMES = (
    (r"^embed\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^norm\.", "model.norm."),
    (r"^hc_head_", "model.hc_head.hc_"),
    (r"^layers\.", "model.layers."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.hc_(attn|ffn)_(\w+)$", r".\1_hc.\2"),
    (r"\.attn\.", ".self_attn."),
    (r"\.attn_sink$", ".sinks"),
    (r"\.self_attn\.indexer\.", ".self_attn.compressor.indexer."),
    (r"\.indexer\.compressor\.", ".indexer."),
    (r"\.(compressor|indexer)\.ape$", r".\1.position_bias"),
    (r"\.(compressor|indexer)\.wkv\.", r".\1.kv_proj."),
    (r"\.(compressor|indexer)\.wgate\.", r".\1.gate_proj."),
    (r"\.(compressor|indexer)\.norm\.", r".\1.kv_norm."),
    (r"\.indexer\.wq_b\.", ".indexer.q_b_proj."),
    (r"\.weights_proj\.", ".scorer.weights_proj."),
    (r"\.wq_a\.", ".q_a_proj."),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"\.wq_b\.", ".q_b_proj."),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.wo_a\.", ".o_a_proj."),
    (r"\.wo_b\.", ".o_b_proj."),
    (r"\.ffn\.", ".mlp."),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
    (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
    (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
)


def transformers_model(config: ModelConfig, weights: Mapping[str, Tensor]) -> Any:
    """`DeepseekV4ForCausalLM` in float32 with these weights; every parameter must be named."""
    model = DeepseekV4ForCausalLM(_config(config)).eval()
    state = _state(config, weights)
    expected = dict(model.state_dict())
    assert state.keys() == expected.keys(), state.keys() ^ expected.keys()
    model.load_state_dict(state)
    return model


def run(model: Any, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """One uncached pass: float32 logits `[T, vocab]`, and each indexer's choice `[T, k]`."""
    choices: list[Tensor] = []
    indexers = [m for m in model.modules() if isinstance(m, DeepseekV4Indexer)]
    hooks = [
        m.register_forward_hook(lambda _module, _args, chosen: choices.append(chosen[0]))
        for m in indexers
    ]
    with torch.no_grad():
        logits: Tensor = model(ids[None], use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, choices


def transformers_logits(config: ModelConfig, weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Float32 `[T, vocab]` of one uncached pass."""
    return run(transformers_model(config, weights), ids)[0]


def _config(c: ModelConfig) -> Any:
    factor = c.qk_rope_head_dim / c.head_dim
    rope = {"partial_rotary_factor": factor}
    compress: dict[str, Any] = {**rope, "rope_theta": c.compress_rope_theta, "rope_type": "default"}
    if c.yarn is not None:
        compress |= {
            "rope_type": "yarn",
            "factor": c.yarn.factor,
            "beta_fast": c.yarn.beta_fast,
            "beta_slow": c.yarn.beta_slow,
            "original_max_position_embeddings": c.yarn.original_max_position_embeddings,
            "attention_factor": 1.0,
        }
    return DeepseekV4Config(
        **{name: getattr(c, name) for name in _SAME_NAME},
        partial_rotary_factor=factor,
        rope_parameters={
            "main": {**rope, "rope_theta": c.rope_theta, "rope_type": "default"},
            "compress": compress,
        },
        layer_types=[_KINDS.get(r, "compressed_sparse_attention") for r in c.compress_ratios],
        mlp_layer_types=[
            "hash_moe" if c.is_hash_layer(n) else "moe" for n in range(c.num_hidden_layers)
        ],
        attn_implementation="eager",
        experts_implementation="eager",
    )


def _state(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name, tensor in weights.items():
        if ".ffn.experts." in name:
            continue
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    for layer in range(config.num_hidden_layers):
        experts = [f"layers.{layer}.ffn.experts.{e}" for e in range(config.n_routed_experts)]
        target = f"model.layers.{layer}.mlp.experts"
        state[f"{target}.gate_up_proj"] = torch.stack(
            [torch.cat([weights[f"{e}.w{part}.weight"] for part in (1, 3)]) for e in experts]
        )
        state[f"{target}.down_proj"] = torch.stack([weights[f"{e}.w2.weight"] for e in experts])
    return state
