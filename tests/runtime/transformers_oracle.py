"""transformers' DeepSeek-V4 as the oracle of the forward pass, given hub-named weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Indexer

from benchmarks.transformers_peer import its_config, its_name
from dsv4.formats.model.config import ModelConfig


def transformers_model(config: ModelConfig, weights: Mapping[str, Tensor]) -> Any:
    """`DeepseekV4ForCausalLM` in float32 with these weights; every parameter must be named."""
    model = DeepseekV4ForCausalLM(its_config(config, "eager")).eval()
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


def _state(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for name, tensor in weights.items():
        if ".ffn.experts." in name:
            continue
        state[its_name(name)] = tensor
    for layer in range(config.num_hidden_layers):
        experts = [f"layers.{layer}.ffn.experts.{e}" for e in range(config.n_routed_experts)]
        target = f"model.layers.{layer}.mlp.experts"
        state[f"{target}.gate_up_proj"] = torch.stack(
            [torch.cat([weights[f"{e}.w{part}.weight"] for part in (1, 3)]) for e in experts]
        )
        state[f"{target}.down_proj"] = torch.stack([weights[f"{e}.w2.weight"] for e in experts])
    return state
