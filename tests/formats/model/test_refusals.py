"""Mixes that have no meaning are refused by name: what was found, what was expected."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import pytest

from benchmarks.transformers_peer import RENAMES
from dsv4.formats.errors import SourceError
from dsv4.formats.model import dialects
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.dialects import group, hub_stem
from dsv4.formats.model.inventory import DraftKind
from dsv4.formats.model.source_inventory import check_inventory
from tests.formats.model.headers import Entries, Stored, base, entries_of, entry, modelopt, official
from tests.support.real_configs import FLASH

CONFIG = dataclasses.replace(
    ModelConfig.from_hf(FLASH),
    num_hidden_layers=4,
    compress_ratios=(0, 0, 4, 128),
    num_hash_layers=1,
    n_routed_experts=4,
    num_experts_per_tok=2,
    vocab_size=1024,
)
EXPERT = "layers.1.ffn.experts.2.w1"
WQ_A = "layers.1.attn.wq_a"
Change = Callable[[Entries], object]


def _drop(name: str) -> Change:
    return lambda entries: entries.pop(name)


def _set(name: str, dtype: str, *shape: int) -> Change:
    return lambda entries: entries.update({name: entry(Stored(name, dtype, shape))})


FAULTS: dict[str, tuple[str, Change, str]] = {
    "no scale_2": (
        "modelopt",
        _drop(f"{EXPERT}.weight_scale_2"),
        f"{EXPERT}.weight is stored as weight U8 .*expected weight_scale_2 beside it",
    ),
    "no block scales": (
        "modelopt",
        _drop(f"{EXPERT}.weight_scale"),
        f"{EXPERT}.weight is stored as .*expected weight_scale beside it",
    ),
    "no codes": ("modelopt", _drop(f"{EXPERT}.weight"), "its weight is missing"),
    "a whole projection gone": (
        "modelopt",
        lambda entries: [entries.pop(n) for n in list(entries) if n.startswith(EXPERT)],
        rf"1 missing \({EXPERT}\.weight\)",
    ),
    "scales of another block size": (
        "modelopt",
        _set(f"{EXPERT}.weight_scale", "F8_E4M3", 2048, 128),
        r"weight_scale has shape \[2048, 128\], expected \[2048, 256\] for nvfp4",
    ),
    "E8M0 scales in NVFP4": (
        "modelopt",
        _set(f"{EXPERT}.weight_scale", "F8_E8M0", 2048, 256),
        "scales cannot be F8_E8M0",
    ),
    "a vector of global scales": (
        "modelopt",
        _set(f"{EXPERT}.weight_scale_2", "F32", 2),
        r"weight_scale_2 is F32 \[2\], expected one F32",
    ),
    "a BF16 global scale": (
        "modelopt",
        _set(f"{EXPERT}.weight_scale_2", "BF16"),
        "weight_scale_2 is BF16",
    ),
    "both kinds of scale": (
        "base",
        _set(f"{WQ_A}.weight_scale", "F32", 8, 32),
        f"{WQ_A}.weight .*expected one of scale and weight_scale, not both",
    ),
    "FP8 scales of no known grain": (
        "base",
        _set(f"{WQ_A}.scale", "F32", 1024, 2),
        r"has shape \[1024, 2\], expected \[8, 32\] for fp8 .*, or one a row or one",
    ),
    "both NVFP4 conventions": (
        "modelopt",
        _set(f"{EXPERT}.weight_global_scale", "F32", 1),
        "weight_global_scale has no meaning beside it",
    ),
    "MXFP4 with a global scale": (
        "official",
        _set(f"{EXPERT}.weight_scale_2", "F32"),
        "weight_scale_2 has no meaning beside it",
    ),
    "unknown pair of dtypes": (
        "official",
        _set(f"{EXPERT}.weight", "F8_E5M2", 2048, 4096),
        f"{EXPERT}.weight is stored as weight F8_E5M2 .*such a weight is not known",
    ),
    "a scale beside BF16": (
        "official",
        _set("layers.1.ffn.gate.scale", "F32", 1, 32),
        r"layers\.1\.ffn\.gate\.weight .*scale has no meaning beside it",
    ),
    "a norm in FP8": (
        "base",
        lambda e: e.update(
            {
                n: entry(Stored(n, d, s))
                for n, d, s in (
                    ("layers.1.attn_norm.weight", "F8_E4M3", (4096,)),
                    ("layers.1.attn_norm.scale", "F32", (32,)),
                )
            }
        ),
        r"attn_norm\.weight is fp8 of shape \[4096\], expected a matrix",
    ),
    "a table of floats": (
        "official",
        _set("layers.0.ffn.gate.tid2eid", "F32", 1024, 2),
        r"tid2eid is F32 \[1024, 2\], expected I64 or I32 or I16 or I8 or U32 or U16 or U8 \[",
    ),
    "a table of 64-bit unsigned integers": (
        "official",
        _set("layers.0.ffn.gate.tid2eid", "U64", 1024, 2),
        r"U64 .*such a weight is not known \(expected tensor BF16/F32/I64/I32/I16/I8/U32",
    ),
    "the same tensor under two names": (
        "official",
        _set("model.layers.1.self_attn.q_a_norm.weight", "BF16", 1024),
        r"q_norm\.weight and model\.layers\.1\.self_attn\.q_a_norm\.weight are both the weight",
    ),
    "fused experts beside single ones": (
        "official",
        _set("model.layers.1.mlp.experts.down_proj", "BF16", 4, 4096, 2048),
        r"are both the weight of layers\.1\.ffn\.experts\.0\.w2\.weight",
    ),
    "fused experts of rank 2": (
        "official",
        _set("model.layers.1.mlp.experts.gate_up_proj", "BF16", 4096, 4096),
        r"gate_up_proj is BF16 \[4096, 4096\], expected BF16 or F32 \[experts, 2 x rows",
    ),
    "a bias": ("official", _set(f"{WQ_A}.bias", "BF16", 1024), rf"1 unexplained \({WQ_A}\.bias"),
    "a draft copy without a draft": (
        "no draft",
        _set("mtp.0.head.weight", "BF16", 1024, 4096),
        "neither mtp.0.e_proj.weight",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_malformed_checkpoints_are_refused_by_name(fault: str) -> None:
    dialect, change, sentence = FAULTS[fault]
    draft = DraftKind.NONE if dialect == "no draft" else DraftKind.MTP
    write = {"base": base, "modelopt": modelopt}.get(dialect, official)
    entries = entries_of(CONFIG, draft, stages=int(draft is DraftKind.MTP), dialect=write)
    check_inventory(entries, CONFIG)
    change(entries)
    with pytest.raises(SourceError, match=sentence):
        check_inventory(entries, CONFIG)


def _theirs(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def test_every_name_comes_back_from_transformers() -> None:
    """By the parity tests' own table of names, which was written from the modelling code."""
    entries = entries_of(CONFIG, DraftKind.NONE, 0)
    dense = [name for name in entries if ".experts." not in name and not name.endswith(".scale")]
    renamed = {_theirs(name): name for name in dense}
    assert len(renamed) == len(dense)
    for theirs, ours in renamed.items():
        for prefixed in (theirs, theirs.removeprefix("model."), f"model.{ours}", ours):
            stem, role = hub_stem(prefixed)
            assert (f"{stem}.{role}" if role else stem) == ours


def test_fused_experts_are_ranges_of_one_entry() -> None:
    fused = entry(Stored("model.layers.0.mlp.experts.gate_up_proj", "BF16", (3, 8, 10)), begin=100)
    tensors = group({fused.name: fused}).tensors
    ranges = {name: (t.weight.begin, t.weight.end, t.shape) for name, t in tensors.items()}
    prefix = "layers.0.ffn.experts"
    assert ranges[f"{prefix}.0.w1.weight"] == (100, 180, (4, 10))
    assert ranges[f"{prefix}.0.w3.weight"] == (180, 260, (4, 10))
    assert ranges[f"{prefix}.2.w3.weight"] == (500, 580, (4, 10))
    assert len(ranges) == 6


def test_fused_experts_are_cut_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes of header must not become millions of tensors."""
    stored = [
        Stored(f"model.layers.{layer}.mlp.experts.down_proj", "BF16", (4, 2, 2))
        for layer in range(5)
    ]
    entries = {one.name: entry(one) for one in stored}
    assert not group(entries).problems
    monkeypatch.setattr(dialects, "MAX_PARAMETERS", 11)
    assert len(group(entries).problems) == 2
    assert len(group(entries).tensors) == 3 * 4
