"""Rounding as the caches need it, and float32 operations that are never fused.

`ptxas` may turn a product and a sum into one fused operation; where a result has to equal the
reference's bit for bit, the products and sums here are used. Pairs of bfloat16 are `Uint32`, the
first in the lower half.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Float32, Float64, Int32, Uint32
from cutlass.cutlass_dsl import T, dsl_user_op

from dsv4.kernels.device.ptx import _asm, mul_bf16x2

_PAIR = 0x00010001  # n times this: n in both halves


@dsl_user_op
def product(a: Float32, b: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    """`a · b`, rounded on its own."""
    return Float32(_asm(T.f32(), "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], loc, ip))


@dsl_user_op
def total(a: Float32, b: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    """`a + b`, rounded on its own."""
    return Float32(_asm(T.f32(), "add.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], loc, ip))


@dsl_user_op
def difference(a: Float32, b: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    """`a - b`, rounded on its own."""
    return Float32(_asm(T.f32(), "sub.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], loc, ip))


def rotate(even: Float32, odd: Float32, cos: Float32, sin: Float32) -> tuple[Float32, Float32]:
    """The pair turned by an angle (RoPE), as the reference rounds it."""
    return (
        difference(product(even, cos), product(odd, sin)),
        total(product(even, sin), product(odd, cos)),
    )


@dsl_user_op
def _rsqrt_estimate(x: Float64, *, loc: Any = None, ip: Any = None) -> Float64:
    return Float64(_asm(T.f64(), "rsqrt.approx.ftz.f64 $0, $1;", "=d,d", [x], loc, ip))


def inverse_root(x: Float64) -> Float32:
    """`x^-0.5`, wrong by less than 2^-40 of it before it is rounded to float32.

    Two Newton steps square the estimate's relative error of at most 2^-18 twice.
    """
    root = _rsqrt_estimate(x)
    for _ in range(2):
        root = root * (Float64(1.5) - Float64(0.5) * x * root * root)
    return root.to(Float32)


@dsl_user_op
def bf16_pair(low: Float32, high: Float32, *, loc: Any = None, ip: Any = None) -> Uint32:
    """Both rounded to bfloat16."""
    text = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    return Uint32(_asm(T.i32(), text, "=r,f,f", [low, high], loc, ip))


def bf16_low(pair: Uint32) -> Float32:
    """The first of a pair."""
    return (pair << Uint32(16)).bitcast(Float32)


def bf16_high(pair: Uint32) -> Float32:
    """The second of a pair."""
    return (pair & Uint32(0xFFFF0000)).bitcast(Float32)


def to_bf16(values: Any) -> list[Float32]:
    """An even number of float32, each rounded to bfloat16's values."""
    rounded = []
    for i in range(0, len(values), 2):
        pair = bf16_pair(values[i], values[i + 1])
        rounded += [bf16_low(pair), bf16_high(pair)]
    return rounded


def scale_exponent(amax: Float32, largest: float) -> Uint32:
    """E8M0 code of `2^ceil(log2(amax / largest))`: exact, from the bits of the product."""
    bits = product(amax, Float32(1.0 / largest)).bitcast(Uint32)
    return (bits + Uint32(0x7FFFFF)) >> Uint32(23)


def inverse_scale(exponent: Uint32) -> Float32:
    """1 over the scale of that code."""
    return ((Uint32(254) - exponent) << Uint32(23)).bitcast(Float32)


@dsl_user_op
def e4m3_word(values: Any, *, loc: Any = None, ip: Any = None) -> Uint32:
    """Four float32 as E4M3 codes, to nearest even, limited to +-448."""
    text = (
        "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; "
        "cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; mov.b32 $0, {a, b}; }"
    )
    return Uint32(_asm(T.i32(), text, "=r,f,f,f,f", list(values), loc, ip))


@dsl_user_op
def _fma_bf16x2(a: Uint32, b: Uint32, c: Uint32, *, loc: Any = None, ip: Any = None) -> Uint32:
    text = "fma.rn.bf16x2 $0, $1, $2, $3;"
    return Uint32(_asm(T.i32(), text, "=r,r,r,r", [a, b, c], loc, ip))


