"""Double precision and wide integers, for 32 lanes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.uint64]


def compute(op: tuple[str, ...], args: Sequence[Bits]) -> Bits | None:
    """The result of such an instruction; None when it is none of them."""
    if op[0] == "cvt" and "f64" in op:
        return _convert(op[1:], args[0])
    if op[-1] == "f64" and op[0] in ("add", "sub", "mul", "div", "min", "fma", "rsqrt"):
        return _doubles(op[0], *(a.view(np.float64) for a in args))
    if op == ("mad", "hi", "u32"):
        return ((args[0] * args[1] >> np.uint64(32)) + args[2]) & np.uint64(0xFFFFFFFF)
    if op == ("mul", "hi", "u64"):
        return _unsigned([int(a) * int(b) >> 64 for a, b in zip(*args, strict=True)])
    if op == ("max", "u64"):
        return np.maximum(args[0], args[1])
    if op == ("setp", "nan", "f32"):
        a, b = (x.astype(np.uint32).view(np.float32) for x in args)
        return (np.isnan(a) | np.isnan(b)).astype(np.uint64)
    return None


def _doubles(op: str, *values: NDArray[np.float64]) -> Bits:
    """The approximate root keeps 20 bits, fewer than hardware's."""
    with np.errstate(all="ignore"):
        if op == "fma":
            a, b, c = (value.astype(np.longdouble) for value in values)
            return (a * b + c).astype(np.float64).view(np.uint64)
        if op == "rsqrt":
            rough = np.uint64((1 << 64) - (1 << 32))
            return (1 / np.sqrt(values[0])).view(np.uint64) & rough
        result: NDArray[Any] = {
            "add": np.add,
            "sub": np.subtract,
            "mul": np.multiply,
            "div": np.divide,
            "min": np.fmin,
        }[op](*values)
    return result.view(np.uint64)


def _convert(op: tuple[str, ...], a: Bits) -> Bits:
    with np.errstate(all="ignore"):
        match op:
            case ("f64", "f32"):
                return a.astype(np.uint32).view(np.float32).astype(np.float64).view(np.uint64)
            case ("rn", "f32", "f64"):
                return a.view(np.float64).astype(np.float32).view(np.uint32).astype(np.uint64)
            case ("rn", "f64", "u64"):
                return _unsigned([int(np.float64(int(x)).view(np.uint64)) for x in a])
            case ("rpi", "u64", "f64"):
                up = np.nan_to_num(np.ceil(a.view(np.float64)))
                return _unsigned([min(max(int(x), 0), 2**64 - 1) for x in up])
    raise NotImplementedError(str(op))


def _unsigned(values: Sequence[int]) -> Bits:
    return np.array(values, dtype=np.uint64)
