"""E2M1 codes into bfloat16's fields with one multiplication in place of two shifts.

A nibble `seem` times 2^12 + 2^6 is `seem00seem000000`: its sign is where bfloat16's sign is and its
magnitude where the lowest two bits of the exponent and the highest of the mantissa are. A mask
leaves just these. Two nibbles go at once, four places apart in their word.
"""

from __future__ import annotations

from typing import Any

from cutlass import Uint32

from dsv4.kernels.sm90 import ptx
from dsv4.kernels.sm90.operands import Nvfp4Operand

_KEPT = 0x81C081C0


class NibbleOperand(Nvfp4Operand):
    """The same operand, unpacked with fewer instructions."""

    def a(self, words: Any, prepared: Any, tile: int, mma: int) -> tuple[Any, ...]:
        low, high = [], []
        for row in (2 * tile, 2 * tile + 1):
            word, scale = words[4 * row + mma // 2], prepared[row][mma // 4]
            half = word >> 8 if mma % 2 else word
            first = ((half & Uint32(0x000F000F)) * Uint32(0x1040)) & Uint32(_KEPT)
            second = ((half & Uint32(0x00F000F0)) * Uint32(0x0104)) & Uint32(_KEPT)
            low.append(ptx.mul_bf16x2(first, scale))
            high.append(ptx.mul_bf16x2(second, scale))
        return (*low, *high)
