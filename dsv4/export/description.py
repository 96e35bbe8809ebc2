"""What stands beside the tensors: config.json, hf_quant_config.json and the index.

Keys and values are those of nvidia/DeepSeek-V4-Flash-NVFP4: dense matrices stay what the source's
`quantization_config` says, `moe_quant_algo` and `quantized_layers` say what is NVFP4, `ignore`
(`exclude_modules` in ModelOpt's own file) what is not. The producer's name is ModelOpt's, since
readers choose by it; its version says who wrote the files.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsv4.export.plan import ExportPlan
from dsv4.formats.numeric.operands import FP8_BLOCK, NVFP4_BLOCK
from dsv4.formats.version import TOOL

CONFIG_FILE = "config.json"
QUANT_FILE = "hf_quant_config.json"
INDEX_FILE = "model.safetensors.index.json"

_PATTERNS = ("*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*")
_EXPERTS = ".ffn.experts"
_NVFP4 = {"quant_algo": "NVFP4", "group_size": NVFP4_BLOCK}


def documents(plan: ExportPlan, config: Mapping[str, Any]) -> dict[str, bytes]:
    """Name -> content of config.json, hf_quant_config.json (if anything is NVFP4) and the index.

    config: the source's config.json.
    """
    dtypes = {entry.name: entry.dtype for _, entry in plan.entries()}
    matrices = [entry.name for _, entry in plan.entries() if len(entry.shape) == 2]
    nvfp4 = _modules(name.removesuffix("_scale_2") for name in dtypes if name.endswith("_scale_2"))
    found: dict[str, Any] = {}
    mine = dict(config)
    if nvfp4:
        common = _common(dtypes, matrices, nvfp4)
        mine["quantization_config"] = _quantization(config, dtypes) | common
        if any(module.startswith("layers.") and module.endswith(_EXPERTS) for module in nvfp4):
            mine["expert_dtype"] = "fp4"
        own = {key: value for key, value in common.items() if key not in ("producer", "ignore")}
        own.pop("config_groups")
        found[QUANT_FILE] = {
            "producer": common["producer"],
            "quantization": own | {"exclude_modules": common["ignore"]},
        }
    elif _foreign(config):
        mine.pop("quantization_config")
        if "F8_E4M3" in dtypes.values():
            mine["quantization_config"] = _fp8(dtypes)
    found[CONFIG_FILE] = mine
    weight_map = {entry.name: file for file, entry in plan.entries()}
    total = sum(entry.nbytes for _, entry in plan.entries())
    found[INDEX_FILE] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return {name: json.dumps(value, indent=2).encode() + b"\n" for name, value in found.items()}


def _common(
    dtypes: Mapping[str, str], matrices: Sequence[str], nvfp4: Sequence[str]
) -> dict[str, Any]:
    """What both files say of NVFP4."""
    mixed = any(_is_fp8(name, dtype) for name, dtype in dtypes.items())
    sides = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": NVFP4_BLOCK}
    algorithms = {"moe_quant_algo": "NVFP4"} if any(_EXPERTS in one for one in nvfp4) else {}
    return {
        **algorithms,
        "quant_algo": "MIXED_PRECISION" if mixed else "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": NVFP4_BLOCK,
        "producer": {"name": "modelopt", "version": f"{TOOL} export"},
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": sides, "input_activations": sides}
        },
        "quantized_layers": dict.fromkeys(nvfp4, _NVFP4),
        "ignore": _ignored(matrices, nvfp4),
    }


def _ignored(matrices: Sequence[str], nvfp4: Sequence[str]) -> list[str]:
    """NVIDIA's patterns; one that matches something in NVFP4 gives way to the names it means."""
    modules = _modules(name for name in matrices if name.endswith(".weight"))
    found: list[str] = []
    for pattern in _PATTERNS:
        matched = fnmatch.filter(modules, pattern)
        if not any(module in nvfp4 for module in matched):
            found += [pattern] if matched else []
        else:
            found += [module for module in matched if module not in nvfp4]
    return found


def _quantization(config: Mapping[str, Any], dtypes: Mapping[str, str]) -> dict[str, Any]:
    """What the rest is quantised by: the source's own words where they still hold."""
    own = config.get("quantization_config")
    if isinstance(own, dict) and own.get("quant_method") == "fp8":
        return own
    if any(_is_fp8(name, dtype) for name, dtype in dtypes.items()):
        return _fp8(dtypes)
    return {"quant_method": "modelopt"}


def _fp8(dtypes: Mapping[str, str]) -> dict[str, Any]:
    powers = {"scale_fmt": "ue8m0"} if "F8_E8M0" in dtypes.values() else {}
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        **powers,
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }


def _foreign(config: Mapping[str, Any]) -> bool:
    """Whether the source's words are of names and encodings that are no longer there."""
    own = config.get("quantization_config")
    return isinstance(own, dict) and own.get("quant_method") != "fp8"


def _is_fp8(name: str, dtype: str) -> bool:
    return dtype == "F8_E4M3" and name.endswith(".weight")


def _modules(names: Iterable[str]) -> list[str]:
    """Modules of weights in order, all experts of a layer as one."""
    found: dict[str, None] = {}
    for name in names:
        module = name.removesuffix(".weight")
        before, experts, _ = module.partition(f"{_EXPERTS}.")
        found[before + _EXPERTS if experts else module] = None
    return list(found)
