"""Hub -> packed -> exported -> packed: equal values, and equal bytes where they were exact."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import NVFP4PackedCompressor
from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import ModelOptNvfp4Converter
from safetensors import safe_open

import dsv4
from dsv4.formats.model.recipes import RECIPE_NAMES
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor
from dsv4.synthetic.flavours import FLAVOURS
from dsv4.synthetic.tiny import write_tiny
from dsv4.validate.values_root import values_root
from tests.formats.numeric.tool_judges import modelopt_dequantize
from tests.support.oracles import source_values, stored_tensors

Packed = Callable[[str, str], Path]
EXPERT = ".ffn.experts."


@pytest.fixture(autouse=True, scope="module")
def without_syncs() -> Any:
    """Nothing here loses power, and syncs are most of the time."""
    patch = pytest.MonkeyPatch()
    for name in ("fsync", "fdatasync"):
        patch.setattr(os, name, lambda descriptor: None)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    base = tmp_path_factory.mktemp("sources")

    def source(flavour: str) -> Path:
        if not (base / flavour).exists():
            write_tiny(base / flavour, flavour=flavour)
        return base / flavour

    return source


@pytest.fixture(scope="module")
def packed(sources: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Packed:
    base = tmp_path_factory.mktemp("packed")

    def pack(flavour: str, recipe: str) -> Path:
        out = base / f"{flavour}-{recipe}"
        if not out.exists():
            dsv4.convert(sources(flavour), out, recipe=recipe)
        return out

    return pack


def read_json(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def other_than(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> int:
    """Asserts that all bytes are the same, but for MXFP4 scales of 32 zeros; -> how many differ."""
    zeros = 0
    for name, tensor in wanted.items():
        if EXPERT in name and name.endswith(".scale") and tensor.dtype == torch.float8_e8m0fnu:
            raw, codes = tensor.view(torch.uint8), wanted[name.removesuffix("scale") + "weight"]
            other = raw != found[name].view(torch.uint8)
            assert not bool((codes.view(torch.uint8).view(*raw.shape, 16)[other] & 0x77).any())
            zeros += int(other.sum())
        else:
            assert same_bytes(found[name], tensor), name
    return zeros


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_a_round_trip_keeps_the_root_of_values(
    packed: Packed, tmp_path: Path, flavour: str, recipe: str
) -> None:
    first = packed(flavour, recipe)
    summary = dsv4.export(first, tmp_path / "out", shard_bytes=4 << 20)
    assert len(summary.plan.shards) > 1 and not summary.apart
    dsv4.convert(tmp_path / "out", tmp_path / "again", recipe=recipe)
    again = dsv4.open(tmp_path / "again")
    assert values_root(again) == values_root(dsv4.open(first))
    assert again.config == dsv4.open(first).config
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    stored = stored_tensors(tmp_path / "out")
    assert index["weight_map"].keys() == stored.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())


def test_one_changed_code_changes_the_root_of_values(packed: Packed, tmp_path: Path) -> None:
    """The planted fault: an export whose copy is packed again with one code altered."""
    first = packed("official", "native")
    dsv4.export(first, tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    with safe_open(shard, framework="pt") as opened:
        wanted = opened.get_tensor("layers.3.ffn.experts.2.w1.weight").numpy().tobytes()
    raw = bytearray(shard.read_bytes())
    raw[raw.find(wanted)] ^= 0x01
    shard.write_bytes(raw)
    dsv4.convert(tmp_path / "out", tmp_path / "again", recipe="native")
    assert values_root(dsv4.open(tmp_path / "again")) != values_root(dsv4.open(first))


def test_experts_given_back_to_mxfp4_are_the_hub_s_checkpoint(
    sources: Callable[[str], Path], packed: Packed, tmp_path: Path
) -> None:
    """Every tensor of the source, byte for byte, under its name, as safetensors reads it.

    But for the scale of 32 zeros far below the others, of which NVFP4 keeps nothing.
    """
    dsv4.export(packed("official", "native"), tmp_path / "out", experts="source")
    wanted, found = stored_tensors(sources("official")), stored_tensors(tmp_path / "out")
    assert found.keys() == wanted.keys()
    assert 0 < other_than(wanted, found) < 200, "the tiny checkpoint has a few such blocks"
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert read_json(tmp_path / "out" / "config.json") == read_json(
        sources("official") / "config.json"
    )


def test_what_nvidia_publishes(
    sources: Callable[[str], Path], packed: Packed, tmp_path: Path
) -> None:
    """Recipe native of the official release: experts of the layers in NVFP4, all else as it came.

    Draft experts stay MXFP4. Tokenizer, licences and the rest travel along.
    """
    source, out = sources("official"), tmp_path / "out"
    dsv4.export(packed("official", "native"), out)
    theirs, mine = stored_tensors(sources("modelopt")), stored_tensors(out)
    official, values = stored_tensors(source), source_values(source)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape), name
        if EXPERT not in name or (name.startswith("mtp.") and name.endswith("weight")):
            assert same_bytes(tensor, official[name]), name
    for name in (name for name in values if EXPERT in name and name.startswith("layers.")):
        stem = name.removesuffix("weight")
        judged = modelopt_dequantize(
            NVFP4Tensor(
                mine[name],
                mine[f"{stem}weight_scale"].view(torch.uint8),
                mine[f"{stem}weight_scale_2"],
                values[name].shape,
            )
        )
        assert np.array_equal(judged.double().numpy(), values[name])
        other = name.replace(".w3.", ".w1.").removesuffix("weight") + "weight_scale_2"
        assert torch.equal(mine[f"{stem}weight_scale_2"], mine[other]), "gate and up share one"
        assert float(mine[f"{stem}input_scale"]) == 1.0
    for asset in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (out / asset).read_bytes() == (source / asset).read_bytes()
    config, quant = read_json(out / "config.json"), read_json(out / "hf_quant_config.json")
    own = config["quantization_config"]
    assert own["quant_method"] == "fp8" and own["moe_quant_algo"] == "NVFP4"
    assert own["ignore"] == ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"]
    assert own["quantized_layers"].keys() == {f"layers.{n}.ffn.experts" for n in range(6)}
    assert quant["producer"]["name"] == "modelopt"
    assert quant["quantization"]["exclude_modules"] == own["ignore"]
    assert quant["quantization"]["quant_algo"] == "MIXED_PRECISION"


def test_nvfp4_of_a_source_comes_back_byte_for_byte(
    sources: Callable[[str], Path], packed: Packed, tmp_path: Path
) -> None:
    dsv4.export(packed("modelopt", "native"), tmp_path / "out")
    wanted, found = stored_tensors(sources("modelopt")), stored_tensors(tmp_path / "out")
    assert found.keys() == wanted.keys()
    assert {float(t) for name, t in found.items() if name.endswith("input_scale")} == {1.0}
    weights = {name: t for name, t in wanted.items() if not name.endswith("input_scale")}
    assert other_than(weights, found) < 200


def test_compressed_tensors_reads_it(packed: Packed, tmp_path: Path) -> None:
    """Its converter from ModelOpt's form, then its own decompression, give the store's values."""
    store = dsv4.open(packed("official", "nvfp4"))
    dsv4.export(packed("official", "nvfp4"), tmp_path / "out")
    targets = ("re:.*attn.*", "re:.*experts.*", "re:.*gate$", "re:^head$")
    converter = ModelOptNvfp4Converter(targets=targets, ignore=())
    tensors = stored_tensors(tmp_path / "out")
    made = converter.process(dict(tensors))
    names = ["head.weight", "layers.2.attn.wq_b.weight", "layers.4.ffn.experts.7.w2.weight"]
    for name in names:
        stem = name.removesuffix("weight")
        values = NVFP4PackedCompressor.decompress(
            {
                "weight_packed": made[f"{stem}weight_packed"],
                "weight_scale": made[f"{stem}weight_scale"],
                "weight_global_scale": made[f"{stem}weight_global_scale"].reshape(1),
            },
            _scheme(),
        )["weight"]
        assert torch.equal(values.float(), store.dequantize(name)), name


def _scheme() -> Any:
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import NVFP4

    return QuantizationScheme(**NVFP4, targets=["Linear"])


@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_it(
    sources: Callable[[str], Path], packed: Packed, tmp_path: Path
) -> None:
    """A BF16 release: the model that transformers loads from the export is the source's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dsv4.export(packed("bf16", "native"), tmp_path / "out")
    loaded = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (sources("bf16"), tmp_path / "out")
    ]
    weights = [model.state_dict() for model in loaded]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    dsv4.export(packed("official", "native"), tmp_path / "nvfp4")
    config = AutoConfig.from_pretrained(tmp_path / "nvfp4")
    assert config.quantization_config["moe_quant_algo"] == "NVFP4"


