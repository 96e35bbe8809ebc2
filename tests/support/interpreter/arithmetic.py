"""What instructions compute, for 32 lanes. Registers are bits, held as uint64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tests.support.interpreter import exact

Bits = NDArray[np.uint64]
LANES = 32
_WIDTH = {"8": 8, "16": 16, "32": 32, "64": 64}


def compute(op: tuple[str, ...], args: Sequence[Bits]) -> Bits | None:
    """The result of an arithmetic instruction; None when it is none of them."""
    wide = exact.compute(op, args)
    if wide is not None:
        return wide
    if op == ("max", "u16x2"):
        return _packed(args, np.maximum)
    if op[0] == "prmt":
        return _permute(*args)
    if op == ("fma", "rn", "bf16x2"):
        return _fused_pairs(*args)
    if op[0] in ("popc", "clz", "brev"):
        return _of_bits(op[0], args[0])
    if op[0] == "cvt":
        return convert(op[1:], args)
    if op[0] == "setp":
        return bits(_compare(op[1], op[2], args))
    if op[0] == "selp":
        return np.where(args[2] != 0, args[0], args[1])
    if op[-1] in ("f32",):
        return _floats(op, [f32(a) for a in args])
    if op[0] in _INTEGER or op[0] in ("mul", "mad"):
        return _integers(op, args)
    return None


def f32(a: Bits) -> NDArray[np.float32]:
    """Bits as float32."""
    return a.astype(np.uint32).view(np.float32)


def bits(value: NDArray[np.generic]) -> Bits:
    """Bits of a result of any type."""
    if value.dtype == np.float32:
        return value.view(np.uint32).astype(np.uint64)
    if value.dtype == np.bool_:
        return value.astype(np.uint64)
    return value.astype(np.int64).view(np.uint64)


def signed(a: Bits, width: int) -> NDArray[np.int64]:
    """Bits as a signed number."""
    shift = np.uint64(64 - width)
    return (a << shift).view(np.int64) >> np.int64(64 - width)


def _trim(a: Bits, width: int) -> Bits:
    return a if width == 64 else a & np.uint64((1 << width) - 1)


def _kind(name: str) -> tuple[bool, int]:
    if name == "pred":
        return False, 1
    return name[0] == "s", _WIDTH[name[1:]]


def _divide(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    quotient = np.abs(a) // np.maximum(np.abs(b), 1)
    return np.where((a < 0) != (b < 0), -quotient, quotient)


_INTEGER: dict[str, Callable[..., NDArray[np.int64]]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "min": np.minimum,
    "max": np.maximum,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "neg": lambda a: -a,
    "abs": np.abs,
    "div": _divide,
    "rem": lambda a, b: a - _divide(a, b) * b,
}


def _integers(op: tuple[str, ...], args: Sequence[Bits]) -> Bits | None:
    is_signed, width = _kind(op[-1])
    if op[0] in ("shl", "shr"):
        return None
    wide = [signed(a, width) if is_signed else _trim(a, width).view(np.int64) for a in args]
    if op[0] in ("mul", "mad"):
        product = wide[0] * wide[1]
        if op[1] == "hi":
            assert width == 32
            return _trim((product >> np.int64(32)).view(np.uint64), 32)
        if op[1] == "wide":
            assert op[0] == "mul"
            return _trim(product.view(np.uint64), 2 * width)
        if op[0] == "mad":
            product = product + wide[2]
        return _trim(product.view(np.uint64), width)
    assert width < 64 or is_signed or op[0] not in ("min", "max", "div", "rem")
    return _trim(_INTEGER[op[0]](*wide).view(np.uint64), width)


def shift(op: tuple[str, ...], a: Bits, count: Bits) -> Bits:
    """shl, shr; counts beyond the width shift everything out."""
    is_signed, width = _kind(op[-1])
    by = np.minimum(count & np.uint64(0xFFFFFFFF), np.uint64(width))
    big = by >= np.uint64(width)
    few = np.where(big, np.uint64(0), by)
    if op[0] == "shl":
        return _trim(np.where(big, np.uint64(0), a << few), width)
    if not is_signed:
        return np.where(big, np.uint64(0), _trim(a, width) >> few)
    value = signed(a, width)
    moved = np.where(big, value >> np.int64(width - 1), value >> few.astype(np.int64))
    return _trim(moved.view(np.uint64), width)


def _compare(relation: str, kind: str, args: Sequence[Bits]) -> NDArray[np.bool_]:
    unordered = False
    a: NDArray[Any]
    b: NDArray[Any]
    if kind == "f32":
        a, b = (f32(x) for x in args)
        nan = np.isnan(a) | np.isnan(b)
        unordered = len(relation) == 3  # ltu, geu, …: true for NaN
        relation = relation[:2]
    else:
        is_signed, width = _kind(kind)
        a, b = (signed(x, width) if is_signed else _trim(x, width) for x in args)
        nan = np.zeros(LANES, dtype=np.bool_)
    result: NDArray[np.bool_] = {
        "eq": a == b,
        "ne": a != b,
        "lt": a < b,
        "le": a <= b,
        "gt": a > b,
        "ge": a >= b,
    }[relation]
    return (result | nan) if unordered else (result & ~nan)


def _floats(op: tuple[str, ...], args: Sequence[NDArray[np.float32]]) -> Bits | None:
    with np.errstate(all="ignore"):
        match op[0]:
            case "add":
                return bits(args[0] + args[1])
            case "sub":
                return bits(args[0] - args[1])
            case "mul":
                return bits(args[0] * args[1])
            case "div":
                return bits(args[0] / args[1])
            case "rcp":
                return bits(np.float32(1) / args[0])
            case "neg":
                return bits(-args[0])
            case "abs":
                return bits(np.abs(args[0]))
            case "sqrt":
                return bits(np.sqrt(args[0]))
            case "rsqrt":
                return bits((1 / np.sqrt(args[0].astype(np.float64))).astype(np.float32))
            case "min":
                return bits(np.fmin(args[0], args[1]))
            case "max":
                return bits(np.fmax(args[0], args[1]))
            case "ex2":
                return bits(np.exp2(args[0].astype(np.float64)).astype(np.float32))
            case "fma":
                return bits(_fused(op[1], *args))
    return None


def _fused(
    mode: str, a: NDArray[np.float32], b: NDArray[np.float32], c: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Through 64-bit significands, which hold the product exactly."""
    exact = a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)
    near = exact.astype(np.float32)
    if mode == "rn":
        return near
    assert mode == "rm", mode
    above = near.astype(np.longdouble) > exact
    return np.where(above, np.nextafter(near, np.float32(-np.inf)), near)


