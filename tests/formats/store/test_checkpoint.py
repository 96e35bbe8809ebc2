"""The packed store seen as the checkpoint it came from."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.errors import StoreError
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor
from tests.formats.store import packing


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedCheckpoint:
    out: Path = tmp_path_factory.mktemp("checkpoint") / "packed"
    packing.write(out)
    return PackedCheckpoint.open(out)


def test_names_are_logical_and_in_order(packed: PackedCheckpoint) -> None:
    names = packed.names()
    experts = [name for name in names if ".experts." in name]
    assert len(experts) == packing.EXPERTS * 3
    assert experts[:4] == [
        f"{packing.STACK}.{rest}.weight" for rest in ("0.w1", "0.w2", "0.w3", "1.w1")
    ]
    assert len(names) == len(set(names)) == 8 + len(experts)
    assert not [name for name in names if "scale" in name and name != "hc_head_scale"]


def _decoded(tensor: NVFP4Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """NVFP4 decoded by ml_dtypes, from the codes as they were before packing."""
    packed = tensor.codes.numpy()
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    values = codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    scales = tensor.scales.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scaled = values * np.repeat(scales, 16, axis=-1) * tensor.global_scale.numpy()
    return np.asarray(scaled[..., : tensor.shape[-1]], dtype=np.float32)


@pytest.mark.parametrize("name", packing.sample().nvfp4)
def test_nvfp4_values(packed: PackedCheckpoint, name: str) -> None:
    original = packing.sample().nvfp4[name]
    found = packed.dequantize(name)
    assert packed.format_of(name) == "nvfp4"
    assert packed.shape(name) == tuple(found.shape) == original.shape
    assert np.array_equal(found.numpy(), _decoded(original))


def test_fp8_values(packed: PackedCheckpoint) -> None:
    codes, scales = (t.view(torch.uint8).numpy() for t in packing.sample().fp8)
    tiles = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    grid = np.repeat(np.repeat(tiles, 128, axis=0), 128, axis=1)[: codes.shape[0], : codes.shape[1]]
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * grid
    assert np.array_equal(packed.dequantize("layers.0.attn.wq_a.weight").numpy(), expected)


def test_plain_values_and_dtypes(packed: PackedCheckpoint) -> None:
    raw = packing.sample().logical["embed/weight"].view(ml_dtypes.bfloat16)
    assert np.array_equal(packed.dequantize("embed.weight").numpy(), raw.astype(np.float32))
    assert packed.dequantize("embed.weight", torch.bfloat16).dtype == torch.bfloat16
    assert packed.dequantize("head.weight", torch.bfloat16).dtype == torch.bfloat16
    assert packed.dequantize("layers.0.ffn.gate.tid2eid").dtype == torch.int64
    assert packed.shape("embed.weight") == (64, packing.HIDDEN)
    assert packed.format_of("embed.weight") == "plain"


def test_a_dequantised_tensor_is_the_callers_own(packed: PackedCheckpoint) -> None:
    for name in ("hc_head_scale", "layers.0.ffn.gate.tid2eid", "head.weight"):
        before: Tensor = packed.dequantize(name).clone()
        packed.dequantize(name).zero_()
        assert torch.equal(packed.dequantize(name), before)


def test_provenance_of_an_expert(packed: PackedCheckpoint) -> None:
    name = f"{packing.STACK}.2.w3.weight"
    facts = packed.provenance(name)
    row = packing.sample().logical["layers/0/ffn/experts/w13/lineage"][2, 1]
    assert facts["sources"] == {
        "weight": {"file": "a.safetensors", "begin": row[1], "end": row[2]},
        "scale": {"file": "b.safetensors", "begin": row[4], "end": row[5]},
    }
    assert (facts["expert"], facts["recoded_blocks"], facts["rounded_blocks"]) == (2, row[6], 0)
    assert facts["exact"] is True
    assert (facts["format"], facts["layout"]) == ("nvfp4", "nvfp4.kmajor.sf32x4x4")
    assert (facts["name"], facts["path"]) == (name, "layers/0/ffn/experts/w13")
    scales = packing.sample().nvfp4[name].scales.numpy().view(ml_dtypes.float8_e4m3fn)
    values = scales.astype(np.float32)
    subnormal = (values > 0) & (values < float(ml_dtypes.finfo(scales.dtype).smallest_normal))
    assert facts["scales"] == {
        "min": values.min(),
        "max": values.max(),
        "blocks": values.size,
        "subnormal": subnormal.sum(),
        "zero": (values == 0).sum(),
        "global": float(packing.sample().nvfp4[name].global_scale),
    }


def test_provenance_of_single_tensors(packed: PackedCheckpoint) -> None:
    fp8 = packed.provenance("layers.0.attn.wq_a.weight")
    assert fp8["sources"]["scale"] == {"file": "a.safetensors", "begin": 16, "end": 24}
    assert fp8["exact"] is True
    assert set(fp8["scales"]) == {"min", "max"}
    rounded = packed.provenance("head.weight")
    assert (rounded["exact"], rounded["rel_mse"]) == (False, 0.0078125)
    assert rounded["shape"] == [72, 100]
    norm = packed.provenance("norm.weight")
    assert norm["sources"] == {"weight": {"file": "b.safetensors", "begin": 64, "end": 128}}
    assert (norm["format"], norm["exact"]) == ("plain", True)


def test_unknown_names_get_suggestions(packed: PackedCheckpoint) -> None:
    for ask in (packed.dequantize, packed.provenance, packed.shape, packed.format_of):
        with pytest.raises(StoreError, match=r"did you mean .*layers\.0\.attn\.wo_b\.weight"):
            ask("layers.0.attn.wob.weight")
    with pytest.raises(StoreError, match=r"there is no tensor 'zzz'$"):
        packed.dequantize("zzz")


@pytest.mark.parametrize(
    "sources",
    [
        {"weight": [9, 0, 1]},
        {"weight": [-1, 0, 1]},
        {"weight": [0, 0, 4097]},
        {"weight": [0, 2, 1]},
        {"weight": [0, -1, 1]},
        {"weight": [0]},
        {"weight": 1},
        [],
        7,
    ],
)
def test_sources_that_do_not_fit_are_refused(tmp_path: Path, sources: object) -> None:
    packing.write(tmp_path)
    packing.edit_metadata(
        tmp_path,
        lambda d: d["consolidated_metadata"]["metadata"]["norm/weight"]["attributes"][
            "dsv4"
        ].update(sources=sources),
    )
    with pytest.raises(StoreError, match=r"sources .* do not fit"):
        PackedCheckpoint.open(tmp_path).provenance("norm.weight")