def test_rounded_matrices_as_bf16(packed: Packed, tmp_path: Path) -> None:
    """Gates and head of recipe standard, value for value, so that nothing but experts is NVFP4.

    Globs may have transformers' names.
    """
    store = dsv4.open(packed("official", "standard"))
    said: list[str] = []
    dsv4.export(store, tmp_path / "nvfp4", notice=said.append)
    assert len(said) == 1 and "head.weight" in said[0] and "--bf16" in said[0]
    summary = dsv4.export(store, tmp_path / "out", bf16=("*.mlp.gate.weight", "head.weight"))
    assert summary.notices == ()
    found = stored_tensors(tmp_path / "out")
    for name in ("head.weight", "layers.5.ffn.gate.weight"):
        assert store.format_of(name) == "nvfp4" and found[name].dtype == torch.bfloat16
        assert torch.equal(found[name].float(), store.dequantize(name))


@pytest.mark.parametrize("kind", ["I64", "I32", "U8"])
def test_integers_come_back_in_the_width_that_they_had(tmp_path: Path, kind: str) -> None:
    from safetensors.torch import load_file, save_file

    write_tiny(tmp_path / "source", flavour="base")
    dtype = {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}[kind]
    for path in (tmp_path / "source").glob("*.safetensors"):
        tensors = load_file(path)
        tables = {n: t.to(dtype) for n, t in tensors.items() if n.endswith("tid2eid")}
        if tables:
            save_file(tensors | tables, path)
    dsv4.convert(tmp_path / "source", tmp_path / "packed", recipe="native")
    dsv4.export(tmp_path / "packed", tmp_path / "out")
    wanted, found = stored_tensors(tmp_path / "source"), stored_tensors(tmp_path / "out")
    copies = wanted.keys() - found.keys()
    assert copies == {"mtp.0.emb.tok_emb.weight", "mtp.0.head.weight"}
    assert all(same_bytes(found[name], wanted[name]) for name in found)
