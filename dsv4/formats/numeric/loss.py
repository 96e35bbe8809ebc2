"""Losses of rounding, accumulated over tiles in float64."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass
class Loss:
    """Sums that give relative MSE, SQNR, cosine and the largest error of a rounded tensor."""

    squares: float = 0.0  # sum w^2
    errors: float = 0.0  # sum (w - q)^2
    products: float = 0.0  # sum w * q
    rounded_squares: float = 0.0  # sum q^2
    max_abs_error: float = 0.0
    amax: float = 0.0
    sign_flips: int = 0  # values equal, sign of zero not

    def add(self, original: Tensor, rounded: Tensor) -> None:
        """Account for one tile; both tensors have the same shape."""
        if original.numel() == 0:
            return
        w = original.to(torch.float64)
        q = rounded.to(torch.float64)
        e = w - q
        self.squares += float((w * w).sum())
        self.errors += float((e * e).sum())
        self.products += float((w * q).sum())
        self.rounded_squares += float((q * q).sum())
        self.max_abs_error = max(self.max_abs_error, float(e.abs().amax()))
        self.amax = max(self.amax, float(w.abs().amax()))
        self.sign_flips += int(((w == q) & (torch.signbit(w) != torch.signbit(q))).sum())

    @property
    def rel_mse(self) -> float:
        """sum (w - q)^2 / sum w^2; 0 for an all-zero tensor carried exactly."""
        if self.errors == 0.0:
            return 0.0
        return self.errors / self.squares if self.squares else math.inf

    @property
    def rel_l2(self) -> float:
        """Square root of `rel_mse`."""
        return math.sqrt(self.rel_mse)

    @property
    def sqnr_db(self) -> float:
        """Signal to quantisation noise in dB; infinite when exact."""
        return -10.0 * math.log10(self.rel_mse) if self.rel_mse > 0.0 else math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the angle between original and rounded; 1 when exact."""
        if self.errors == 0.0:
            return 1.0
        norm = math.sqrt(self.squares * self.rounded_squares)
        return self.products / norm if norm else 0.0

    def to_dict(self) -> dict[str, float | None]:
        """JSON types; an infinite SQNR becomes None."""
        return {
            "rel_mse": self.rel_mse,
            "rel_l2": self.rel_l2,
            "sqnr_db": None if math.isinf(self.sqnr_db) else self.sqnr_db,
            "cosine": self.cosine,
            "max_abs_error": self.max_abs_error,
            "amax": self.amax,
        }
