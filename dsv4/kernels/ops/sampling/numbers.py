"""The numbers of a draw, as `dsv4.kernels.reference.sampling` defines them, bit for bit."""

from __future__ import annotations

import struct

from cutlass import Float32, Float64, Int32, Uint32, Uint64

from dsv4.kernels.device.arithmetic import multiply_high_add, multiply_wide
from dsv4.kernels.device.asm import compute
from dsv4.kernels.reference.sampling import EXPONENT_BASE, LOG2E, LOWEST, POLYNOMIAL

INFINITE_KEY = 0xFF800000
LOWEST_KEY = 0x007FFFFF  # of -infinity
_NAN_KEY = 0xFFFFFFFF


def _double(value: float) -> str:
    return "0d" + struct.pack(">d", value).hex().upper()


def exponent(x: Float32, peak: Float32, factor: Float64) -> tuple[Uint32, Uint32]:
    """The fraction, and the whole powers of two, that the weight of `x` is below the largest."""
    text = (
        "{ .reg .f64 a, b; cvt.f64.f32 a, $2; cvt.f64.f32 b, $3; sub.rn.f64 a, b, a; "
        f"mul.rn.f64 a, a, $4; min.f64 a, a, {_double(LOWEST)}; "
        f"add.rn.f64 a, a, {_double(EXPONENT_BASE)}; mov.b64 {{$0, $1}}, a; "
        f"sub.u32 $1, $1, 0x{_double(EXPONENT_BASE)[2:10]}; }}"
    )
    part, whole = compute(text, x, peak, factor, out=(Uint32, Uint32), early=True)
    return part, whole


def factor_of(temperature: Float32) -> Float64:
    """Powers of two for a difference of 1; infinite for temperature 0."""
    text = f"{{ .reg .f64 t; cvt.f64.f32 t, $1; div.rn.f64 $0, {_double(LOG2E)}, t; }}"
    return Float64(compute(text, temperature, out=Float64))


def _significand(high: Uint32, whole: Uint32) -> Uint64:
    """`(2^32 + high) 2^13`, that many bits lower."""
    text = "{ .reg .b64 m; mov.b64 m, {$1, 1}; shl.b64 m, m, 13; shr.u64 $0, m, $2; }"
    return Uint64(compute(text, high, whole, out=Uint64))


def weight(x: Float32, peak: Float32, factor: Float64) -> Uint64:
    """Of a logit."""
    part, whole = exponent(x, peak, factor)
    part = part ^ Uint32(0xFFFFFFFF)
    result = Uint32(POLYNOMIAL[-1])
    for coefficient in reversed((0, *POLYNOMIAL[:-1])):
        result = multiply_high_add(result, part, Uint32(coefficient))
    return _significand(result, whole)


def mass_limit(total: Uint64, top_p: Float32) -> Uint64:
    """A token is kept when the weights before it are less."""
    text = (
        "{ .reg .f64 a, p; .reg .pred all; .reg .u64 r; cvt.rn.f64.u64 a, $1; cvt.f64.f32 p, $2; "
        "mul.rn.f64 a, a, p; cvt.rpi.u64.f64 r, a; max.u64 r, r, 1; "
        "setp.ge.f32 all, $2, 0f3F800000; selp.u64 $0, 0x7FFFFFFFFFFFFFFF, r, all; }"
    )
    return Uint64(compute(text, total, top_p, out=Uint64))


def random_bits(seed: Uint64, counter: Uint64, attempt: Int32) -> Uint64:
    """64 bits of Philox4x32-10."""
    a, b, c, d = _low(counter), _high(counter), Uint32(attempt), Uint32(0)
    k0, k1 = _low(seed), _high(seed)
    for _ in range(10):
        first, second = multiply_wide(Uint32(0xD2511F53), a), multiply_wide(Uint32(0xCD9E8D57), c)
        a, b, c, d = second[0] ^ b ^ k0, second[1], first[0] ^ d ^ k1, first[1]
        k0, k1 = k0 + Uint32(0x9E3779B9), k1 + Uint32(0xBB67AE85)
    return Uint64(b) << Uint64(32) | Uint64(a)


def _low(a: Uint64) -> Uint32:
    return Uint32(a & Uint64(0xFFFFFFFF))


def _high(a: Uint64) -> Uint32:
    return Uint32(a >> Uint64(32))


def key_of(x: Float32) -> Uint32:
    """Orders numbers as unsigned integers; NaN of either sign above all."""
    text = (
        "{ .reg .b32 b, s; .reg .pred nan; mov.b32 b, $1; shr.s32 s, b, 31; "
        "or.b32 s, s, 0x80000000; xor.b32 s, b, s; setp.nan.f32 nan, $1, $1; "
        f"selp.b32 $0, {_NAN_KEY:#x}, s, nan; }}"
    )
    return Uint32(compute(text, x, out=Uint32))


def number_of(key: Uint32) -> Float32:
    """The number that has the key."""
    text = (
        "{ .reg .b32 s; shr.s32 s, $1, 31; not.b32 s, s; or.b32 s, s, 0x80000000; "
        "xor.b32 s, $1, s; mov.b32 $0, s; }"
    )
    return Float32(compute(text, key, out=Float32))
