"""The values of stored tensors by the tools that invented the formats, not by ours.

ModelOpt decodes its NVFP4, compressed-tensors its own; FP8 and MXFP4 are decoded by ml_dtypes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from compressed_tensors.compressors import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from torch import Tensor

from tests.support.oracles import stored_tensors

with warnings.catch_warnings():  # it warns about torch.jit while importing
    warnings.simplefilter("ignore")
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

SCHEME: QuantizationScheme = preset_name_to_scheme("NVFP4A16", ["Linear"])


class Outside:
    """A checkpoint directory, read by others; `values(stem)` takes the stored stem's members."""

    def __init__(self, source: Path) -> None:
        self.stored = stored_tensors(source)

    def members(self, stem: str) -> dict[str, Tensor]:
        """Stored tensors `stem.X` by X."""
        found = {}
        for role in _ROLES:
            if f"{stem}.{role}" in self.stored:
                found[role] = self.stored[f"{stem}.{role}"]
        return found

    def values(self, stem: str) -> Tensor:
        """Float32 values of the matrix (or norm) `stem`."""
        return decode(self.members(stem))


_ROLES = (
    "weight",
    "weight_packed",
    "scale",
    "weight_scale",
    "weight_scale_2",
    "weight_global_scale",
)


def decode(members: Mapping[str, Tensor]) -> Tensor:
    """Float32 values of one stored matrix, by the decoder that belongs to its members."""
    if "weight_packed" in members:
        return compressed_tensors_decode(members)
    if "weight_scale_2" in members:
        return modelopt_decode(members)
    weight = members["weight"]
    scale = members.get("scale", members.get("weight_scale"))
    if scale is None:
        return weight.to(torch.float32)
    if scale.dtype == torch.float8_e8m0fnu:
        raw = scale.view(torch.uint8).numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
        factors = torch.from_numpy(raw)
    else:
        factors = scale.to(torch.float64)
    if weight.dtype == torch.int8:
        packed = weight.view(torch.uint8).numpy()
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
        elements = torch.from_numpy(codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64))
        return (elements * factors.repeat_interleave(32, 1)).float()
    rows, cols = weight.shape
    grid = factors.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :cols]
    elements = weight.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return (torch.from_numpy(elements) * grid).float()


def modelopt_encode(weight: Tensor) -> dict[str, Tensor]:
    """ModelOpt's own quantiser: amax scales, which are no powers of two; members by role."""
    quantised, scales, global_scale = NVFP4QTensor.quantize(weight.clone(), 16)
    return {
        "weight": quantised._quantized_data,
        "weight_scale": scales.contiguous(),
        "weight_scale_2": global_scale.reshape(()).clone(),
    }


def modelopt_decode(members: Mapping[str, Tensor]) -> Tensor:
    """ModelOpt's own dequantiser, in float32."""
    codes = members["weight"]
    shape = torch.Size((codes.shape[0], codes.shape[1] * 2))
    values = NVFP4QTensor(shape, torch.float32, codes).dequantize(
        torch.float32,
        scale=members["weight_scale"],
        double_scale=members["weight_scale_2"],
        block_sizes={-1: 16},
    )
    assert isinstance(values, Tensor)
    return values


def compressed_tensors_decode(members: Mapping[str, Tensor]) -> Tensor:
    """compressed-tensors' own decompressor."""
    state = {name: tensor for name, tensor in members.items() if name != "input_global_scale"}
    values = NVFP4PackedCompressor.decompress(state, SCHEME)["weight"]
    assert isinstance(values, Tensor)
    return values
