"""Numbers in registers: E4M3 as bfloat16, packing, powers of two, a warp's maximum."""

from __future__ import annotations

from typing import Any

from cutlass import Float32, Uint32
from cutlass.cutlass_dsl import T, dsl_user_op

from dsv4.kernels.device import ptx


def e4m3_words(word: Uint32, factor: Uint32) -> tuple[Uint32, Uint32]:
    """Four codes as bfloat16 in their order, times a factor of `e4m3_factor`."""
    return _moved(word, factor, 0x1404), _moved(word, factor, 0x3424)


def _moved(word: Uint32, factor: Uint32, order: int) -> Uint32:
    high = ptx.byte_permute(word, Uint32(0), order)
    bits = (high & Uint32(0x80008000)) | ((high >> 4) & Uint32(0x07F007F0))
    return ptx.mul_bf16x2(bits, factor)


@dsl_user_op
def e4m3_factor(scale: Uint32, *, loc: Any = None, ip: Any = None) -> Uint32:
    """2^(120 + scale - 127) twice, bfloat16; scale: E8M0. Infinite beyond a scale of 2^7."""
    text = (
        "{ .reg .u32 e; add.u32 e, $1, 120; min.u32 e, e, 255; shl.b32 e, e, 7; "
        "prmt.b32 $0, e, e, 0x1010; }"
    )
    return Uint32(ptx._asm(T.i32(), text, "=r,r", [scale], loc, ip))


@dsl_user_op
def pack_bf16x2(low: Float32, high: Float32, *, loc: Any = None, ip: Any = None) -> Uint32:
    """Two numbers rounded to bfloat16."""
    return Uint32(
        ptx._asm(T.i32(), "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], loc, ip)
    )


@dsl_user_op
def exp2(x: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    """2^x, within 2^-22; 0 for -inf."""
    return Float32(ptx._asm(T.f32(), "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], loc, ip))


@dsl_user_op
def warp_max(x: Float32, *, loc: Any = None, ip: Any = None) -> Float32:
    """The largest of a warp's numbers: as integers, which order alike once negatives are turned."""
    text = (
        "{ .reg .s32 b, s; mov.b32 b, $1; shr.s32 s, b, 31; and.b32 s, s, 0x7fffffff; "
        "xor.b32 b, b, s; redux.sync.max.s32 b, b, 0xffffffff; "
        "shr.s32 s, b, 31; and.b32 s, s, 0x7fffffff; xor.b32 b, b, s; mov.b32 $0, b; }"
    )
    return Float32(ptx._asm(T.f32(), text, "=f,f", [x], loc, ip))
