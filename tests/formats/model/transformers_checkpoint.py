"""A small random model that transformers builds, runs and saves in its own two formats."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4ForCausalLM

from benchmarks.transformers_peer import its_config
from dsv4.synthetic.tiny import HF_TINY
from tests.runtime.transformers_oracle import run

CONFIG = dataclasses.replace(
    HF_TINY,
    num_hidden_layers=3,
    compress_ratios=(0, 128, 4),
    num_hash_layers=1,
    index_topk=1024,
)
POSITIONS = 200


def random_model(dtype: torch.dtype) -> Any:
    """`DeepseekV4ForCausalLM` whose every parameter is random, rounded to `dtype`, in float32."""
    model = DeepseekV4ForCausalLM(its_config(CONFIG, "eager")).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.1 * noise)
            elif parameter.dim() > 1 and "position_bias" not in name:
                parameter.copy_(noise * 2 / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(noise * 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                for row in buffer:
                    row.copy_(torch.randperm(CONFIG.n_routed_experts, generator=generator)[:2])
            elif name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
        for tensor in model.state_dict().values():  # RoPE's frequencies are not among them
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(dtype))
    return model


def save(out: Path, dtype: torch.dtype, *, hybrid: bool) -> Tensor:
    """Save the model in `dtype`; -> float32 logits `[POSITIONS, vocab]` of what was saved.

    hybrid: hub names behind `model.` (transformers' default); else transformers' own names with
    fused experts.
    """
    model = random_model(dtype)
    logits, _ = run(model, tokens())
    model.to(dtype).save_pretrained(out, save_original_format=hybrid)
    return logits


def tokens() -> Tensor:
    """Token ids `[POSITIONS]`."""
    return torch.randint(
        CONFIG.vocab_size, (POSITIONS,), generator=torch.Generator().manual_seed(1)
    )
