"""Global scales that are no powers of two, differ between w1 and w3, multiply or divide.

What equality holds. With powers of two everybody agrees bit for bit (see `test_flavours`). With
other scales ours is the correctly rounded product code * scale * g. ModelOpt computes
code * fl(scale * g), compressed-tensors code * fl(scale / G), which differ from ours by less than
2^-22 of the value; the latter's decompressor then rounds to BF16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file, save_file
from torch import Tensor

import dsv4
from dsv4.convert.outputs import decode
from dsv4.convert.sources.base import Source
from dsv4.formats.errors import FormatError
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import Kind, Parameter
from dsv4.formats.model.source_tensor import SourceTensor
from dsv4.synthetic.flavours import FLAVOURS, values_of
from dsv4.synthetic.tiny import write_tiny
from tests.formats.model.conftest import SMALL, FlavourSource, FlavourStore
from tests.formats.model.dequantisers import SCHEME, Outside, modelopt_encode

ONE_LAYER = dataclasses.replace(
    SMALL, num_hidden_layers=1, compress_ratios=(4,), num_hash_layers=0, num_draft_layers=0
)
EXPERTS = [f"layers.0.ffn.experts.{e}.w{p}" for e in range(4) for p in (1, 2, 3)]
SHARED = [f"layers.0.ffn.shared_experts.w{p}" for p in (1, 2, 3)]


def _by_modelopt(parameter: Parameter, config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """ModelOpt rounds every expert matrix by its default: amax scales, no power of two."""
    if parameter.kind is not Kind.EXPERT:
        return FLAVOURS["modelopt"].encode(parameter, config, seed)
    return _quantised(parameter, config, seed)


def _quantised(parameter: Parameter, config: ModelConfig, seed: int) -> dict[str, Tensor]:
    weight = values_of(parameter, config, seed)
    weight = weight * 0.77 if ".w3." in parameter.name else weight  # a global scale of its own
    stem = parameter.name.removesuffix("weight")
    members = modelopt_encode(weight) | {"input_scale": torch.tensor(0.01)}
    return {f"{stem}{role}": tensor for role, tensor in members.items()}


BY_MODELOPT = dataclasses.replace(FLAVOURS["modelopt"], encode=_by_modelopt)


def _by_compressed_tensors(
    parameter: Parameter, config: ModelConfig, seed: int
) -> dict[str, Tensor]:
    """The same under hub names in compressed-tensors' form, the global scale without a shape.

    Shared experts too, as in llm-compressor's example; other dense matrices FP8 with F32 scales.
    """
    stem = parameter.name.removesuffix("weight")
    if parameter.kind is Kind.EXPERT or stem.removesuffix(".") in SHARED:
        stored = _quantised(parameter, config, seed)
        return {
            f"{stem}weight_packed": stored[parameter.name],
            f"{stem}weight_scale": stored[f"{stem}weight_scale"],
            f"{stem}weight_global_scale": stored[f"{stem}weight_scale_2"].reciprocal(),
        }
    stored = FLAVOURS["modelopt"].encode(parameter, config, seed)
    if parameter.kind is Kind.LINEAR:
        scale = stored.pop(f"{stem}scale").to(torch.float32)
        return stored | {f"{stem}weight_scale_inv": scale}
    return stored


@pytest.fixture(scope="module")
def modelopt_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("modelopt") / "hub"
    write_tiny(out, ONE_LAYER, flavour=BY_MODELOPT)
    return out


@pytest.fixture(scope="module")
def ct_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ct") / "hub"
    flavour = dataclasses.replace(FLAVOURS["compressed-tensors"], encode=_by_compressed_tensors)
    write_tiny(out, ONE_LAYER, flavour=flavour)
    return out


BOUND = 2.0**-22


def _correctly_rounded(members: dict[str, Tensor], g: Tensor) -> Tensor:
    """code * scale * g, exact in float64 (2 + 4 + 24 significant bits), rounded once."""
    packed = members["weight_packed" if "weight_packed" in members else "weight"]
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).numpy()
    elements = torch.from_numpy(codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64))
    scales = members["weight_scale"].double().repeat_interleave(16, 1)
    return (elements * scales * g.double()).float()


def test_modelopts_own_quantisation_is_carried_verbatim(
    modelopt_source: Path, tmp_path: Path
) -> None:
    dsv4.convert(modelopt_source, tmp_path / "packed")
    packed, outside = dsv4.open(tmp_path / "packed"), Outside(modelopt_source)
    scales = {}
    for stem in EXPERTS:
        ours, theirs = packed.dequantize(f"{stem}.weight"), outside.values(stem)
        members = outside.members(stem)
        assert torch.equal(ours, _correctly_rounded(members, members["weight_scale_2"]))
        assert bool(((ours - theirs).abs() <= BOUND * theirs.abs()).all()), stem
        provenance = packed.provenance(f"{stem}.weight")
        scales[stem] = provenance["scales"]["global"]
        assert provenance["exact"] is True
        assert scales[stem] == float(outside.stored[f"{stem}.weight_scale_2"])
    assert scales[EXPERTS[0]] != scales[EXPERTS[2]]  # w1 and w3 share no scale, and need not
    report = dsv4.validate(packed, source=modelopt_source)
    assert report.ok, report.findings


def _ct_float32(members: dict[str, Tensor]) -> Tensor:
    """compressed-tensors' arithmetic, not yet rounded to BF16."""
    packed = members["weight_packed"]
    rows, half = packed.shape
    values = dequantize(
        unpack_fp4_from_uint8(packed, rows, 2 * half, torch.float32),
        members["weight_scale"].float(),
        args=SCHEME.weights,
        global_scale=members["weight_global_scale"],
        dtype=torch.float32,
    )
    assert isinstance(values, Tensor)
    return values


