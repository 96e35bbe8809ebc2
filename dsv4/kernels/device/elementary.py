"""Elementary functions of float32, from the fast units' reciprocal, root and powers of two.

Errors are relative. The units give `2^x` and `1/x` to 2^-22, `log2 x` to 2^-22 (absolute below 1).
"""

from __future__ import annotations

import math

import cutlass
from cutlass import Float32, cute

_ATANH_TERMS = 7  # the next is below 2^-26 for arguments up to 1/3
_LONG_TAIL = -16.0  # below: log1p(e^x) is e^x to 2^-24


def exp(x: Float32) -> Float32:
    """`e^x` to `2^-21 + 2^-23 |x|`."""
    return Float32(cute.math.exp2(x * Float32(1 / math.log(2)), fastmath=True))


def log(x: Float32) -> Float32:
    """`ln x` to 2^-21; absolute between 1/2 and 2."""
    return cute.math.log2(x, fastmath=True) * Float32(math.log(2))


def sigmoid(x: Float32) -> Float32:
    """`1 / (1 + e^-x)` to `2^-20 + 2^-23 |x|`."""
    return cute.arch.rcp_approx(Float32(1.0) + exp(-x))


def log1p(x: Float32) -> Float32:
    """`ln(1 + x)` for `-1/2 <= x <= 1`, to 2^-20: 2 artanh(x / (2 + x))."""
    s = x * cute.arch.rcp_approx(Float32(2.0) + x)
    square = s * s
    total = Float32(1 / (2 * _ATANH_TERMS - 1))
    for n in range(_ATANH_TERMS - 1, 0, -1):
        total = cute.math.fma(total, square, Float32(1 / (2 * n - 1)))
    return Float32(2.0) * s * total


def sqrt_softplus(x: Float32) -> Float32:
    """`sqrt(ln(1 + e^x))` to `2^-19 + 2^-23 |x|`."""
    tail = log1p(exp(-cute.math.absf(x)))
    whole = cute.math.sqrt(cutlass.max(x, Float32(0.0)) + tail, fastmath=True)
    far = exp(Float32(0.5) * x)
    return Float32(cutlass.select_(x < Float32(_LONG_TAIL), far, whole))