@dsl_user_op
def _max_u16x2(a: Uint32, b: Uint32, *, loc: Any = None, ip: Any = None) -> Uint32:
    return Uint32(_asm(T.i32(), "max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], loc, ip))


def magnitude_max(pairs: Any) -> Float32:
    """The largest magnitude of pairs of bfloat16, whose bits without the sign are in its order."""
    both = pairs[0] & Uint32(0x7FFF7FFF)
    for pair in pairs[1:]:
        both = _max_u16x2(both, pair & Uint32(0x7FFF7FFF))
    return cutlass.max(both << Uint32(16), both & Uint32(0xFFFF0000)).bitcast(Float32)


def _e2m1_steps(pair: Uint32, exponent: Uint32) -> tuple[Uint32, Uint32]:
    """-> `96 p + magnitude` and p, of a pair over a scale that keeps it within +-6.

    A magnitude between p and 2p, p a power of two of at least 1, has steps of p/2 in E2M1: what
    the sum rounds to, to nearest even.
    """
    inverse = ((Uint32(254) - exponent) << Uint32(7)) * Uint32(_PAIR)
    magnitude = mul_bf16x2(pair & Uint32(0x7FFF7FFF), inverse)
    power = _max_u16x2(magnitude & Uint32(0x7F807F80), Uint32(0x3F80 * _PAIR))
    return _fma_bf16x2(power, Uint32(0x42C0 * _PAIR), magnitude), power


def e2m1_codes(pair: Uint32, exponent: Uint32) -> Uint32:
    """E2M1 codes of a pair over a scale, one in each half. Zero has no sign."""
    steps, power = _e2m1_steps(pair, exponent)
    code = (steps & Uint32(7 * _PAIR)) + (power >> Uint32(6)) - Uint32(254 * _PAIR)
    sign = (pair >> Uint32(12)) & Uint32(8 * _PAIR)
    return code | (sign & (code + Uint32(7 * _PAIR)))


def e2m1_values(pair: Uint32, exponent: Uint32) -> Uint32:
    """The values of those codes, as a pair of bfloat16."""
    steps, power = _e2m1_steps(pair, exponent)
    magnitude = _fma_bf16x2(power, Uint32(0xC2C0 * _PAIR), steps)
    return magnitude | (pair & Uint32(0x80008000))


def e2m1_operands(words: Any, scale: Uint32) -> list[tuple[Uint32, Uint32]]:
    """Codes as pairs of bfloat16 for an MMA, two words of them for each half word of codes.

    scale: both halves bfloat16; the codes' bits moved into bfloat16's fields are 2^-126 of them.
    """
    operands = []
    for word in words:
        pairs = []
        for i in range(4):
            signs = word << Uint32(12 - 4 * i) if i < 3 else word
            bits = word << Uint32(6 - 4 * i) if i < 2 else word >> Uint32(4 * i - 6)
            pair = (signs & Uint32(0x80008000)) | (bits & Uint32(0x01C001C0))
            pairs.append(mul_bf16x2(pair, scale))
        operands += [(pairs[0], pairs[1]), (pairs[2], pairs[3])]
    return operands


def relative_scale(exponent: Uint32, largest: Uint32) -> Uint32:
    """2^126 of the scale `exponent` over the scale `largest`, as both halves of a pair.

    What is smaller by 2^126 and more becomes 0.
    """
    field = cutlass.max(Int32(exponent) - Int32(largest) + Int32(253), Int32(0))
    return Uint32(field << 7) * Uint32(_PAIR)


def bytes_max(word: Uint32) -> Uint32:
    """The largest of a word's four bytes."""
    byte = [(word >> Uint32(8 * i)) & Uint32(0xFF) for i in range(4)]
    return cutlass.max(cutlass.max(byte[0], byte[1]), cutlass.max(byte[2], byte[3]))
