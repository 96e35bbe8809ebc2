"""Whose names a checkpoint uses: every dialect's tensor names, brought back to the hub's.

DeepSeek's names are ours. transformers has its own (`model.layers.0.self_attn.q_a_proj.weight`);
its `save_pretrained` writes either those, with all experts of a layer fused into two tensors, or,
by default, what its own renaming undone gives: the hub's names behind `model.` today, a mixture of
both before. llm-compressor writes transformers' names with an entry per expert. The tables below
cover every release of transformers that has DeepSeek-V4 (tests/dialects/goldens holds what each of
them writes), but for the default of 5.8.0, which cuts shared experts to pieces.

After the names, what an entry is to its tensor: `X.weight_packed` has the role `weight_packed` in
the logical tensor `X.weight` (see `source_tensor`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from dsv4.formats.errors import SourceError
from dsv4.formats.model.inventory import MAX_PARAMETERS
from dsv4.formats.model.safetensors_header import TensorEntry
from dsv4.formats.model.source_tensor import FLOATS, ITSELF, ROLES, SourceTensor, classify

MAX_EXPERTS = 1 << 12  # ten times the largest release; each becomes a tensor of its own

TRANSFORMERS_TOP = {
    "embed_tokens": "embed",
    "lm_head": "head",
    "hc_head.hc_fn": "hc_head_fn",
    "hc_head.hc_base": "hc_head_base",
    "hc_head.hc_scale": "hc_head_scale",
}

TRANSFORMERS_BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attn_hc.fn": "hc_attn_fn",
    "attn_hc.base": "hc_attn_base",
    "attn_hc.scale": "hc_attn_scale",
    "ffn_hc.fn": "hc_ffn_fn",
    "ffn_hc.base": "hc_ffn_base",
    "ffn_hc.scale": "hc_ffn_scale",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.q_a_proj": "attn.wq_a",
    "self_attn.q_a_norm": "attn.q_norm",
    "self_attn.q_b_proj": "attn.wq_b",
    "self_attn.kv_proj": "attn.wkv",
    "self_attn.kv_norm": "attn.kv_norm",
    "self_attn.o_a_proj": "attn.wo_a",
    "self_attn.o_b_proj": "attn.wo_b",
    "self_attn.compressor.position_bias": "attn.compressor.ape",
    "self_attn.compressor.kv_proj": "attn.compressor.wkv",
    "self_attn.compressor.gate_proj": "attn.compressor.wgate",
    "self_attn.compressor.kv_norm": "attn.compressor.norm",
    "self_attn.compressor.indexer.q_b_proj": "attn.indexer.wq_b",
    "self_attn.compressor.indexer.scorer.weights_proj": "attn.indexer.weights_proj",
    "self_attn.compressor.indexer.position_bias": "attn.indexer.compressor.ape",
    "self_attn.compressor.indexer.kv_proj": "attn.indexer.compressor.wkv",
    "self_attn.compressor.indexer.gate_proj": "attn.indexer.compressor.wgate",
    "self_attn.compressor.indexer.kv_norm": "attn.indexer.compressor.norm",
    "mlp.gate": "ffn.gate",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "mlp.shared_experts.gate_proj": "ffn.shared_experts.w1",
    "mlp.shared_experts.down_proj": "ffn.shared_experts.w2",
    "mlp.shared_experts.up_proj": "ffn.shared_experts.w3",
    "mlp.experts.gate_up_proj": "ffn.experts.gate_up_proj",
    "mlp.experts.down_proj": "ffn.experts.down_proj",
}

TRANSFORMERS_EXPERT = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}

# `save_pretrained` undoes its own renaming with a lossy pattern.
_HYBRID_BLOCK = {"attn.norm": "attn.kv_norm"}

# The names of releases 5.8 and 5.9 that later ones changed.
_FORMER_BLOCK = {"self_attn.compressor.indexer.weights_proj": "attn.indexer.weights_proj"}

_TO_HUB = TRANSFORMERS_BLOCK | _HYBRID_BLOCK | _FORMER_BLOCK
_BLOCK = re.compile(r"((?:layers|mtp)\.\d+\.)(.+)")
_EXPERT = re.compile(r"(?:ffn|mlp)\.experts\.(\d+)\.(\w+)")
_FUSED = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")
_CUT_TO_ROWS = re.compile(r"((?:layers|mtp)\.\d+\.)mlp\.shared_experts\.\d+\.w2\.weight")


@dataclasses.dataclass(frozen=True)
class Grouped:
    """The entries of a checkpoint as logical tensors, and what could not be understood."""

    tensors: Mapping[str, SourceTensor]
    problems: Mapping[str, str]  # hub name -> one sentence


def hub_stem(name: str) -> tuple[str, str]:
    """-> (hub name without the role, role) of an entry's name in any dialect.

    `model.layers.0.mlp.experts.3.up_proj.weight_scale` -> `layers.0.ffn.experts.3.w3`,
    `weight_scale`. The role is empty for an entry that is a whole tensor by itself.
    """
    name = name.removeprefix("model.").replace(".experts..", ".experts.")
    block = _BLOCK.fullmatch(name)
    prefix, rest = block.groups() if block else ("", name)
    table = _TO_HUB if block else TRANSFORMERS_TOP
    if rest in table:  # `attn_hc.scale` is a tensor, no block scale of something `attn_hc`
        return prefix + table[rest], ITSELF
    stem, _, role = rest.rpartition(".")
    if role not in ROLES:
        return prefix + rest, ITSELF
    if expert := _EXPERT.fullmatch(stem):
        number, projection = expert.groups()
        return f"{prefix}ffn.experts.{number}.{TRANSFORMERS_EXPERT.get(projection, projection)}", (
            role
        )
    return prefix + table.get(stem, stem), role


def group(entries: Mapping[str, TensorEntry]) -> Grouped:
    """Group entries of any dialect into logical tensors by hub name, fused experts cut apart.

    Nothing is raised: what has no meaning is in `problems`, so that all of it can be reported.
    """
    members: dict[str, dict[str, TensorEntry]] = {}
    problems: dict[str, str] = {}
    cut = 0
    for name, entry in entries.items():
        stem, role = hub_stem(name)
        if cut_up := _CUT_TO_ROWS.fullmatch(stem):
            problems[f"{cut_up[1]}ffn.shared_experts.w2.weight"] = (
                f"{entry.file}: {name} is one row of a shared expert's down projection, as "
                "transformers 5.8.0 writes it by default; load it with transformers 5.8.0 and save "
                "it again with save_original_format=False"
            )
            continue
        if role == ITSELF and (fused := _FUSED.fullmatch(stem)):
            try:
                if cut > MAX_PARAMETERS:
                    raise SourceError(f"{entry.file}: {name} is one fused tensor of too many")
                parts = _cut(fused[1], fused[2], entry)
                cut += len(parts)
            except SourceError as error:
                problems[stem] = str(error)
                continue
        else:
            parts = {stem: (role, entry)}
        for part, (part_role, part_entry) in parts.items():
            logical = part if part_role == ITSELF else f"{part}.weight"
            own = members.setdefault(logical, {})
            if part_role in own:
                problems[logical] = (
                    f"{own[part_role].name} and {entry.name} are both the "
                    f"{part_role or 'tensor'} of {logical}; remove one"
                )
            own[part_role] = part_entry
    tensors: dict[str, SourceTensor] = {}
    for logical, own in members.items():
        if logical in problems:
            continue
        try:
            tensors[logical] = classify(logical, own)
        except SourceError as error:
            problems[logical] = str(error)
    return Grouped(tensors, problems)


def _cut(prefix: str, leaf: str, entry: TensorEntry) -> dict[str, tuple[str, TensorEntry]]:
    """The experts inside a fused tensor, as entries of their own byte ranges.

    gate_up_proj is `[E, 2I, D]`, gate rows first; down_proj is `[E, D, I]`. Raises SourceError.
    """
    projections = ("w1", "w3") if leaf == "gate_up_proj" else ("w2",)
    if (
        len(entry.shape) != 3
        or entry.shape[1] % len(projections)
        or math.prod(entry.shape) == 0
        or entry.shape[0] > MAX_EXPERTS
        or entry.dtype not in FLOATS
    ):
        raise SourceError(
            f"{entry.file}: {entry.name} is {entry.dtype} {list(entry.shape)}, expected BF16 or "
            f"F32 [experts, {len(projections)} x rows, columns] of at most {MAX_EXPERTS} experts"
        )
    experts, rows, cols = entry.shape
    size = entry.nbytes // (experts * len(projections))
    return {
        f"{prefix}.{index // len(projections)}.{projections[index % len(projections)]}": (
            "weight",
            dataclasses.replace(
                entry,
                shape=(rows // len(projections), cols),
                begin=entry.begin + index * size,
                end=entry.begin + (index + 1) * size,
            ),
        )
        for index in range(experts * len(projections))
    }
