"""Independent readings of a source checkpoint: safetensors opens it, ml_dtypes decodes it."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open


def stored_tensors(source: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor of a checkpoint directory, as the safetensors library reads it."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dict
                tensors[name] = opened.get_tensor(name)
    return tensors


def source_values(source: Path) -> dict[str, NDArray[np.float64]]:
    """Logical tensors in float64 by hub name: scales applied, FP4 unpacked."""
    stored = stored_tensors(source)
    return {
        name: _value(tensor, stored.get(name.removesuffix("weight") + "scale"))
        for name, tensor in stored.items()
        if not name.endswith(".scale")
    }


def _bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    raw: NDArray[np.uint8] = tensor.contiguous().view(torch.uint8).numpy()
    return raw


def _value(weight: torch.Tensor, scale: torch.Tensor | None) -> NDArray[np.float64]:
    if scale is None:
        values: NDArray[np.float64] = weight.to(torch.float64).numpy()
        return values
    exponents = _bytes(scale).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    if weight.dtype == torch.int8:
        raw = _bytes(weight)
        codes = np.stack([raw & 15, raw >> 4], axis=-1).reshape(raw.shape[0], -1)
        elements = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
        return np.asarray(elements * np.repeat(exponents, 32, axis=1))
    elements = _bytes(weight).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    rows, cols = elements.shape
    grid = np.repeat(np.repeat(exponents, 128, axis=0), 128, axis=1)[:rows, :cols]
    return np.asarray(elements * grid)
