"""Back to ModelOpt's canonical tensors: what other servers read, from the packed bytes alone.

An NVFP4 matrix becomes `X.weight` uint8 `[N, K/2]`, `X.weight_scale` float8_e4m3fn `[N, K/16]` and
`X.weight_scale_2` float32 `[]`, none of them tiled or interleaved; all else goes back as it came.
Source of the names: NVIDIA ModelOpt's export of DeepSeek-V4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.errors import FormatError
from dsv4.formats.numeric.layouts import unpack_fp8
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor
from dsv4.formats.numeric.operands import NVFP4_BLOCK, Fp8Matrix


def modelopt_tensors(packed: PackedCheckpoint, name: str) -> dict[str, Tensor]:
    """The stored tensors of the logical tensor `name` in ModelOpt's dialect, by their names.

    Raises StoreError for an unknown name, FormatError when its columns are no multiple of 16.
    """
    operand = packed.stored(name)
    if isinstance(operand, Tensor):
        return {name: operand}
    stem = name.removesuffix("weight")
    if isinstance(operand, Fp8Matrix):
        codes, scales = unpack_fp8(operand)
        return {name: codes, f"{stem}scale": scales}
    assert isinstance(operand, NVFP4Tensor)
    if operand.shape[-1] % NVFP4_BLOCK:
        raise FormatError(
            f"{name} has {operand.shape[-1]} columns, expected a multiple of {NVFP4_BLOCK}: "
            "ModelOpt's format has no padding"
        )
    return {
        name: operand.codes,
        f"{stem}weight_scale": operand.scales.view(torch.float8_e4m3fn),
        f"{stem}weight_scale_2": operand.global_scale,
    }
