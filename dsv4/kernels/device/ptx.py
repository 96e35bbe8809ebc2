"""Instructions that the DSL has no name for, each one PTX instruction or a fixed few.

They are declared free of side effects, so that the compiler may schedule and merge them. Registers
of packed pairs are `Uint32`, the lower half first.
"""

from __future__ import annotations

from typing import Any

from cutlass import Float32, Uint32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op


def _asm(result: Any, text: str, constraints: str, args: list[Any], loc: Any, ip: Any) -> Any:
    values = [arg.ir_value(loc=loc, ip=ip) for arg in args]
    return llvm.inline_asm(
        result, values, text, constraints, has_side_effects=False, loc=loc, ip=ip
    )


def _parts(packed: Any, kind: Any, count: int, loc: Any, ip: Any) -> tuple[Any, ...]:
    return tuple(
        kind(llvm.extractvalue(kind.mlir_type, packed, [n], loc=loc, ip=ip)) for n in range(count)
    )


@dsl_user_op
def mul_bf16x2(a: Uint32, b: Uint32, *, loc: Any = None, ip: Any = None) -> Uint32:
    """Two bfloat16 products. Subnormal numbers are kept."""
    return Uint32(_asm(T.i32(), "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], loc, ip))


@dsl_user_op
def byte_permute(
    a: Uint32, b: Uint32, selector: Uint32 | int, *, loc: Any = None, ip: Any = None
) -> Uint32:
    """Byte i of the result is the byte of (a, b) that nibble i of `selector` numbers."""
    args = [a, b, Uint32(selector)]
    return Uint32(_asm(T.i32(), "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", args, loc, ip))


@dsl_user_op
def mma_bf16(
    acc: tuple[Float32, Float32, Float32, Float32],
    a: tuple[Uint32, Uint32, Uint32, Uint32],
    b: tuple[Uint32, Uint32],
    *,
    loc: Any = None,
    ip: Any = None,
) -> tuple[Float32, ...]:
    """`acc + a · b` of a warp: a `[16, 16]`, b `[16, 8]` bfloat16, acc `[16, 8]` float32.

    Lane `4g + t` holds of a: rows g, g+8, g, g+8 at columns 2t, 2t, 2t+8, 2t+8 (and the next
    one); of b: column g at rows 2t and 2t+8; of acc: row g at columns 2t and 2t+1, then row g+8.
    """
    struct = ir.Type.parse("!llvm.struct<(f32, f32, f32, f32)>")
    packed = _asm(
        struct,
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [*a, *b, *acc],
        loc,
        ip,
    )
    return _parts(packed, Float32, 4, loc, ip)


@dsl_user_op
def e8m0_to_f32(code: Uint32, *, loc: Any = None, ip: Any = None) -> Float32:
    """2^(code - 127); code 0 is 2^-127, a subnormal number."""
    text = "{ .reg .u32 e; shl.b32 e, $1, 23; max.u32 e, e, 0x00400000; mov.b32 $0, e; }"
    return Float32(_asm(T.f32(), text, "=f,r", [code], loc, ip))