def convert(op: tuple[str, ...], args: Sequence[Bits]) -> Bits:
    """cvt; two arguments are packed, the first highest."""
    target, source = op[-2:]
    with np.errstate(all="ignore"):
        match target, source:
            case "bf16x2", "f32":
                high, low = (_round(a, ml_dtypes.bfloat16, np.uint16) for a in args)
                return (high << np.uint64(16)) | low
            case "e4m3x2", "f32":
                high, low = (_limited(a, 448.0, ml_dtypes.float8_e4m3fn) for a in args)
                return (high << np.uint64(8)) | low
            case "e2m1x2", "f32":
                high, low = (_limited(a, 6.0, ml_dtypes.float4_e2m1fn) for a in args)
                return ((high & np.uint64(15)) << np.uint64(4)) | (low & np.uint64(15))
            case "f16x2", "e4m3x2":
                halves: list[Bits] = [
                    ((args[0] >> np.uint64(s)) & np.uint64(255))
                    .astype(np.uint8)
                    .view(ml_dtypes.float8_e4m3fn)
                    .astype(np.float16)
                    .view(np.uint16)
                    .astype(np.uint64)
                    for s in (0, 8)
                ]
                return halves[0] | (halves[1] << np.uint64(16))
            case "bf16", "f32":
                return _round(args[0], ml_dtypes.bfloat16, np.uint16)
            case "f32", "bf16":
                return (args[0] & np.uint64(0xFFFF)) << np.uint64(16)
            case "f32", "f16":
                return bits(args[0].astype(np.uint16).view(np.float16).astype(np.float32))
            case "f32", "s32":
                return bits(signed(args[0], 32).astype(np.float32))
            case "f32", "f32":
                assert "sat" in op
                return bits(np.nan_to_num(np.clip(f32(args[0]), 0, 1), nan=0.0))
    is_signed, width = _kind(source)
    value = signed(args[0], width).view(np.uint64) if is_signed else _trim(args[0], width)
    return _trim(value, _kind(target)[1])


def _round(a: Bits, kind: type, raw: type) -> Bits:
    return f32(a).astype(kind).view(raw).astype(np.uint64)


def _limited(a: Bits, most: float, kind: type) -> Bits:
    return np.clip(f32(a), -most, most).astype(kind).view(np.uint8).astype(np.uint64)


def _packed(args: Sequence[Bits], function: Callable[..., Bits]) -> Bits:
    half = np.uint64(0xFFFF)
    low = function(args[0] & half, args[1] & half)
    high = function((args[0] >> np.uint64(16)) & half, (args[1] >> np.uint64(16)) & half)
    return (high << np.uint64(16)) | low


def _permute(a: Bits, b: Bits, selector: Bits) -> Bits:
    both = _trim(a, 32) | (_trim(b, 32) << np.uint64(32))
    result = np.zeros(LANES, dtype=np.uint64)
    for i in range(4):
        nibble = (selector >> np.uint64(4 * i)) & np.uint64(15)
        assert not (nibble & np.uint64(8)).any()
        byte = (both >> (nibble * np.uint64(8))) & np.uint64(255)
        result |= byte << np.uint64(8 * i)
    return result


def _of_bits(name: str, a: Bits) -> Bits:
    """popc, clz and brev of 32 bits."""
    texts = [f"{int(x) & 0xFFFFFFFF:032b}" for x in a]
    counts: dict[str, Callable[[str], int]] = {
        "popc": lambda text: text.count("1"),
        "clz": lambda text: len(text) - len(text.lstrip("0")),
        "brev": lambda text: int(text[::-1], 2),
    }
    return np.array([counts[name](text) for text in texts], dtype=np.uint64)


def _fused_pairs(*args: Bits) -> Bits:
    """fma.rn.bf16x2; sums of float64 hold what is rounded, or round far below it."""
    halves: list[Bits] = []
    for shift_ in (np.uint64(0), np.uint64(16)):
        a, b, c = (
            ((x >> shift_) & np.uint64(0xFFFF))
            .astype(np.uint16)
            .view(ml_dtypes.bfloat16)
            .astype(np.float64)
            for x in args
        )
        fused = (a * b + c).astype(ml_dtypes.bfloat16)
        halves.append(fused.view(np.uint16).astype(np.uint64))
    return halves[0] | (halves[1] << np.uint64(16))
