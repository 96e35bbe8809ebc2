"""Arithmetic that the DSL has no name for: one instruction each, free of side effects.

`ptxas` may turn a product and a sum of the DSL into one fused operation; where a result has to
equal the reference's bit for bit, the float32 operations here are used, which it leaves alone.
Registers of pairs are `Uint32`, the first in the lower half.
"""

from __future__ import annotations

from cutlass import Float32, Float64, Uint32, Uint64

from dsv4.kernels.device.asm import compute


def product(a: Float32, b: Float32) -> Float32:
    """`a b`, rounded on its own."""
    return Float32(compute("mul.rn.f32 $0, $1, $2;", a, b, out=Float32))


def total(a: Float32, b: Float32) -> Float32:
    """`a + b`, rounded on its own."""
    return Float32(compute("add.rn.f32 $0, $1, $2;", a, b, out=Float32))


def difference(a: Float32, b: Float32) -> Float32:
    """`a - b`, rounded on its own."""
    return Float32(compute("sub.rn.f32 $0, $1, $2;", a, b, out=Float32))


def quotient(a: Float32, b: Float32) -> Float32:
    """`a / b`, correctly rounded, subnormal numbers included."""
    return Float32(compute("div.rn.f32 $0, $1, $2;", a, b, out=Float32))


def reciprocal(a: Float32) -> Float32:
    """`1 / a`, correctly rounded."""
    return Float32(compute("rcp.rn.f32 $0, $1;", a, out=Float32))


def fused(a: Float32, b: Float32, c: Float32) -> Float32:
    """`a b + c`, rounded once."""
    return Float32(compute("fma.rn.f32 $0, $1, $2, $3;", a, b, c, out=Float32))


def remainder(a: Float32, q: Float32, b: Float32) -> Float32:
    """`a - q b`, rounded once."""
    text = "{ .reg .f32 n; neg.f32 n, $2; fma.rn.f32 $0, n, $3, $1; }"
    return Float32(compute(text, a, q, b, out=Float32))


def positive_zero(a: Float32) -> Float32:
    """`a`, and +0 for -0."""
    return Float32(compute("add.rn.f32 $0, $1, 0f00000000;", a, out=Float32))


def exp2(x: Float32) -> Float32:
    """2^x, within 2^-22; 0 for -inf."""
    return Float32(compute("ex2.approx.ftz.f32 $0, $1;", x, out=Float32))


def rsqrt_estimate(x: Float64) -> Float64:
    """`x^-0.5`, wrong by at most 2^-18 of it."""
    return Float64(compute("rsqrt.approx.ftz.f64 $0, $1;", x, out=Float64))


def mul_bf16x2(a: Uint32, b: Uint32) -> Uint32:
    """Two bfloat16 products. Subnormal numbers are kept."""
    return Uint32(compute("mul.rn.bf16x2 $0, $1, $2;", a, b, out=Uint32))


def fma_bf16x2(a: Uint32, b: Uint32, c: Uint32) -> Uint32:
    """Two times `a b + c` in bfloat16, rounded once."""
    return Uint32(compute("fma.rn.bf16x2 $0, $1, $2, $3;", a, b, c, out=Uint32))


def max_u16x2(a: Uint32, b: Uint32) -> Uint32:
    """The larger of each half."""
    return Uint32(compute("max.u16x2 $0, $1, $2;", a, b, out=Uint32))


def byte_permute(a: Uint32, b: Uint32, selector: Uint32 | int) -> Uint32:
    """Byte i of the result is the byte of (a, b) that nibble i of `selector` numbers."""
    return Uint32(compute("prmt.b32 $0, $1, $2, $3;", a, b, Uint32(selector), out=Uint32))


def multiply_high_add(a: Uint32, b: Uint32, c: Uint32) -> Uint32:
    """The high word of `a b`, plus c."""
    return Uint32(compute("mad.hi.u32 $0, $1, $2, $3;", a, b, c, out=Uint32))


def multiply_high(a: Uint64, b: Uint64) -> Uint64:
    """The high half of the product."""
    return Uint64(compute("mul.hi.u64 $0, $1, $2;", a, b, out=Uint64))


def multiply_wide(a: Uint32, b: Uint32) -> tuple[Uint32, Uint32]:
    """The high and the low word of the product."""
    text = "{ .reg .b64 p; mul.wide.u32 p, $2, $3; mov.b64 {$1, $0}, p; }"
    high, low = compute(text, a, b, out=(Uint32, Uint32))
    return high, low


def warp_max(x: Float32) -> Float32:
    """The largest of a warp's numbers: as integers, which order alike once negatives are turned."""
    text = (
        "{ .reg .s32 b, s; mov.b32 b, $1; shr.s32 s, b, 31; and.b32 s, s, 0x7fffffff; "
        "xor.b32 b, b, s; redux.sync.max.s32 b, b, 0xffffffff; "
        "shr.s32 s, b, 31; and.b32 s, s, 0x7fffffff; xor.b32 b, b, s; mov.b32 $0, b; }"
    )
    return Float32(compute(text, x, out=Float32))
