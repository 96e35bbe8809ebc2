"""Rounding to NVFP4, bit for bit as IEEE arithmetic in float32 does it.

Hopper has no instruction that rounds to E2M1; Blackwell has one that rounds two numbers at once.
Which is used follows the architecture that is compiled for; both give the same codes.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Uint32
from cutlass.base_dsl import Arch, BaseDSL
from cutlass.cutlass_dsl import T, dsl_user_op

from dsv4.kernels.device.ptx import _asm

E2M1_MAX = 6.0
E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-9
INFINITY = 0x7F800000
PLAIN_DIVISOR = (2.0**-95, 2.0**15)

_ONE = 0x3F800000
_NIBBLES = 0x11111111


def rounds_to_e2m1() -> bool:
    """Whether the architecture that is compiled for has the instruction."""
    return bool(BaseDSL._get_dsl().get_arch_enum() >= Arch.sm_100)


@dsl_user_op
def quotient(a: Float32, b: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    """`a / b`, correctly rounded, subnormal numbers included."""
    return Float32(_asm(T.f32(), "div.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], loc, ip))


@dsl_user_op
def reciprocal(a: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    """`1 / a`, correctly rounded."""
    return Float32(_asm(T.f32(), "rcp.rn.f32 $0, $1;", "=f,f", [a], loc, ip))


@dsl_user_op
def product(a: Float32, b: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    """`a b`, rounded on its own."""
    return Float32(_asm(T.f32(), "mul.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], loc, ip))


@dsl_user_op
def fused(a: Float32, b: Float32, c: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    """`a b + c`, rounded once."""
    return Float32(_asm(T.f32(), "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], loc, ip))


@dsl_user_op
def remainder(a: Float32, q: Float32, b: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    """`a - q b`, rounded once."""
    text = "{ .reg .f32 n; neg.f32 n, $2; fma.rn.f32 $0, n, $3, $1; }"
    return Float32(_asm(T.f32(), text, "=f,f,f,f", [a, q, b], loc, ip))


def quotient_of(a: Float32, b: Float32, inverse: Float32) -> Float32:
    """`a / b` for bfloat16 `a`, given `1 / b` correctly rounded and `b` within `PLAIN_DIVISOR`.

    `a * inverse` is off by up to two units of the last place, the first correction brings it
    within one, and from there the second rounds correctly (Markstein 1990, theorem 8.4). The
    remainders are exact where the quotient is 0.2 or more: its and b's last places are far above
    float32's smallest number. Below, only the sign matters, and b <= 2^15 keeps the quotient of
    the smallest bfloat16 from vanishing. Never -0.
    """
    estimate = product(a, inverse)
    for _ in range(2):
        estimate = fused(remainder(a, estimate, b), inverse, estimate)
    return estimate


@dsl_user_op
def positive_zero(a: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    """`a`, and +0 for -0."""
    return Float32(_asm(T.f32(), "add.rn.f32 $0, $1, 0f00000000;", "=f,f", [a], loc, ip))


@dsl_user_op
def e4m3_byte(a: Float32, *, loc: Any = None, ip: Any = None) -> Uint32:
    """The E4M3 byte of `a`, to nearest even, limited to +-448."""
    text = (
        "{ .reg .b16 p; .reg .f32 z; mov.f32 z, 0f00000000; "
        "cvt.rn.satfinite.e4m3x2.f32 p, z, $1; cvt.u32.u16 $0, p; }"
    )
    return Uint32(_asm(T.i32(), text, "=r,f", [a], loc, ip))


@dsl_user_op
def e4m3_value(byte: Uint32, *, loc: Any = None, ip: Any = None) -> Float32:
    """The value of an E4M3 byte."""
    text = (
        "{ .reg .b16 p, l, h; .reg .b32 w; cvt.u16.u32 p, $1; "
        "cvt.rn.f16x2.e4m3x2 w, p; mov.b32 {l, h}, w; cvt.f32.f16 $0, l; }"
    )
    return Float32(_asm(T.f32(), text, "=f,r", [byte], loc, ip))


@cute.jit
def block_scale(amax: Float32, six_g: Float32) -> tuple[Uint32, Float32]:
    """(byte, value) of the scale of a block with that largest magnitude, for 6 times g."""
    ratio = quotient(amax, six_g)
    limited = cutlass.min(cutlass.max(ratio, Float32(SMALLEST_SCALE)), Float32(E4M3_MAX))
    byte = e4m3_byte(limited)
    byte = Uint32(0x38) if ratio == Float32(0.0) else byte
    return byte, e4m3_value(byte)


@dsl_user_op
def _e2m1_word(values: Any, *, loc: Any = None, ip: Any = None) -> Uint32:
    pairs = " ".join(
        f"cvt.rn.satfinite.e2m1x2.f32 b{i}, ${2 * i + 2}, ${2 * i + 1};" for i in range(4)
    )
    text = f"{{ .reg .b8 b0, b1, b2, b3; {pairs} mov.b32 $0, {{b0, b1, b2, b3}}; }}"
    return Uint32(_asm(T.i32(), text, "=r" + ",f" * 8, list(values), loc, ip))


def _e2m1_code(value: Float32) -> Uint32:
    """A magnitude between p and 2p, p a power of two of at least 1, has steps of p/2: the last
    bits of `1.5 * 2^22 p + magnitude` count them. Below 1, steps are of 1/2 too.
    """
    bits = value.bitcast(Uint32)
    magnitude = cutlass.min((bits & Uint32(0x7FFFFFFF)).bitcast(Float32), Float32(E2M1_MAX))
    power = cutlass.max(magnitude.bitcast(Uint32) & Uint32(INFINITY), Uint32(_ONE))
    steps = power.bitcast(Float32) * Float32(1.5 * 2.0**22) + magnitude
    code = (steps.bitcast(Uint32) & Uint32(7)) + (power >> Uint32(22)) - Uint32(_ONE >> 22)
    return code | ((bits >> Uint32(28)) & Uint32(8))


def e2m1_word(values: Any, signed_zero: bool) -> Uint32:
    """Codes of eight float32 (none of them -0), the first lowest.

    signed_zero: what rounds to zero keeps its sign.
    """
    if rounds_to_e2m1():
        word = _e2m1_word(values)
    else:
        word = Uint32(0)
        for i, value in enumerate(values):
            word |= _e2m1_code(value) << Uint32(4 * i)
    if signed_zero:
        return word
    nonzero = (word | (word >> Uint32(1)) | (word >> Uint32(2))) & Uint32(_NIBBLES)
    return word & (Uint32(7 * _NIBBLES) | (nonzero << Uint32(3)))


@dsl_user_op
def _max_u16x2(a: Uint32, b: Uint32, *, loc: Any = None, ip: Any = None) -> Uint32:
    return Uint32(_asm(T.i32(), "max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], loc, ip))


def magnitude_bits(pairs: Any) -> Uint32:
    """The largest magnitude of pairs of bfloat16, as the bits of a float32; NaN counts highest."""
    both = pairs[0] & Uint32(0x7FFF7FFF)
    for pair in pairs[1:]:
        both = _max_u16x2(both, pair & Uint32(0x7FFF7FFF))
    return cutlass.max(both << Uint32(16), both & Uint32(0xFFFF0000))
