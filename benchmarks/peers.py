"""How others round to NVFP4, on the CPU, each as its own library does it.

ModelOpt and torchao are imported where they are called: a missing one raises ImportError. The
sweep is ModelOpt's calibrator over all 126 scales with a fake quantiser in torch (its own needs
CUDA). Four-over-six (arXiv 2512.02010) is computed from the paper's rule: per block the better of
amax -> 6 and amax -> 4, at a tensor scale that leaves room for the latter.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from dsv4.formats.numeric.codecs import E2M1_MAX, e2m1_decode, e2m1_encode, e4m3_decode, e4m3_encode

BLOCK = 16
E4M3_MAX = 448.0
FOUR_OVER_SIX_MAX = 256.0
SMALLEST_SCALE = 2.0**-9
SMALLEST_GLOBAL_SCALE = 2.0**-100  # of a matrix that is all zero


def modelopt_rounding(w: Tensor, *, dequantise: bool = True) -> Tensor:
    """NVIDIA ModelOpt's `NVFP4QTensor.quantize`: amax -> 6, global scale amax / 2688."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization.qtensor import NVFP4QTensor
    quantized, scales, global_scale = NVFP4QTensor.quantize(w.clone(), BLOCK)
    if not dequantise:
        return torch.empty(0)
    values: Tensor = quantized.dequantize(
        torch.float32, scale=scales, double_scale=global_scale, block_sizes={-1: BLOCK}
    )
    return values


def torchao_rounding(w: Tensor, *, dequantise: bool = True) -> Tensor:
    """torchao's `nvfp4_quantize` with a per-tensor scale amax / 2688."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, nvfp4_quantize
    per_tensor = w.abs().amax().float() / (E2M1_MAX * E4M3_MAX)
    scales, codes = nvfp4_quantize(w, per_tensor_scale=per_tensor)
    if not dequantise:
        return torch.empty(0)
    values: Tensor = NVFP4Tensor(
        codes, scales, BLOCK, torch.float32, per_tensor_scale=per_tensor
    ).dequantize(torch.float32)
    return values


def modelopt_sweep(w: Tensor) -> Tensor:
    """ModelOpt's NVFP4MSECalibrator: the best of all 126 scales at global scale amax / 2688."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization.calib.mse import NVFP4MSECalibrator
    amax = w.abs().amax().float()
    global_scale = amax / (E2M1_MAX * E4M3_MAX)
    parts = []
    for tile in torch.split(w.float().reshape(-1, BLOCK), 1 << 16):
        calibrator = NVFP4MSECalibrator(
            amax=tile.abs().amax(1, keepdim=True),
            global_amax=amax,
            axis=0,
            quant_func=lambda x, block_amax: _fake(x, block_amax / E2M1_MAX, global_scale),
        )
        calibrator.collect(tile)
        best = calibrator.compute_amax().reshape(-1, 1)
        parts.append(_fake(tile, best / E2M1_MAX, global_scale))
    return torch.cat(parts).reshape(w.shape)


def four_over_six(w: Tensor) -> Tensor:
    """The better of amax -> 6 and amax -> 4 per block, global scale amax / (6 * 256)."""
    global_scale = w.abs().amax().float() / (E2M1_MAX * FOUR_OVER_SIX_MAX)
    blocks = w.float().reshape(-1, BLOCK)
    amax = blocks.abs().amax(1, keepdim=True)
    six = _fake(blocks, amax / E2M1_MAX, global_scale)
    four = _fake(blocks, amax / 4.0, global_scale)
    errors = [(candidate - blocks).square().sum(1, keepdim=True) for candidate in (six, four)]
    return torch.where(errors[1] < errors[0], four, six).reshape(w.shape)


def amax_rounding(w: Tensor) -> Tensor:
    """The plain rule, in torch alone: a block's amax becomes 6, global scale amax / 2688.

    w: `[N, K]`, K a multiple of 16. Returns float32.
    """
    blocks = w.float().reshape(-1, BLOCK)
    amax = blocks.abs().amax(1, keepdim=True)
    global_scale = (amax.amax() / (E2M1_MAX * E4M3_MAX)).clamp(min=SMALLEST_GLOBAL_SCALE)
    return _fake(blocks, amax / E2M1_MAX, global_scale).reshape(w.shape)


def least_errors(blocks: Tensor, global_scale: Tensor) -> Tensor:
    """Float64 `[B]`: least squared error of blocks `[B, 16]` over all 126 scales, none left out."""
    exact = blocks.double()
    best = torch.full_like(exact[:, 0], torch.inf)
    for byte in torch.arange(1, 127, dtype=torch.uint8):
        scale = e4m3_decode(byte).double() * global_scale.double()
        rounded = e2m1_decode(e2m1_encode((exact / scale).float())) * scale
        torch.minimum(best, (rounded - exact).square().sum(1), out=best)
    return best


def _fake(blocks: Tensor, block_scale: Tensor, global_scale: Tensor) -> Tensor:
    """Round blocks `[B, 16]` at an unrounded scale `[B, 1]`: through E4M3, E2M1 and back."""
    wanted = (block_scale / global_scale).clamp(SMALLEST_SCALE, E4M3_MAX)
    scale = e4m3_decode(e4m3_encode(wanted)) * global_scale
    return e2m1_decode(e2m1_encode(blocks / scale)) * scale
