"""The dialects in which a tiny checkpoint can be written; the model is the official one's.

    official             MXFP4 experts, FP8 dense matrices with E8M0 scales
    base                 FP8 experts, every scale F32; draft copies of embedding and head
    modelopt             NVFP4 experts (lossless cast), the rest and all draft layers official
    compressed-tensors   NVFP4 experts and FP8 dense matrices under transformers' names, the rest
                         BF16; BF16 draft layers under the hub's names, with copies
    bf16                 everything dequantised, exactly, to BF16

All are the same model but for two roundings: base draws its experts anew, since FP8 cannot hold
them, and compressed-tensors rounds what others keep in F32.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.dialects import TRANSFORMERS_BLOCK, TRANSFORMERS_EXPERT, TRANSFORMERS_TOP
from dsv4.formats.model.inventory import Kind, Parameter
from dsv4.formats.numeric.codecs import dequantize_fp8, dequantize_mxfp4
from dsv4.formats.numeric.mxfp4 import cast_mxfp4_to_nvfp4
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor
from dsv4.synthetic.weights import (
    Encoder,
    expert_spread,
    fp8_tensors,
    noise,
    official_tensors,
    scale_name,
)

INPUT_SCALE = 1.0 / 64

_DRAFT = "mtp."
_TRANSFORMERS = {hub: theirs for theirs, hub in (TRANSFORMERS_BLOCK | TRANSFORMERS_TOP).items()}
_LEAVES = {hub: theirs for theirs, hub in TRANSFORMERS_EXPERT.items()}


@dataclasses.dataclass(frozen=True)
class Flavour:
    """A dialect: how a parameter is stored, and what config.json says of it.

    config: fields of config.json that differ from the official ones; None removes one.
    """

    encode: Encoder
    config: Mapping[str, Any]


def nvfp4_of(parameter: Parameter, config: ModelConfig, seed: int) -> NVFP4Tensor:
    """An expert matrix cast from the official MXFP4, exactly; its global scale is a power of 2."""
    stored = official_tensors(parameter, config, seed)
    codes = stored[parameter.name].view(torch.uint8)
    scales = stored[scale_name(parameter.name)].view(torch.uint8)
    return cast_mxfp4_to_nvfp4(codes, scales, name=parameter.name)[0]


def values_of(parameter: Parameter, config: ModelConfig, seed: int) -> Tensor:
    """The values of one parameter of the official checkpoint: float32, or int64 for a table."""
    stored = official_tensors(parameter, config, seed)
    weight = stored[parameter.name]
    if parameter.kind is Kind.EXPERT:
        scales = stored[scale_name(parameter.name)].view(torch.uint8)
        return dequantize_mxfp4(weight.view(torch.uint8), scales)
    if parameter.kind is Kind.LINEAR:
        return dequantize_fp8(weight, stored[scale_name(parameter.name)])
    return weight if parameter.kind is Kind.TABLE else weight.to(torch.float32)


def modelopt_tensors(parameter: Parameter, config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """ModelOpt: NVFP4 experts in the backbone, everything else official."""
    if parameter.kind is not Kind.EXPERT or parameter.name.startswith(_DRAFT):
        return official_tensors(parameter, config, seed)
    nvfp4 = nvfp4_of(parameter, config, seed)
    stem = parameter.name.removesuffix("weight")
    return {
        parameter.name: nvfp4.codes,
        f"{stem}weight_scale": nvfp4.scales.view(torch.float8_e4m3fn),
        f"{stem}weight_scale_2": nvfp4.global_scale,
        f"{stem}input_scale": torch.tensor(INPUT_SCALE),
    }


def compressed_tensors(parameter: Parameter, config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """compressed-tensors: NVFP4 experts, FP8 dense matrices, the rest and draft layers BF16."""
    name = parameter.name
    if parameter.kind is Kind.TABLE:
        return {_their_name(name): values_of(parameter, config, seed)}
    if name.startswith(_DRAFT) or parameter.kind in (Kind.PLAIN, Kind.FLOAT32):
        values = values_of(parameter, config, seed).to(torch.bfloat16)
        return {_their_name(name): values} | _draft_copies(parameter, config, seed)
    stem = _their_name(name).removesuffix("weight")
    if parameter.kind is Kind.LINEAR:
        stored = official_tensors(parameter, config, seed)
        scale = stored[scale_name(name)].to(torch.bfloat16)
        return {f"{stem}weight": stored[name], f"{stem}weight_scale": scale}
    nvfp4 = nvfp4_of(parameter, config, seed)
    return {
        f"{stem}weight_packed": nvfp4.codes,
        f"{stem}weight_scale": nvfp4.scales.view(torch.float8_e4m3fn),
        f"{stem}weight_global_scale": nvfp4.global_scale.reciprocal().reshape(1),
        f"{stem}input_global_scale": torch.tensor([1 / INPUT_SCALE]),
    }


def bf16_tensors(parameter: Parameter, config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Plain BF16 under the hub's names; F32 stays F32."""
    if parameter.kind not in (Kind.EXPERT, Kind.LINEAR):
        return official_tensors(parameter, config, seed)
    return {parameter.name: values_of(parameter, config, seed).to(torch.bfloat16)}


