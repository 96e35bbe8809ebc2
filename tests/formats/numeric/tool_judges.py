"""Other quantisers as judges: NVIDIA's ModelOpt and PyTorch's torchao, both on the CPU."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

with warnings.catch_warnings():  # both warn about torch.jit and themselves while importing
    warnings.simplefilter("ignore")
    from modelopt.torch.quantization.qtensor import NVFP4QTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor as TorchaoNvfp4Tensor
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize
    from torchao.prototype.mx_formats.utils import to_blocked

from dsv4.formats.numeric.nvfp4 import NVFP4Tensor


def modelopt_quantize(w: Tensor) -> NVFP4Tensor:
    """ModelOpt's own rounding of `w`."""
    quantized, scales, global_scale = NVFP4QTensor.quantize(w.clone(), 16)
    return NVFP4Tensor(
        quantized._quantized_data, scales.view(torch.uint8), global_scale, tuple(w.shape)
    )


def modelopt_dequantize(t: NVFP4Tensor) -> Tensor:
    """`t` `[N, K]` decoded by ModelOpt to float32."""
    quantized = NVFP4QTensor(torch.Size(t.shape), torch.float32, t.codes)
    values = quantized.dequantize(
        torch.float32,
        scale=t.scales.view(torch.float8_e4m3fn),
        double_scale=t.global_scale,
        block_sizes={-1: 16},
    )
    assert isinstance(values, Tensor)
    return values


def torchao_quantize(w: Tensor) -> tuple[Tensor, Tensor]:
    """torchao's rounding of `w` with its per-tensor scale -> (scale bytes, packed codes)."""
    scales, codes = nvfp4_quantize(w, per_tensor_scale=w.abs().amax().float() / (6 * 448))
    return scales, codes


def torchao_dequantize(t: NVFP4Tensor) -> Tensor:
    """`t` `[N, K]` decoded by torchao to float32."""
    values = TorchaoNvfp4Tensor(
        t.codes,
        t.scales.view(torch.float8_e4m3fn),
        16,
        torch.float32,
        per_tensor_scale=t.global_scale,
    ).dequantize(torch.float32)
    assert isinstance(values, Tensor)
    return values


def torchao_blocked(scales: Tensor) -> Tensor:
    """torchao's 32x4x4 order of scale bytes `[R, KB]`, flat."""
    blocked = to_blocked(scales)
    assert isinstance(blocked, Tensor)
    return blocked
