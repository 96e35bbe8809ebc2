"""transformers' model made to round where DeepSeek's inference code rounds.

transformers leaves the quantisation of activations and caches out. Here hooks put it in, with
ml_dtypes doing the rounding, so that `Numerics.OFFICIAL` meets something nobody here wrote. Valid
for an uncached pass, where keys are made afresh. RoPE turns other dimensions than those whose
rounding the norms' hooks add, so rounding before it is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from tests.runtime.transformers_oracle import transformers_model

_QUANTISED_INPUTS = ("q_a_proj", "q_b_proj", "kv_proj", "o_b_proj", "gate_proj", "up_proj")


def round_blocks(x: Tensor, block: int, dtype: Any, largest: float, floor: float) -> Tensor:
    """`x` rounded to `dtype` with one power-of-two scale per `block` columns, and back."""
    values = x.detach().numpy().astype(np.float32)
    pieces = []
    for start in range(0, values.shape[-1], block):
        piece = values[..., start : start + block]
        amax = np.maximum(np.abs(piece).max(-1, keepdims=True), np.float32(floor))
        mantissa, exponent = np.frexp(amax * np.float32(1 / largest))
        scale = np.ldexp(np.float32(1), np.where(mantissa == 0.5, exponent - 1, exponent))
        scaled = np.clip(piece / scale, -largest, largest)
        pieces.append(scaled.astype(dtype).astype(np.float32) * scale)
    return torch.from_numpy(np.concatenate(pieces, -1))


def round_fp8(x: Tensor, block: int) -> Tensor:
    return round_blocks(x, block, ml_dtypes.float8_e4m3fn, 448.0, 1e-4)


def round_fp4(x: Tensor, block: int) -> Tensor:
    return round_blocks(x, block, ml_dtypes.float4_e2m1fn, 6.0, 6 * 2.0**-126)


def sylvester(d: int) -> Tensor:
    """The orthogonal Hadamard matrix by Sylvester's doubling."""
    doubling = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    matrix: Tensor = torch.ones(1, 1)
    while matrix.shape[0] < d:
        matrix = torch.kron(doubling, matrix)
    rotation: Tensor = matrix * d**-0.5
    return rotation


def official_model(config: ModelConfig, weights: Mapping[str, Tensor]) -> Any:
    """transformers' model with the official roundings."""
    model = transformers_model(config, weights)
    nope = config.head_dim - config.qk_rope_head_dim

    def round_input(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (round_fp8(args[0], 128), *args[1:])

    def round_kv(module: Any, args: Any, kv: Tensor) -> Tensor:
        return torch.cat((round_fp8(kv[..., :nope], 64), kv[..., nope:]), -1)

    def round_scorer(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rotation = sylvester(config.index_head_dim)
        q, keys = (round_fp4(part @ rotation, 32) for part in args[:2])
        return (q, keys, *args[2:])

    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if name.endswith("indexer.scorer"):
            module.register_forward_pre_hook(round_scorer)
        elif name.endswith(("self_attn.kv_norm", "self_attn.compressor.kv_norm")):
            module.register_forward_hook(round_kv)
        elif name.endswith("mlp.experts"):
            module.forward = _experts_forward(module)
        elif name.endswith("shared_experts.down_proj"):
            module.register_forward_pre_hook(round_input)
        elif leaf in _QUANTISED_INPUTS and ".compressor.kv_proj" not in name:
            if ".compressor." in name and leaf != "q_b_proj":
                continue
            module.register_forward_pre_hook(round_input)
    return model


def _experts_forward(experts: Any) -> Any:
    """The official order: the routing weight enters before the down projection is rounded to."""

    def forward(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        final = torch.zeros_like(hidden)
        rounded = round_fp8(hidden, 128)
        for token, chosen in enumerate(top_k_index.tolist()):
            for slot, expert in enumerate(chosen):
                gate_up = experts.gate_up_proj[expert] @ rounded[token]
                act = experts._apply_gate(gate_up) * top_k_weights[token, slot]
                final[token] += experts.down_proj[expert] @ round_fp8(act, 128)
        return final

    return forward