def base_tensors(parameter: Parameter, config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """`-Base`: FP8 experts and matrices with F32 scales, which are no powers of two."""
    name, scale = parameter.name, scale_name(parameter.name)
    if parameter.kind is Kind.EXPERT:
        codes, exponents = fp8_tensors(seed, name, parameter.shape, expert_spread(parameter))
    elif parameter.kind is Kind.LINEAR:
        stored = official_tensors(parameter, config, seed)
        codes, exponents = stored[name], stored[scale]
    else:
        return official_tensors(parameter, config, seed) | _draft_copies(parameter, config, seed)
    factors = 1 + 0.1 * noise(seed, scale, tuple(exponents.shape))
    return {name: codes, scale: exponents.to(torch.float32) * factors}


def _draft_copies(parameter: Parameter, config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Copies of embedding and head, beside the first draft layer's norm."""
    if parameter.name != "mtp.0.attn_norm.weight":
        return {}
    shape = (config.vocab_size, config.hidden_size)
    copies = {"mtp.0.emb.tok_emb.weight": "embed.weight", "mtp.0.head.weight": "head.weight"}
    return {
        copy: official_tensors(Parameter(name, Kind.PLAIN, shape), config, seed)[name]
        for copy, name in copies.items()
    }


def _their_name(name: str) -> str:
    """The name of a hub parameter in transformers; draft layers have none there."""
    if name.startswith(_DRAFT):
        return name
    if not name.startswith("layers."):
        stem, dot, leaf = name.partition(".weight")
        theirs = _TRANSFORMERS.get(stem, stem) + dot + leaf
        return theirs if theirs.startswith("lm_head") else f"model.{theirs}"
    layers, number, rest = name.split(".", 2)
    stem = rest.removesuffix(".weight")
    leaf = rest[len(stem) :]
    if stem.startswith("ffn.experts."):
        expert, projection = stem.split(".")[2:]
        stem = f"mlp.experts.{expert}.{_LEAVES[projection]}"
    return f"model.{layers}.{number}.{_TRANSFORMERS.get(stem, stem)}{leaf}"


_FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
_MODELOPT = {
    **_FP8,
    "moe_quant_algo": "NVFP4",
    "quant_algo": "MIXED_PRECISION",
    "group_size": 16,
    "producer": {"name": "modelopt", "version": "dsv4-nvfp4-experts"},
    "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
}
_COMPRESSED = {"quant_method": "compressed-tensors", "format": "mixed-precision"}

FLAVOURS: Mapping[str, Flavour] = types.MappingProxyType(
    {
        "official": Flavour(official_tensors, {}),
        "base": Flavour(base_tensors, {"expert_dtype": "fp8"}),
        "modelopt": Flavour(modelopt_tensors, {"quantization_config": _MODELOPT}),
        "compressed-tensors": Flavour(
            compressed_tensors, {"quantization_config": _COMPRESSED, "expert_dtype": None}
        ),
        "bf16": Flavour(bf16_tensors, {"quantization_config": None, "expert_dtype": None}),
    }
)
