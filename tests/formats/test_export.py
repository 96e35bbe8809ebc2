"""Export to ModelOpt's canonical tensors, read back by ModelOpt itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import dsv4
from dsv4.formats.export import modelopt_tensors
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor
from tests.formats.numeric.tool_judges import modelopt_dequantize
from tests.support.oracles import source_values, stored_tensors


def test_modelopt_reads_the_exported_experts_as_the_source(
    tiny_source: Path, standard_store: Path
) -> None:
    packed = dsv4.open(standard_store)
    values = source_values(tiny_source)
    names = [name for name in values if ".ffn.experts." in name]
    assert len(names) == 7 * 8 * 3
    for name in names:
        out = modelopt_tensors(packed, name)
        stem = name.removesuffix("weight")
        assert out.keys() == {name, f"{stem}weight_scale", f"{stem}weight_scale_2"}
        assert out[name].dtype == torch.uint8
        assert out[f"{stem}weight_scale"].dtype == torch.float8_e4m3fn
        assert out[f"{stem}weight_scale_2"].shape == ()
        judged = modelopt_dequantize(
            NVFP4Tensor(
                out[name],
                out[f"{stem}weight_scale"].view(torch.uint8),
                out[f"{stem}weight_scale_2"],
                values[name].shape,
            )
        )
        assert np.array_equal(judged.double().numpy(), values[name])


def test_everything_else_goes_back_as_it_came(tiny_source: Path, native_store: Path) -> None:
    packed = dsv4.open(native_store)
    stored = stored_tensors(tiny_source)
    for name in packed.names():
        if ".ffn.experts." in name:
            continue
        for key, tensor in modelopt_tensors(packed, name).items():
            assert tensor.dtype == stored[key].dtype
            assert torch.equal(
                tensor.contiguous().reshape(-1).view(torch.uint8),
                stored[key].reshape(-1).view(torch.uint8),
            ), key
