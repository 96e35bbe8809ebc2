"""Every flavour converts, proves itself, and holds what the formats' own tools decode."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv4
from benchmarks.transformers_peer import RENAMES
from dsv4.cli import tiny
from dsv4.convert.outputs.results import Outcome
from dsv4.convert.outputs.stack import ExpertsOutput
from dsv4.convert.plan import make_plan
from dsv4.convert.sources.base import Source
from dsv4.convert.sources.open import open_source
from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.errors import ConfigError, SourceError
from dsv4.formats.model.recipes import make_recipe
from dsv4.formats.model.source_tensor import SourceTensor
from dsv4.synthetic.flavours import FLAVOURS
from dsv4.synthetic.tiny import ODD, write_tiny
from tests.formats.model.conftest import SMALL, FlavourSource, FlavourStore
from tests.formats.model.dequantisers import Outside

EXPERT = "layers.1.ffn.experts.3.w1.weight"
DRAFT_EXPERT = "mtp.0.ffn.experts.3.w1.weight"
DENSE = "layers.2.attn.indexer.wq_b.weight"

# Flavour -> how a backbone expert, a draft expert and a dense matrix are packed by `native`.
PACKED_AS = {
    "official": ("nvfp4", "nvfp4", "fp8"),
    "base": ("fp8", "fp8", "fp8"),
    "modelopt": ("nvfp4", "nvfp4", "fp8"),
    "compressed-tensors": ("nvfp4", "plain", "fp8"),
    "bf16": ("plain", "plain", "plain"),
}


def _their_stem(flavour: str, name: str) -> str:
    """The stored name of a hub tensor, by the tests' own table of transformers' names."""
    if flavour != "compressed-tensors" or name.startswith("mtp."):
        return name
    name = re.sub(r"\.experts\.(\d+)\.w1\.", r".experts.\1.gate_proj.", name)
    name = re.sub(r"\.experts\.(\d+)\.w2\.", r".experts.\1.down_proj.", name)
    name = re.sub(r"\.experts\.(\d+)\.w3\.", r".experts.\1.up_proj.", name)
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _different(packed: PackedCheckpoint, source: Path, flavour: str) -> list[str]:
    """Tensors whose values are not those that outside tools decode from the source."""
    outside = Outside(source)
    different = []
    for name in packed.names():
        stored = _their_stem(flavour, name)
        whole = outside.stored.get(stored)
        if not stored.endswith(".weight"):
            assert whole is not None, stored
            theirs = whole
        else:
            theirs = outside.values(stored.removesuffix(".weight"))
        ours = packed.dequantize(name)
        if not torch.equal(ours.to(torch.float64), theirs.to(torch.float64)):
            different.append(name)
    return different


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_native_holds_what_outside_tools_decode(
    flavour: str, flavour_source: FlavourSource, flavour_store: FlavourStore
) -> None:
    packed = dsv4.open(flavour_store(flavour, "native"))
    found = tuple(packed.format_of(name) for name in (EXPERT, DRAFT_EXPERT, DENSE))
    assert found == PACKED_AS[flavour]
    assert all(packed.provenance(name)["exact"] for name in packed.names())
    assert _different(packed, flavour_source(flavour), flavour) == []


@pytest.mark.parametrize("recipe", ["native", "standard"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_flavour_validates_and_runs(
    flavour: str, recipe: str, flavour_source: FlavourSource, flavour_store: FlavourStore
) -> None:
    store = flavour_store(flavour, recipe)
    report = dsv4.validate(store, source=flavour_source(flavour))
    assert report.ok, report.findings
    inexact = {verdict.name for verdict in report.tensors if not verdict.exact}
    gates = {f"{b}.ffn.gate.weight" for b in ("layers.0", "layers.1", "layers.2", "mtp.0")}
    if recipe == "native":
        assert inexact == set()
    else:
        assert {"head.weight", *gates} <= inexact
        assert (EXPERT in inexact) == (PACKED_AS[flavour][0] != "nvfp4")
        assert (DRAFT_EXPERT in inexact) == (PACKED_AS[flavour][1] != "nvfp4")
    logits = dsv4.load(store).session(8).forward(torch.arange(8))
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("flavour", ["modelopt", "compressed-tensors", "bf16"])
def test_lossless_flavours_are_the_official_model(
    flavour: str, flavour_store: FlavourStore
) -> None:
    official = dsv4.open(flavour_store("official", "native"))
    packed = dsv4.open(flavour_store(flavour, "native"))
    assert packed.names() == official.names()
    different = [
        name
        for name in packed.names()
        if not torch.equal(packed.dequantize(name), official.dequantize(name))
    ]
    if flavour == "compressed-tensors":  # keeps in BF16 what others keep in F32
        assert different
        assert all(packed.store.tensor(name).dtype == torch.bfloat16 for name in different)
        assert all(official.store.tensor(name).dtype == torch.float32 for name in different)
    else:
        assert different == []


def test_modelopt_gives_the_official_store_bit_for_bit_but_for_gaps(
    flavour_store: FlavourStore,
) -> None:
    """The lossless cast is the same on either side: same codes, scales and global scales."""
    official, modelopt = (
        dsv4.open(flavour_store(flavour, "native")).store for flavour in ("official", "modelopt")
    )
    for member in ("codes", "scales", "global_scale"):
        path = f"layers/1/ffn/experts/w13/{member}"
        ours, theirs = official.array(path).tensor(), modelopt.array(path).tensor()
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_what_is_not_carried_is_counted_and_named(flavour_source: FlavourSource) -> None:
    backbone_experts = SMALL.num_hidden_layers * SMALL.n_routed_experts * 3
    for flavour, scales, copies in (
        ("official", 0, 0),
        ("modelopt", backbone_experts, 0),
        ("compressed-tensors", backbone_experts, 2),
        ("base", 0, 2),
    ):
        plan = make_plan(open_source(flavour_source(flavour)), make_recipe("native")).to_dict()
        assert plan["ignored_input_scales"] == scales, flavour
        assert len(plan["ignored_draft_copies"]) == copies, flavour


def test_a_draft_copy_that_is_none_fails_validation(tmp_path: Path) -> None:
    write_tiny(tmp_path / "hub", SMALL, flavour="base")
    file = sorted(tmp_path.glob("hub/*.safetensors"))[-1]
    tensors = load_file(file)
    tensors["mtp.0.head.weight"][5, 7] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    dsv4.convert(tmp_path / "hub", tmp_path / "packed", recipe="native")
    report = dsv4.validate(tmp_path / "packed", source=tmp_path / "hub")
    assert [finding.where for finding in report.findings] == ["mtp.0.head.weight"]
    assert "differs from head.weight" in report.findings[0].message


def test_native_refuses_fp8_experts_whose_scales_would_straddle(tmp_path: Path) -> None:
    write_tiny(tmp_path / "hub", ODD, flavour="base")
    with pytest.raises(SourceError, match=r"experts\.0\.w1\.weight is FP8 with 96 rows, expected"):
        make_plan(open_source(tmp_path / "hub"), make_recipe("native"))
    make_plan(open_source(tmp_path / "hub"), make_recipe("standard"))


def test_unknown_flavour_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'gguf' is unknown; choose one of official, base"):
        write_tiny(tmp_path / "hub", flavour="gguf")


def test_the_command_line_offers_every_flavour() -> None:
    (option,) = (option for option in tiny.params if option.name == "flavour")
    assert isinstance(option.type, click.Choice)
    assert list(option.type.choices) == list(FLAVOURS)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_gate_and_up_swapped_while_packing_fail_validation(
    flavour: str,
    flavour_source: FlavourSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pack = ExpertsOutput._pack

    def swapped(
        output: ExpertsOutput, source: Source, expert: tuple[SourceTensor, ...]
    ) -> tuple[tuple[torch.Tensor, ...], list[Outcome]]:
        return pack(output, source, expert[::-1])

    with monkeypatch.context() as patch:
        patch.setattr(ExpertsOutput, "_pack", swapped)
        dsv4.convert(flavour_source(flavour), tmp_path / "packed", recipe="native")
    report = dsv4.validate(tmp_path / "packed", source=flavour_source(flavour))
    named = {finding.where for finding in report.findings}
    assert {EXPERT, EXPERT.replace("w1", "w3"), DRAFT_EXPERT} <= named
    assert EXPERT.replace("w1", "w2") not in named
