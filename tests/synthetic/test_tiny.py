"""The tiny checkpoints: complete, deterministic, full of traps, and a model to transformers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dsv4.convert.sources.base import INDEX_FILE
from dsv4.convert.sources.local import LocalSource
from dsv4.formats.errors import ConfigError, ConflictError
from dsv4.formats.model.config import AttentionKind, ModelConfig
from dsv4.formats.model.inventory import DraftKind
from dsv4.formats.model.source_inventory import check_inventory
from dsv4.synthetic.tiny import (
    DSPARK_RANK,
    HF_TINY,
    ODD,
    TINY,
    TINY_CLAMPED,
    TINY_DSPARK,
    draft_of,
    write_tiny,
)
from dsv4.synthetic.weights import EXACT_SPAN
from tests.support.oracles import source_values, stored_tensors

# Of all tensors of TINY, seed 0, names sorted: name, then bytes.
PINNED = "9eb3949bd0f404b033b57bc72b81e917fc4f815f44f30dafc1e4edfc5c609d36"
PRESETS = {"TINY": TINY, "TINY_DSPARK": TINY_DSPARK, "ODD": ODD, "HF_TINY": HF_TINY}
PRESETS["TINY_CLAMPED"] = TINY_CLAMPED


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    for name, config in PRESETS.items():
        write_tiny(root / name, config)
    return {name: root / name for name in PRESETS}


@pytest.fixture(scope="module")
def tiny(checkpoints: dict[str, Path]) -> dict[str, torch.Tensor]:
    return stored_tensors(checkpoints["TINY"])


def read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


# The files.


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_complete_official_checkpoint(
    checkpoints: dict[str, Path], preset: str
) -> None:
    source = LocalSource(checkpoints[preset])
    config = ModelConfig.from_hf(source.config)
    inventory = check_inventory(source.entries, config)
    assert config == PRESETS[preset]
    assert inventory.draft is draft_of(config)
    assert inventory.draft_stages == config.num_draft_layers
    index = read_json(checkpoints[preset] / INDEX_FILE)
    assert index["metadata"]["total_size"] == inventory.payload_bytes


@pytest.mark.parametrize("preset", PRESETS)
def test_the_library_reads_every_file_as_we_do(checkpoints: dict[str, Path], preset: str) -> None:
    source = LocalSource(checkpoints[preset])
    seen = set()
    for file in sorted(checkpoints[preset].glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118  # not a dict
                entry, found = source.entries[name], opened.get_slice(name)
                assert (entry.file, entry.dtype) == (file.name, found.get_dtype())
                assert list(entry.shape) == found.get_shape()
                seen.add(name)
    assert seen == source.entries.keys()


def test_one_file_holds_one_layer(checkpoints: dict[str, Path]) -> None:
    source = LocalSource(checkpoints["TINY_DSPARK"])
    files: dict[str, set[str]] = {}
    for name, entry in source.entries.items():
        parts = name.split(".")
        unit = ".".join(parts[:2]) if parts[0] in ("layers", "mtp") else parts[0]
        files.setdefault(entry.file, set()).add(unit)
    names = [f"model-{n:05d}-of-00011.safetensors" for n in range(1, 12)]
    assert sorted(files) == names
    head = {"head", "norm", "hc_head_fn", "hc_head_base", "hc_head_scale"}
    layers = [{f"layers.{n}"} for n in range(6)]
    stages = [{f"mtp.{n}"} for n in range(3)]
    assert [files[name] for name in names] == [{"embed"}, *layers, head, *stages]


def test_sizes_stay_small(checkpoints: dict[str, Path]) -> None:
    for name, directory in checkpoints.items():
        total = sum(file.stat().st_size for file in directory.iterdir())
        assert total < 15e6, (name, total)


@pytest.mark.parametrize("preset", ["ODD", "TINY_DSPARK"])
def test_same_seed_same_bytes(checkpoints: dict[str, Path], tmp_path: Path, preset: str) -> None:
    write_tiny(tmp_path / "again", PRESETS[preset])
    first, again = LocalSource(checkpoints[preset]), LocalSource(tmp_path / "again")
    assert first.sizes.keys() == again.sizes.keys()
    for file in first.sizes:
        assert (tmp_path / "again" / file).read_bytes() == (checkpoints[preset] / file).read_bytes()
    write_tiny(tmp_path / "other", PRESETS[preset], seed=1)
    other = LocalSource(tmp_path / "other")
    for name, entry in first.entries.items():
        same = torch.equal(
            first.read(entry).reshape(-1).view(torch.uint8),
            other.read(other.entries[name]).reshape(-1).view(torch.uint8),
        )
        # Scales of a single tile are drawn from three values only.
        assert not same or math.prod(entry.shape) < 16, name


def test_bytes_are_those_of_every_machine(tiny: dict[str, torch.Tensor]) -> None:
    digest = hashlib.sha256()
    for name in sorted(tiny):
        digest.update(name.encode())
        digest.update(tiny[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == PINNED


def test_presets_with_the_same_dimensions_share_weights(checkpoints: dict[str, Path]) -> None:
    clamped = stored_tensors(checkpoints["TINY_CLAMPED"])
    for name, tensor in stored_tensors(checkpoints["TINY"]).items():
        assert torch.equal(
            clamped[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        )


def test_only_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_tiny(tmp_path / "empty", HF_TINY)
    with pytest.raises(ConflictError, match="is not an empty directory"):
        write_tiny(tmp_path / "empty", HF_TINY)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConflictError, match="is not an empty directory"):
        write_tiny(tmp_path / "file", HF_TINY)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("draft", "stages"), [(DraftKind.NONE, 0), (DraftKind.MTP, 1), (DraftKind.DSPARK, 3)]
)
def test_the_draft_module_can_be_chosen(tmp_path: Path, draft: DraftKind, stages: int) -> None:
    write_tiny(tmp_path / "x", ODD, draft=draft)
    source = LocalSource(tmp_path / "x")
    config = ModelConfig.from_hf(source.config)
    inventory = check_inventory(source.entries, config)
    assert (inventory.draft, inventory.draft_stages) == (draft, stages)
    assert config.num_draft_layers == stages
    assert config.dspark_markov_rank == (DSPARK_RANK if draft is DraftKind.DSPARK else None)
    with pytest.raises(ConfigError, match="reads 3 backbone layers, but there are 2"):
        write_tiny(tmp_path / "y", HF_TINY, draft=DraftKind.DSPARK)


# The architecture.


def test_tiny_has_every_kind_of_layer() -> None:
    assert {TINY.attention_kind(n) for n in range(TINY.num_hidden_layers)} == set(AttentionKind)
    assert 0 < TINY.num_hash_layers < TINY.num_hidden_layers
    assert draft_of(TINY) is DraftKind.MTP


def test_odd_is_odd() -> None:
    sizes = (
        ODD.hidden_size,
        ODD.moe_intermediate_size,
        ODD.q_lora_rank,
        ODD.o_lora_rank * ODD.o_groups,
        ODD.num_attention_heads * ODD.head_dim,
        ODD.index_n_heads * ODD.index_head_dim,
        ODD.vocab_size,
    )
    assert all(size % 128 for size in sizes)
    assert ODD.n_routed_experts & (ODD.n_routed_experts - 1)


# The traps in the weights.


@pytest.mark.parametrize("preset", ["TINY", "ODD", "HF_TINY"])
def test_every_expert_matrix_has_every_trap(checkpoints: dict[str, Path], preset: str) -> None:
    stored = stored_tensors(checkpoints[preset])
    experts = [name for name in stored if ".experts." in name and name.endswith(".weight")]
    assert experts
    for name in experts:
        packed = stored[name].view(torch.uint8)
        codes = torch.stack([packed & 15, packed >> 4], -1).reshape(-1, 32)
        scales = stored[name.removesuffix("weight") + "scale"].view(torch.uint8).reshape(-1)
        assert torch.bincount(codes.reshape(-1), minlength=16).min() > 0, name
        zero = (codes % 8 == 0).all(1)
        assert ((scales == 0) & (codes == 0).all(1)).any(), name
        assert ((scales != 0) & zero & (codes == 8).any(1)).any(), name
        assert zero[scales == 0].all(), name
        used = scales[scales != 0].int()
        assert used.max() - used.min() == EXACT_SPAN == 17, name
        assert len(set(used.tolist())) >= 5, name


def test_w1_and_w3_share_their_window(tiny: dict[str, torch.Tensor]) -> None:
    """One global scale for both must stay exact: it is derived from their common maximum."""
    for name in tiny:
        if ".experts." in name and name.endswith("w1.scale"):
            pair = torch.cat([tiny[name], tiny[name.replace("w1", "w3")]]).view(torch.uint8)
            used = pair[pair != 0].int()
            assert used.max() - used.min() <= 17, name


@pytest.mark.parametrize("preset", ["TINY", "ODD"])
def test_fp8_tiles_differ_and_no_code_is_nan(checkpoints: dict[str, Path], preset: str) -> None:
    stored = stored_tensors(checkpoints[preset])
    exponents: set[int] = set()
    for name, tensor in stored.items():
        if tensor.dtype == torch.float8_e4m3fn:
            assert not tensor.float().isnan().any(), name
            assert 150 < tensor.float().abs().max() <= 448, name
            scale = stored[name.removesuffix("weight") + "scale"].view(torch.uint8)
            exponents |= set(scale.reshape(-1).tolist())
            if scale.numel() >= 8:
                assert len(set(scale.reshape(-1).tolist())) > 1, name
    assert len(exponents) >= 5


@pytest.mark.parametrize("preset", ["TINY", "ODD"])
def test_hash_tables_give_distinct_experts(checkpoints: dict[str, Path], preset: str) -> None:
    config = PRESETS[preset]
    stored = stored_tensors(checkpoints[preset])
    tables = [tensor for name, tensor in stored.items() if name.endswith("tid2eid")]
    assert len(tables) == config.num_hash_layers
    for table in tables:
        ordered = table.sort(dim=1).values
        assert (ordered[:, 1:] > ordered[:, :-1]).all()
        counts = torch.bincount(table.reshape(-1), minlength=config.n_routed_experts)
        mean = table.numel() / config.n_routed_experts
        assert len(counts) == config.n_routed_experts
        assert counts.min() > 0.8 * mean
        assert counts.max() < 1.2 * mean


def test_small_tensors_are_neither_trivial_nor_symmetric(tiny: dict[str, torch.Tensor]) -> None:
    for name, tensor in tiny.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            continue
        values = tensor.float()
        assert values.isfinite().all(), name
        if tensor.numel() > 1:
            assert values.std() > 0, name
        if name.endswith("norm.weight"):
            center = 2 if name.endswith("attn.compressor.norm.weight") else 1
            values = values - center
            assert -0.4 < values.min() < -0.1 < 0.1 < values.max() < 0.4, name
        if name.endswith(("hc_attn_base", "hc_ffn_base")):
            mix = values[-16:].reshape(4, 4)
            assert (mix - mix.T).abs().max() > 0.5, name


def test_matrices_keep_activations_near_one(checkpoints: dict[str, Path]) -> None:
    for preset in ("TINY", "ODD"):
        for name, values in source_values(checkpoints[preset]).items():
            if values.ndim == 2 and ".weight" in name and "embed" not in name:
                gain = float(np.sqrt(np.mean(values**2) * values.shape[1]))
                assert 0.5 < gain < 10, (name, gain)


# The outside judge: transformers.


@pytest.fixture(scope="module")
def restored(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TINY in float32 under its hub names, decoded by ml_dtypes."""
    out = tmp_path_factory.mktemp("float32")
    values = source_values(checkpoints["TINY"])
    tensors = {
        name: torch.from_numpy(v).to(torch.int64 if name.endswith("tid2eid") else torch.float32)
        for name, v in values.items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = read_json(checkpoints["TINY"] / "config.json")
    for field in ("quantization_config", "expert_dtype", "torch_dtype"):
        del config[field]
    (out / "config.json").write_text(json.dumps(config))
    return out


def load(directory: Path, **changes: object) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **changes
    )
    assert not any(info.values()), info
    return model


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.randint(0, TINY.vocab_size, (1, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits[0]
    return logits


@pytest.fixture(scope="module")
def model(restored: Path) -> Any:
    return load(restored)


@pytest.fixture(scope="module")
def logits(model: Any) -> torch.Tensor:
    return logits_of(model)


def test_transformers_finds_every_weight_and_sane_logits(logits: torch.Tensor) -> None:
    assert 1 < logits.std() < 3
    assert len(set(logits.argmax(-1).tolist())) > 50


def test_the_clamp_never_hides_an_error_in_tiny_but_bites_in_tiny_clamped(
    restored: Path, logits: torch.Tensor
) -> None:
    assert torch.equal(logits_of(load(restored, swiglu_limit=1e9)), logits)
    clamped = logits_of(load(restored, swiglu_limit=TINY_CLAMPED.swiglu_limit))
    assert (clamped - logits).std() > 0.1 * logits.std()


@pytest.mark.parametrize("layer", range(TINY.num_hidden_layers))
def test_every_layer_matters(model: Any, logits: torch.Tensor, layer: int) -> None:
    """Turning off attention or the routed experts of one layer moves the logits visibly."""
    block = model.model.layers[layer]
    for matrix in (block.self_attn.o_b_proj.weight, block.mlp.experts.down_proj):
        kept = matrix.detach().clone()
        with torch.no_grad():
            matrix.zero_()
            moved = (logits_of(model) - logits).std() / logits.std()
            matrix.copy_(kept)
        assert moved > 0.1, (layer, float(moved))


@pytest.mark.parametrize("kind", ["compressed_sparse_attention", "heavily_compressed_attention"])
def test_compressed_entries_matter(model: Any, logits: torch.Tensor, kind: str) -> None:
    """Without the compressors' values the logits are others: long-range attention is exercised."""
    chosen = [i for i, name in enumerate(model.config.layer_types) if name == kind]
    norms = [model.model.layers[i].self_attn.compressor.kv_norm.weight for i in chosen]
    kept = [norm.detach().clone() for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.zero_()
        moved = (logits_of(model) - logits)[130:].std() / logits.std()
        for norm, values in zip(norms, kept, strict=True):
            norm.copy_(values)
    assert moved > 0.1, float(moved)


def test_sinks_matter(model: Any, logits: torch.Tensor) -> None:
    sinks = [layer.self_attn.sinks for layer in model.model.layers]
    kept = [sink.detach().clone() for sink in sinks]
    with torch.no_grad():
        for sink in sinks:
            sink.fill_(-1e9)
        moved = (logits_of(model) - logits)[130:].std() / logits.std()
        for sink, values in zip(sinks, kept, strict=True):
            sink.copy_(values)
    assert moved > 0.1, float(moved)


def _config_of(directory: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(directory)


@pytest.mark.parametrize("preset", PRESETS)
def test_transformers_reads_our_config_and_we_read_its(
    checkpoints: dict[str, Path], tmp_path: Path, preset: str
) -> None:
    config = _config_of(checkpoints[preset])
    expected = PRESETS[preset]
    assert type(config).__name__ == "DeepseekV4Config"
    assert config.layer_types == [
        {
            AttentionKind.SLIDING: "sliding_attention",
            AttentionKind.CSA: "compressed_sparse_attention",
            AttentionKind.HCA: "heavily_compressed_attention",
        }[expected.attention_kind(layer)]
        for layer in range(expected.num_hidden_layers)
    ]
    config.save_pretrained(tmp_path)
    rewritten = read_json(tmp_path / "config.json")
    assert "compress_ratios" not in rewritten
    assert "layer_types" in rewritten
    # transformers knows no draft layers; everything else survives its rewriting.
    assert ModelConfig.from_hf(rewritten) == dataclasses.replace(expected, num_draft_layers=0)
