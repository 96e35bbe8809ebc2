"""humming-kernels' products on our codes: BF16 activations, its layouts, its heuristics.

NVFP4 as ModelOpt has it; FP8 with 128x128 scales, which it holds in bfloat16 for each row. Groups
of `wo_a` and experts are its MoE products. It compiles at run time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from humming.layer import HummingLayer
from humming.testing.data import generate_moe_tensors
from humming.tune import get_heuristics_config
from torch import Tensor

from benchmarks.peer_work import Product, Routed
from benchmarks.triton_peers import activate

Run = Callable[[], Tensor]


def product(work: Product) -> Run:
    """`x wᵀ`; groups become experts that all tokens visit, their inputs laid out beforehand."""
    x = work.x.transpose(0, 1).contiguous()
    groups, tokens, k = x.shape
    if groups == 1:
        layer = _layer(work.codes, work.scales, work.factor)
        call = _call(layer, "dense", tokens)
        return lambda: call(x[0])
    codes, scales = (
        part.view(groups, len(part) // groups, -1) for part in (work.codes, work.scales)
    )
    layer = _layer(codes, scales, None)
    ends = torch.arange(groups + 1, device=x.device) * tokens
    call = _call(layer, "grouped_contiguous", groups * tokens, expert_layout=ends)
    flat = x.view(groups * tokens, k)
    return lambda: call(flat).view(groups, tokens, -1).transpose(0, 1).flatten(1)


def routed(work: Routed) -> Run:
    """w13, SwiGLU by a Triton kernel, w2, the sum: four launches. Who goes where is known."""
    tokens, top_k = work.topk_idx.shape
    up, down = _layer(*work.up), _layer(*work.down)
    one = _call(up, "indexed", tokens * top_k, work.topk_idx)
    two = _call(down, "indexed", tokens * top_k, work.topk_idx.view(-1, 1))

    def run() -> Tensor:
        act = activate(one(work.x), work.weights, work.limit)
        return two(act).view(tokens, top_k, -1).sum(1, dtype=torch.float32)

    return run


def _layer(codes: Tensor, scales: Tensor, factor: Tensor | None) -> Any:
    """A layer of its own with these weights: `[N, K]` or `[E, N, K]`."""
    *lead, n, width = codes.shape
    if factor is None:
        config: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
        values = scales.view(torch.float8_e8m0fnu).to(torch.float32)
        tensors = {"weight": codes, "weight_scale_inv": values}
    else:
        config = {"quant_method": "modelopt", "quant_algo": "nvfp4"}
        tensors = {"weight": codes, "weight_scale": scales, "weight_scale_2": factor}
    with torch.device(codes.device):
        layer = HummingLayer(
            shape_n=n,
            shape_k=width if factor is None else 2 * width,
            weight_config=config,
            num_experts=lead[0] if lead else None,
            torch_dtype=torch.bfloat16,
        )
    shapes = layer.state_dict()
    layer.load_from_tensors({name: part.view(shapes[name].shape) for name, part in tensors.items()})
    layer.transform()
    return layer


def _call(
    layer: Any, kind: str, rows: int, topk_idx: Tensor | None = None, **places: Tensor
) -> Callable[[Tensor], Tensor]:
    """The layer's forward for so many rows, by the heuristics' configuration for them."""
    tuning = get_heuristics_config(layer.humming_config, shape_m=rows, gemm_type=kind)
    if topk_idx is not None:
        block = tuning["block_shape"][0]
        count = layer.humming_config.num_experts
        _, _, ids, experts, padded = generate_moe_tensors(topk_idx, count, kind, block)
        assert ids is not None and experts is not None and padded is not None
        places = {"sorted_ids": ids, "expert_ids": experts, "num_tokens_padded": padded}
    options: dict[str, Any] = {
        "compute_config": json.dumps({"gemm_type": kind}),
        "tuning_config": json.dumps(tuning),
        "top_k": 1 if topk_idx is None else topk_idx.shape[1],
        **places,
    }

    def call(x: Tensor) -> Tensor:
        found: Tensor = layer(x, **options)
        return found

    return call
