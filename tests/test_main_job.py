"""The main job, end to end: a checkpoint as DeepSeek publishes it -> store -> the same model."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray

import dsv4
from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import DraftKind
from dsv4.synthetic.tiny import HF_TINY, ODD, TINY, TINY_CLAMPED, TINY_DSPARK, write_tiny
from tests.conftest import MakeSource
from tests.runtime.transformers_oracle import transformers_logits
from tests.support.oracles import source_values, stored_tensors

POSITIONS = 430
TOLERANCE = 1e-4  # of the logits' standard deviation


def _same(packed: PackedCheckpoint, name: str, value: NDArray[np.float64]) -> bool:
    """Equal values and equal signs of zero."""
    found = packed.dequantize(name).to(torch.float64).numpy()
    return (
        found.shape == value.shape
        and np.array_equal(found, value)
        and np.array_equal(np.signbit(found), np.signbit(value))
    )


@pytest.mark.parametrize(
    ("config", "draft"),
    [
        (TINY, DraftKind.MTP),
        (ODD, DraftKind.MTP),
        (HF_TINY, DraftKind.NONE),
        (TINY_DSPARK, DraftKind.DSPARK),
    ],
    ids=["tiny", "odd", "hf_tiny", "dspark"],
)
def test_native_dequantises_to_the_sources_values_exactly(
    config: ModelConfig, draft: DraftKind, make_source: MakeSource, tmp_path: Path
) -> None:
    source = make_source(config, draft)
    dsv4.convert(source, tmp_path / "packed", recipe="native")
    packed = dsv4.open(tmp_path / "packed")
    values = source_values(source)
    assert sorted(packed.names()) == sorted(values)
    assert any(name.startswith("mtp.") for name in values) == (draft is not DraftKind.NONE)
    different = [name for name, value in values.items() if not _same(packed, name, value)]
    assert different == []
    assert all(packed.provenance(name)["exact"] for name in values)


def test_standard_rounds_gates_and_head_and_nothing_else(
    tiny_source: Path, standard_store: Path
) -> None:
    packed = dsv4.open(standard_store)
    values = source_values(tiny_source)
    different = {name for name, value in values.items() if not _same(packed, name, value)}
    blocks = [*(f"layers.{n}" for n in range(TINY.num_hidden_layers)), "mtp.0"]
    assert different == {"head.weight", *(f"{block}.ffn.gate.weight" for block in blocks)}
    for name in different:
        error = packed.dequantize(name).numpy() - values[name]
        rel_mse = float((error**2).sum() / (values[name] ** 2).sum())
        assert packed.provenance(name)["loss"]["rel_mse"] == pytest.approx(rel_mse, rel=1e-9)
        assert rel_mse < 8e-3  # round-to-nearest at amax scales would give 9.05e-3


@pytest.mark.parametrize(
    ("config", "draft"),
    [
        (TINY, DraftKind.MTP),
        (ODD, DraftKind.MTP),
        (dataclasses.replace(HF_TINY, index_topk=1024), DraftKind.NONE),
        (TINY_CLAMPED, DraftKind.MTP),
    ],
    ids=["tiny", "odd", "hf_tiny", "clamped"],
)
def test_logits_equal_transformers_on_the_dequantised_source(
    config: ModelConfig, draft: DraftKind, make_source: MakeSource, tmp_path: Path
) -> None:
    """transformers computes from the source by an independent decoder; we from the store."""
    source = make_source(config, draft)
    dsv4.convert(source, tmp_path / "packed", recipe="native")
    weights = {
        name: torch.from_numpy(value).to(torch.int64 if name.endswith("tid2eid") else torch.float32)
        for name, value in source_values(source).items()
        if not name.startswith("mtp.")
    }
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(config.vocab_size, (POSITIONS,), generator=rng)
    theirs = transformers_logits(config, weights, ids)
    ours = dsv4.load(tmp_path / "packed").session(POSITIONS).forward(ids)
    assert ours.shape == theirs.shape == (POSITIONS, config.vocab_size)
    assert float((ours - theirs).abs().max()) <= TOLERANCE * float(theirs.std())


def test_zarr_python_lists_and_reads_every_array(standard_store: Path) -> None:
    packed = dsv4.open(standard_store)
    group = zarr.open_group(standard_store, mode="r")
    arrays = {
        path: member
        for path, member in group.members(max_depth=None)
        if isinstance(member, zarr.Array)
    }
    assert arrays.keys() == packed.store.hierarchy.arrays.keys()
    for path, array in arrays.items():
        ours = packed.store.array(path).tensor()
        stored = ours.view(torch.uint16) if ours.dtype == torch.bfloat16 else ours
        stored = stored.view(torch.uint8) if stored.dtype.itemsize == 1 else stored
        assert np.array_equal(array[...], stored.numpy()), path


def test_same_source_recipe_and_tool_give_the_same_root(
    tiny_source: Path, standard_store: Path, tmp_path: Path
) -> None:
    again = dsv4.convert(tiny_source, tmp_path / "packed", recipe="standard", workers=2)
    assert again.root == dsv4.open(standard_store).store.manifest["root"]
    files = [path for path in sorted(standard_store.rglob("*")) if path.is_file()]
    assert len(files) > 300
    for path in files:
        assert (tmp_path / "packed" / path.relative_to(standard_store)).read_bytes() == (
            path.read_bytes()
        )


def test_the_readme_prints_the_root_that_everybody_gets(tmp_path: Path) -> None:
    """Of the checkpoint in this repository, by the command that the README shows."""
    repository = Path(__file__).resolve().parent.parent
    printed = re.findall(r"^ root +([0-9a-f]{64})$", (repository / "README.md").read_text(), re.M)
    summary = dsv4.convert(repository / "examples" / "tiny-dsv4", tmp_path / "packed")
    assert printed == [summary.root] * 2  # by `dsv4 convert`, and by `dsv4 validate`


def test_the_tokenizer_and_configs_travel_along(tiny_source: Path, standard_store: Path) -> None:
    assets = dsv4.open(standard_store).store.assets
    for name in ("tokenizer.json", "generation_config.json", "config.json", "LICENSE"):
        assert assets[name].read_bytes() == (tiny_source / name).read_bytes()


def test_real_layout_of_experts_survives_the_round_trip(tmp_path: Path) -> None:
    """A model wide enough that stacks are sharded, w13 cut by rows and w2 into slabs."""
    config = dataclasses.replace(
        TINY,
        vocab_size=1024,
        num_hidden_layers=1,
        compress_ratios=(0,),
        num_hash_layers=0,
        hidden_size=1024,
        moe_intermediate_size=1024,
        n_routed_experts=8,
        num_draft_layers=0,
    )
    write_tiny(tmp_path / "hub", config, draft=DraftKind.NONE)
    dsv4.convert(tmp_path / "hub", tmp_path / "packed", recipe="nvfp4")
    packed = dsv4.open(tmp_path / "packed")
    arrays = packed.store.hierarchy.arrays
    w13 = arrays["layers/0/ffn/experts/w13/codes"]
    w2 = arrays["layers/0/ffn/experts/w2/codes"]
    assert len(w13.files()) == 8
    assert w13.shape[1] == 8 * w13.chunk[1]
    assert w2.shape[2] > w2.chunk[2]  # K-slabs
    values = source_values(tmp_path / "hub")
    experts = [name for name in values if ".experts." in name and "shared" not in name]
    assert len(experts) == 24
    assert all(_same(packed, name, values[name]) for name in experts)
    report = dsv4.validate(tmp_path / "packed", source=tmp_path / "hub")
    assert report.ok, report.findings


def test_provenance_names_the_very_bytes_of_the_source(
    tiny_source: Path, native_store: Path
) -> None:
    """Every recorded range, read from the recorded file, is the tensor safetensors gives."""
    packed = dsv4.open(native_store)
    stored = stored_tensors(tiny_source)
    for name in packed.names():
        sources = packed.provenance(name)["sources"]
        expected = {"weight": name, "scale": name.removesuffix("weight") + "scale"}
        assert sources.keys() == {role for role, key in expected.items() if key in stored}
        for role, place in sources.items():
            with (tiny_source / place["file"]).open("rb") as file:
                file.seek(place["begin"])
                raw = file.read(place["end"] - place["begin"])
            tensor = stored[expected[role]].contiguous().reshape(-1).view(torch.uint8)
            assert raw == tensor.numpy().tobytes(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_recipe_runs_and_stays_close_to_native(
    tiny_source: Path, native_store: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Rounding gates and head, and then all dense matrices, moves logits more and more."""
    ids = torch.arange(40, 72)
    exact = dsv4.load(native_store).session(64).forward(ids)
    distances = []
    for recipe in ("native", "standard", "nvfp4"):
        out = tmp_path / recipe
        dsv4.convert(tiny_source, out, recipe=recipe)
        logits = dsv4.load(out, dtype=dtype).session(64).forward(ids)
        assert logits.dtype == torch.float32
        distances.append(float((logits - exact).square().mean().sqrt() / exact.std()))
    native, standard, nvfp4 = distances
    assert native <= (0.0 if dtype == torch.float32 else 0.1)
    assert native < standard < nvfp4 < 1.0
