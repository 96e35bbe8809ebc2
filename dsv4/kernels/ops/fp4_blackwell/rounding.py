"""Rounding to NVFP4, bit for bit as IEEE arithmetic in float32 does it.

Hopper has no instruction that rounds to E2M1; Blackwell has one that rounds two numbers at once.
Both ways give the same codes.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Uint32

from dsv4.kernels.device import conversions
from dsv4.kernels.device.arithmetic import fused, max_u16x2, product, quotient, remainder

E2M1_MAX = 6.0
E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-9
INFINITY = 0x7F800000
PLAIN_DIVISOR = (2.0**-95, 2.0**15)

_ONE = 0x3F800000
_NIBBLES = 0x11111111


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


@cute.jit
def block_scale(amax: Float32, six_g: Float32) -> tuple[Uint32, Float32]:
    """(byte, value) of the scale of a block with that largest magnitude, for 6 times g."""
    ratio = quotient(amax, six_g)
    limited = cutlass.min(cutlass.max(ratio, Float32(SMALLEST_SCALE)), Float32(E4M3_MAX))
    byte = conversions.e4m3_byte(limited)
    byte = Uint32(0x38) if ratio == Float32(0.0) else byte
    return byte, conversions.e4m3_value(byte)


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


def e2m1_word(values: Any, signed_zero: bool, instruction: bool) -> Uint32:
    """Codes of eight float32 (none of them -0), the first lowest.

    signed_zero: what rounds to zero keeps its sign. instruction: there is one that rounds.
    """
    if instruction:
        word = conversions.e2m1_word(values)
    else:
        word = Uint32(0)
        for i, value in enumerate(values):
            word |= _e2m1_code(value) << Uint32(4 * i)
    if signed_zero:
        return word
    nonzero = (word | (word >> Uint32(1)) | (word >> Uint32(2))) & Uint32(_NIBBLES)
    return word & (Uint32(7 * _NIBBLES) | (nonzero << Uint32(3)))


def magnitude_bits(pairs: Any) -> Uint32:
    """The largest magnitude of pairs of bfloat16, as the bits of a float32; NaN counts highest."""
    both = pairs[0] & Uint32(0x7FFF7FFF)
    for pair in pairs[1:]:
        both = max_u16x2(both, pair & Uint32(0x7FFF7FFF))
    return cutlass.max(both << Uint32(16), both & Uint32(0xFFFF0000))