def test_compressed_tensors_within_four_roundings(ct_source: Path, tmp_path: Path) -> None:
    dsv4.convert(ct_source, tmp_path / "packed")
    packed, outside = dsv4.open(tmp_path / "packed"), Outside(ct_source)
    moved = 0
    for stem in (*EXPERTS, *SHARED):
        ours, members = packed.dequantize(f"{stem}.weight"), outside.members(stem)
        theirs = _ct_float32(members)
        g = members["weight_global_scale"].reciprocal()
        assert torch.equal(ours, _correctly_rounded(members, g))
        assert bool(((ours - theirs).abs() <= BOUND * theirs.abs()).all()), stem
        decompressed = outside.values(stem)  # BF16; a G without a shape even divides in BF16
        assert bool(((ours - decompressed).abs() <= 2.0**-7 * theirs.abs()).all()), stem
        moved += int((ours != theirs).sum())
    assert moved > 0  # the bound is not vacuous
    report = dsv4.validate(packed, source=ct_source)
    assert report.ok, report.findings


def test_compressed_tensors_with_powers_of_two_bit_for_bit(
    flavour_source: FlavourSource, flavour_store: FlavourStore
) -> None:
    packed = dsv4.open(flavour_store("compressed-tensors", "native"))
    outside = Outside(flavour_source("compressed-tensors"))
    for expert in range(SMALL.n_routed_experts):
        members = outside.members(f"model.layers.1.mlp.experts.{expert}.up_proj")
        ours = packed.dequantize(f"layers.1.ffn.experts.{expert}.w3.weight")
        assert torch.equal(ours, _ct_float32(members))


def _rename(directory: Path, old: str, new: str) -> Iterator[str]:
    """Move every stored tensor with leaf `old` to leaf `new`, values untouched."""
    (directory / "model.safetensors.index.json").unlink()
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith(f".{old}")]:
            tensors[f"{name.removesuffix(old)}{new}"] = tensors.pop(name)
            yield name
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("writer", ["modelopt", "compressed-tensors"])
def test_a_global_scale_written_the_other_way_round_is_refused(writer: str, tmp_path: Path) -> None:
    encode = {"modelopt": _by_modelopt, "compressed-tensors": _by_compressed_tensors}[writer]
    flavour = dataclasses.replace(FLAVOURS[writer], encode=encode)
    write_tiny(tmp_path / "hub", ONE_LAYER, flavour=flavour)
    if writer == "modelopt":
        assert list(_rename(tmp_path / "hub", "weight_scale_2", "weight_global_scale"))
        assert list(_rename_weight(tmp_path / "hub", "weight", "weight_packed"))
    else:
        assert list(_rename(tmp_path / "hub", "weight_global_scale", "weight_scale_2"))
        assert list(_rename_weight(tmp_path / "hub", "weight_packed", "weight"))
    with pytest.raises(
        FormatError, match=r"experts\.(\d+\.)?w[123]\.weight: .* the other way round"
    ):
        dsv4.convert(tmp_path / "hub", tmp_path / "packed")


def _rename_weight(directory: Path, old: str, new: str) -> Iterator[str]:
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        for stem in (*EXPERTS, *SHARED):
            if f"{stem}.{old}" in tensors and tensors[f"{stem}.{old}"].dtype == torch.uint8:
                tensors[f"{stem}.{new}"] = tensors.pop(f"{stem}.{old}")
                yield stem
        save_file(tensors, file, metadata={"format": "pt"})


def test_a_store_with_the_scale_applied_the_wrong_way_fails_validation(
    ct_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(source: Source, tensor: SourceTensor) -> Tensor:
        assert tensor.global_scale is not None
        return source.read(tensor.global_scale).reshape(())

    with monkeypatch.context() as patch:
        patch.setattr(decode, "read_global_scale", wrong)
        dsv4.convert(ct_source, tmp_path / "packed")
    report = dsv4.validate(tmp_path / "packed", source=ct_source)
    named = {finding.where for finding in report.findings}
    assert named >= {f"{stem}.weight" for stem in (*EXPERTS, *SHARED)}


@pytest.mark.parametrize(("byte", "found"), [(0x7F, "0x7f"), (0xFF, "0xff"), (0x81, "0x81")])
def test_a_block_scale_no_writer_means_is_refused(
    modelopt_source: Path, tmp_path: Path, byte: int, found: str
) -> None:
    hub = tmp_path / "hub"
    write_tiny(hub, ONE_LAYER, flavour=BY_MODELOPT)
    name = "layers.0.ffn.experts.2.w3.weight_scale"
    (file,) = (file for file in hub.glob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    tensors[name].view(torch.uint8)[4, 5] = byte
    save_file(tensors, file, metadata={"format": "pt"})
    sentence = rf"experts\.2\.w3\.weight: the block scale of row 4, block 5 is byte {found}"
    with pytest.raises(FormatError, match=sentence):
        dsv4.convert(hub, tmp_path / "packed")
