"""Outside judges for the encodings: ml_dtypes, and brute force in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from dsv4.formats.numeric.nvfp4 import NVFP4Tensor

E2M1_GRID = np.arange(8, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
E4M3_POSITIVE = np.arange(1, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def ml_e2m1(codes: Tensor) -> Tensor:
    """Codes 0..15 decoded by ml_dtypes, float64."""
    values = codes.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    return torch.from_numpy(values)


def ml_e4m3(raw: Tensor) -> Tensor:
    """E4M3 bytes decoded by ml_dtypes, float64."""
    return torch.from_numpy(raw.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64))


def ml_e8m0(raw: Tensor) -> Tensor:
    """E8M0 bytes decoded by ml_dtypes, float64."""
    return torch.from_numpy(raw.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64))


def nibbles(packed: Tensor) -> Tensor:
    """The codes in `[..., K/2]` bytes, low nibble first, one column at a time."""
    out = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.uint8)
    out[..., 0::2] = packed.numpy() % 16
    out[..., 1::2] = packed.numpy() // 16
    return torch.from_numpy(out)


def ml_nvfp4(t: NVFP4Tensor) -> Tensor:
    """`t` decoded by ml_dtypes, float64 `[..., Kp]`."""
    scales = ml_e4m3(t.scales).repeat_interleave(16, dim=-1)
    return ml_e2m1(nibbles(t.codes)) * scales * t.global_scale.double()


def ml_mxfp4(codes: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 decoded by ml_dtypes, float64."""
    return ml_e2m1(nibbles(codes)) * ml_e8m0(scales).repeat_interleave(32, dim=-1)


def brute_force_errors(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    """Squared error of blocks `[B, 16]` (over the global scale) at each of the 126 scales."""
    magnitude = blocks.double().abs().numpy()
    weights = 1.0 if importance is None else importance.double().numpy()
    errors = np.empty((len(E4M3_POSITIVE), len(magnitude)))
    for error, scale in zip(errors, E4M3_POSITIVE, strict=True):
        distance = np.abs(magnitude - E2M1_GRID[0] * scale)
        for value in E2M1_GRID[1:]:
            np.minimum(distance, np.abs(magnitude - value * scale), out=distance)
        error[:] = (distance**2 * weights).sum(axis=-1)
    return torch.from_numpy(errors.T.copy())


def relative_mse(original: Tensor, decoded: Tensor) -> float:
    """sum((decoded - original)^2) / sum(original^2)."""
    exact = original.double()
    return float((decoded.double() - exact).square().sum() / exact.square().sum())
