"""From one format of numbers to another, free of side effects.

A pair of bfloat16 is a `Uint32`, the first in the lower half. What touches several formats of one
operation stands in `rounding`.
"""

from __future__ import annotations

from typing import Any

from cutlass import BFloat16, Float32, Uint32

from dsv4.kernels.device.arithmetic import byte_permute, mul_bf16x2
from dsv4.kernels.device.asm import compute

_HIGH = 0xFFFF0000


def bf16_pair(low: Float32, high: Float32) -> Uint32:
    """Both rounded to bfloat16, ties to even."""
    return Uint32(compute("cvt.rn.bf16x2.f32 $0, $2, $1;", low, high, out=Uint32))


def bf16_pairs(values: Any) -> list[Uint32]:
    """An even number of float32 rounded to bfloat16."""
    return [bf16_pair(values[n], values[n + 1]) for n in range(0, len(values), 2)]


def bf16_low(pair: Uint32) -> Float32:
    """The first of a pair."""
    return (pair << Uint32(16)).bitcast(Float32)


def bf16_high(pair: Uint32) -> Float32:
    """The second of a pair."""
    return (pair & Uint32(_HIGH)).bitcast(Float32)


def bf16_values(pairs: Any) -> list[Float32]:
    """The numbers of pairs, in order."""
    return [value(pair) for pair in pairs for value in (bf16_low, bf16_high)]


def to_bf16(values: Any) -> list[Float32]:
    """An even number of float32, each rounded to bfloat16's values."""
    rounded: list[Float32] = []
    for n in range(0, len(values), 2):
        rounded += bf16_values([bf16_pair(values[n], values[n + 1])])
    return rounded


def rounded(value: Float32) -> Float32:
    """To the nearest bfloat16, ties to even."""
    return Float32(BFloat16(value))


def e8m0_to_f32(code: Uint32) -> Float32:
    """2^(code - 127); code 0 is 2^-127, a subnormal number."""
    text = "{ .reg .u32 e; shl.b32 e, $1, 23; max.u32 e, e, 0x00400000; mov.b32 $0, e; }"
    return Float32(compute(text, code, out=Float32))


def e8m0_to_bf16x2(code: Uint32) -> Uint32:
    """2^(code - 127), twice; code 0 is 2^-127, a subnormal number."""
    text = "{ .reg .u32 e; shl.b32 e, $1, 7; max.u32 e, e, 0x0040; prmt.b32 $0, e, e, 0x1010; }"
    return Uint32(compute(text, code, out=Uint32))


def e4m3_word(values: Any) -> Uint32:
    """Four float32 as E4M3 codes, to nearest even, limited to +-448."""
    text = (
        "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; mov.b32 $0, {a, b}; }"
    )
    return Uint32(compute(text, *values, out=Uint32))


def e4m3_byte(a: Float32) -> Uint32:
    """The E4M3 code of `a`, to nearest even, limited to +-448."""
    text = (
        "{ .reg .b16 p; .reg .f32 z; mov.f32 z, 0f00000000; "
        "cvt.rn.satfinite.e4m3x2.f32 p, z, $1; cvt.u32.u16 $0, p; }"
    )
    return Uint32(compute(text, a, out=Uint32))


def e4m3_value(code: Uint32) -> Float32:
    """The value of an E4M3 code."""
    text = (
        "{ .reg .b16 p, l, h; .reg .b32 w; cvt.u16.u32 p, $1; "
        "cvt.rn.f16x2.e4m3x2 w, p; mov.b32 {l, h}, w; cvt.f32.f16 $0, l; }"
    )
    return Float32(compute(text, code, out=Float32))


def e4m3_factor(scale: Uint32) -> Uint32:
    """2^(120 + scale - 127) twice, bfloat16; scale: E8M0. Infinite beyond a scale of 2^7."""
    text = (
        "{ .reg .u32 e; add.u32 e, $1, 120; min.u32 e, e, 255; shl.b32 e, e, 7; "
        "prmt.b32 $0, e, e, 0x1010; }"
    )
    return Uint32(compute(text, scale, out=Uint32))


def e4m3_words(word: Uint32, factor: Uint32) -> tuple[Uint32, Uint32]:
    """Four codes as bfloat16 in their order, times a factor of `e4m3_factor`."""
    return _moved(word, factor, 0x1404), _moved(word, factor, 0x3424)


def _moved(word: Uint32, factor: Uint32, order: int) -> Uint32:
    high = byte_permute(word, Uint32(0), order)
    bits = (high & Uint32(0x80008000)) | ((high >> 4) & Uint32(0x07F007F0))
    return mul_bf16x2(bits, factor)


def e2m1_word(values: Any) -> Uint32:
    """Eight float32 as E2M1 codes, the first lowest. Blackwell alone has this instruction."""
    pairs = " ".join(
        f"cvt.rn.satfinite.e2m1x2.f32 b{i}, ${2 * i + 2}, ${2 * i + 1};" for i in range(4)
    )
    text = f"{{ .reg .b8 b0, b1, b2, b3; {pairs} mov.b32 $0, {{b0, b1, b2, b3}}; }}"
    return Uint32(compute(text, *values, out=Uint32))
