"""The numbers of a draw, as `dsv4.kernels.reference.sampling` defines them, bit for bit."""

from __future__ import annotations

import struct
from typing import Any

from cutlass import Float32, Float64, Int32, Uint32, Uint64
from cutlass._mlir import ir
from cutlass.cutlass_dsl import T, dsl_user_op

from dsv4.kernels.device.ptx import _asm, _parts
from dsv4.kernels.reference.sampling import EXPONENT_BASE, LOG2E, LOWEST, POLYNOMIAL

INFINITE_KEY = 0xFF800000
LOWEST_KEY = 0x007FFFFF  # of -infinity
_NAN_KEY = 0xFFFFFFFF


def _double(value: float) -> str:
    return "0d" + struct.pack(">d", value).hex().upper()


@dsl_user_op
def exponent(
    x: Float32, peak: Float32, factor: Float64, *, loc: Any = None, ip: Any = None
) -> tuple[Uint32, Uint32]:
    """The fraction, and the whole powers of two, that the weight of `x` is below the largest."""
    text = (
        "{ .reg .f64 a, b; cvt.f64.f32 a, $2; cvt.f64.f32 b, $3; sub.rn.f64 a, b, a; "
        f"mul.rn.f64 a, a, $4; min.f64 a, a, {_double(LOWEST)}; "
        f"add.rn.f64 a, a, {_double(EXPONENT_BASE)}; mov.b64 {{$0, $1}}, a; "
        f"sub.u32 $1, $1, 0x{_double(EXPONENT_BASE)[2:10]}; }}"
    )
    pair = ir.Type.parse("!llvm.struct<(i32, i32)>")
    packed = _asm(pair, text, "=&r,=&r,f,f,d", [x, peak, factor], loc, ip)
    part, whole = _parts(packed, Uint32, 2, loc, ip)
    return part, whole


@dsl_user_op
def factor_of(temperature: Float32, *, loc: Any = None, ip: Any = None) -> Float64:
    """Powers of two for a difference of 1; infinite for temperature 0."""
    text = f"{{ .reg .f64 t; cvt.f64.f32 t, $1; div.rn.f64 $0, {_double(LOG2E)}, t; }}"
    return Float64(_asm(T.f64(), text, "=d,f", [temperature], loc, ip))


@dsl_user_op
def _multiply_high_add(
    a: Uint32, b: Uint32, c: Uint32, *, loc: Any = None, ip: Any = None
) -> Uint32:
    return Uint32(_asm(T.i32(), "mad.hi.u32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], loc, ip))


@dsl_user_op
def _significand(high: Uint32, whole: Uint32, *, loc: Any = None, ip: Any = None) -> Uint64:
    """`(2^32 + high) 2^13`, that many bits lower."""
    text = "{ .reg .b64 m; mov.b64 m, {$1, 1}; shl.b64 m, m, 13; shr.u64 $0, m, $2; }"
    return Uint64(_asm(T.i64(), text, "=l,r,r", [high, whole], loc, ip))


def weight(x: Float32, peak: Float32, factor: Float64) -> Uint64:
    """Of a logit."""
    part, whole = exponent(x, peak, factor)
    part = part ^ Uint32(0xFFFFFFFF)
    result = Uint32(POLYNOMIAL[-1])
    for coefficient in reversed((0, *POLYNOMIAL[:-1])):
        result = _multiply_high_add(result, part, Uint32(coefficient))
    return _significand(result, whole)


@dsl_user_op
def mass_limit(total: Uint64, top_p: Float32, *, loc: Any = None, ip: Any = None) -> Uint64:
    """A token is kept when the weights before it are less."""
    text = (
        "{ .reg .f64 a, p; .reg .pred all; .reg .u64 r; cvt.rn.f64.u64 a, $1; cvt.f64.f32 p, $2; "
        "mul.rn.f64 a, a, p; cvt.rpi.u64.f64 r, a; max.u64 r, r, 1; "
        "setp.ge.f32 all, $2, 0f3F800000; selp.u64 $0, 0x7FFFFFFFFFFFFFFF, r, all; }"
    )
    return Uint64(_asm(T.i64(), text, "=l,l,f", [total, top_p], loc, ip))


@dsl_user_op
def multiply_high(a: Uint64, b: Uint64, *, loc: Any = None, ip: Any = None) -> Uint64:
    """The high half of the product."""
    return Uint64(_asm(T.i64(), "mul.hi.u64 $0, $1, $2;", "=l,l,l", [a, b], loc, ip))


@dsl_user_op
def _halves(a: Uint32, b: Uint32, *, loc: Any = None, ip: Any = None) -> tuple[Uint32, Uint32]:
    """The high and the low word of the product."""
    text = "{ .reg .b64 p; mul.wide.u32 p, $2, $3; mov.b64 {$1, $0}, p; }"
    pair = ir.Type.parse("!llvm.struct<(i32, i32)>")
    high, low = _parts(_asm(pair, text, "=r,=r,r,r", [a, b], loc, ip), Uint32, 2, loc, ip)
    return high, low


def random_bits(seed: Uint64, counter: Uint64, attempt: Int32) -> Uint64:
    """64 bits of Philox4x32-10."""
    a, b, c, d = _low(counter), _high(counter), Uint32(attempt), Uint32(0)
    k0, k1 = _low(seed), _high(seed)
    for _ in range(10):
        first, second = _halves(Uint32(0xD2511F53), a), _halves(Uint32(0xCD9E8D57), c)
        a, b, c, d = second[0] ^ b ^ k0, second[1], first[0] ^ d ^ k1, first[1]
        k0, k1 = k0 + Uint32(0x9E3779B9), k1 + Uint32(0xBB67AE85)
    return Uint64(b) << Uint64(32) | Uint64(a)


def _low(a: Uint64) -> Uint32:
    return Uint32(a & Uint64(0xFFFFFFFF))


def _high(a: Uint64) -> Uint32:
    return Uint32(a >> Uint64(32))


@dsl_user_op
def key_of(x: Float32, *, loc: Any = None, ip: Any = None) -> Uint32:
    """Orders numbers as unsigned integers; NaN of either sign above all."""
    text = (
        "{ .reg .b32 b, s; .reg .pred nan; mov.b32 b, $1; shr.s32 s, b, 31; "
        "or.b32 s, s, 0x80000000; xor.b32 s, b, s; setp.nan.f32 nan, $1, $1; "
        f"selp.b32 $0, {_NAN_KEY:#x}, s, nan; }}"
    )
    return Uint32(_asm(T.i32(), text, "=r,f", [x], loc, ip))


@dsl_user_op
def number_of(key: Uint32, *, loc: Any = None, ip: Any = None) -> Float32:
    """The number that has the key."""
    text = (
        "{ .reg .b32 s; shr.s32 s, $1, 31; not.b32 s, s; or.b32 s, s, 0x80000000; "
        "xor.b32 s, $1, s; mov.b32 $0, s; }"
    )
    return Float32(_asm(T.f32(), text, "=f,r", [key], loc, ip))
