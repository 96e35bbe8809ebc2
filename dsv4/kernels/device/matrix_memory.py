"""Moving bytes to, from and within shared memory, whose addresses are `Int32`, and packing them."""

from __future__ import annotations

from typing import Any

from cutlass import Float32, Int32, Int64, Uint32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op


def _asm(result: Any, text: str, constraints: str, args: list[Any], loc: Any, ip: Any) -> Any:
    values = [arg.ir_value(loc=loc, ip=ip) for arg in args]
    return llvm.inline_asm(result, values, text, constraints, has_side_effects=True, loc=loc, ip=ip)


def _words(packed: Any, count: int, loc: Any, ip: Any) -> tuple[Uint32, ...]:
    return tuple(
        Uint32(llvm.extractvalue(Uint32.mlir_type, packed, [n], loc=loc, ip=ip))
        for n in range(count)
    )


@dsl_user_op
def copy_async(
    target: Int32,
    source: Int64,
    nbytes: Int32,
    to: int = 0,
    of: int = 0,
    *,
    loc: Any = None,
    ip: Any = None,
) -> None:
    """Begin to copy 16 bytes of global memory at `source + of` to `target + to`, past L1.

    Zeros where nbytes is 0, not 16. Constant offsets are part of the instruction, not registers.
    """
    text = f"cp.async.cg.shared.global.L2::128B [$0 + {to}], [$1 + {of}], 16, $2;"
    _asm(None, text, "r,l,r,~{memory}", [target, source, nbytes], loc, ip)


@dsl_user_op
def copy_bulk(
    target: Int32, source: Int64, nbytes: int, barrier: Int32, *, loc: Any = None, ip: Any = None
) -> None:
    """Begin to copy bytes of global memory, which then count at `barrier`: one thread's business.

    All are multiples of 16.
    """
    text = (
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
        f"[$0], [$1], {nbytes}, [$2];"
    )
    _asm(None, text, "r,l,r,~{memory}", [target, source, barrier], loc, ip)


@dsl_user_op
def load_u8(address: Int32, *, loc: Any = None, ip: Any = None) -> Uint32:
    """One byte."""
    args = [address]
    return Uint32(_asm(T.i32(), "ld.shared.u8 $0, [$1];", "=r,r,~{memory}", args, loc, ip))


@dsl_user_op
def load_u16(address: Int32, *, loc: Any = None, ip: Any = None) -> Uint32:
    """Two bytes."""
    args = [address]
    return Uint32(_asm(T.i32(), "ld.shared.u16 $0, [$1];", "=r,r,~{memory}", args, loc, ip))


@dsl_user_op
def load_b64(address: Int32, *, loc: Any = None, ip: Any = None) -> tuple[Uint32, ...]:
    """Eight bytes."""
    struct = ir.Type.parse("!llvm.struct<(i32, i32)>")
    text = "ld.shared.v2.u32 {$0, $1}, [$2];"
    return _words(_asm(struct, text, "=r,=r,r,~{memory}", [address], loc, ip), 2, loc, ip)


@dsl_user_op
def load_b128(address: Int32, *, loc: Any = None, ip: Any = None) -> tuple[Uint32, ...]:
    """Sixteen bytes."""
    struct = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
    text = "ld.shared.v4.u32 {$0, $1, $2, $3}, [$4];"
    args = [address]
    return _words(_asm(struct, text, "=r,=r,=r,=r,r,~{memory}", args, loc, ip), 4, loc, ip)


@dsl_user_op
def store_u16(address: Int32, value: Uint32, *, loc: Any = None, ip: Any = None) -> None:
    """The lower half of `value`."""
    text = "{ .reg .b16 h; cvt.u16.u32 h, $1; st.shared.b16 [$0], h; }"
    _asm(None, text, "r,r,~{memory}", [address, value], loc, ip)


@dsl_user_op
def store_transposed(address: Int32, words: Any, *, loc: Any = None, ip: Any = None) -> None:
    """Four 8x8 matrices of 16-bit elements, each written transposed.

    Lane `4g + t` holds row g, columns 2t and 2t + 1 of each; lane `8i + c` gives the address of
    column c of matrix i: 16 bytes.
    """
    text = "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0], {$1, $2, $3, $4};"
    _asm(None, text, "r,r,r,r,r,~{memory}", [address, *words], loc, ip)


@dsl_user_op
def store_b128(address: Int32, words: Any, *, loc: Any = None, ip: Any = None) -> None:
    """Sixteen bytes."""
    text = "st.shared.v4.u32 [$0], {$1, $2, $3, $4};"
    _asm(None, text, "r,r,r,r,r,~{memory}", [address, *words], loc, ip)


@dsl_user_op
def load_global_b128(address: Int64, *, loc: Any = None, ip: Any = None) -> tuple[Uint32, ...]:
    """Sixteen bytes of global memory."""
    struct = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
    text = "ld.global.v4.u32 {$0, $1, $2, $3}, [$4];"
    args = [address]
    return _words(_asm(struct, text, "=r,=r,=r,=r,l,~{memory}", args, loc, ip), 4, loc, ip)


@dsl_user_op
def load_global_u8(address: Int64, *, loc: Any = None, ip: Any = None) -> Uint32:
    """One byte of global memory."""
    text = "ld.global.nc.u8 $0, [$1];"
    return Uint32(_asm(T.i32(), text, "=r,l,~{memory}", [address], loc, ip))


@dsl_user_op
def store_global_b128(address: Int64, words: Any, *, loc: Any = None, ip: Any = None) -> None:
    """Sixteen bytes to global memory."""
    text = "st.global.v4.u32 [$0], {$1, $2, $3, $4};"
    _asm(None, text, "l,r,r,r,r,~{memory}", [address, *words], loc, ip)


@dsl_user_op
def pack_bf16(low: Float32, high: Float32, *, loc: Any = None, ip: Any = None) -> Uint32:
    """Two numbers rounded to bfloat16, in one word."""
    values = [high.ir_value(loc=loc, ip=ip), low.ir_value(loc=loc, ip=ip)]
    text = "cvt.rn.bf16x2.f32 $0, $1, $2;"
    return Uint32(
        llvm.inline_asm(T.i32(), values, text, "=r,f,f", has_side_effects=False, loc=loc, ip=ip)
    )


@dsl_user_op
def e8m0_to_bf16x2(code: Uint32, *, loc: Any = None, ip: Any = None) -> Uint32:
    """2^(code - 127), twice; code 0 is 2^-127, a subnormal number."""
    text = "{ .reg .u32 e; shl.b32 e, $1, 7; max.u32 e, e, 0x0040; prmt.b32 $0, e, e, 0x1010; }"
    values = [code.ir_value(loc=loc, ip=ip)]
    return Uint32(
        llvm.inline_asm(T.i32(), values, text, "=r,r", has_side_effects=False, loc=loc, ip=ip)
    )


@dsl_user_op
def bf16_to_f32(word: Uint32, half: int, *, loc: Any = None, ip: Any = None) -> Float32:
    """Half 0 (lower) or 1 of two packed numbers."""
    bits = word & Uint32(0xFFFF0000) if half else word << 16
    value = llvm.bitcast(T.f32(), bits.ir_value(loc=loc, ip=ip), loc=loc, ip=ip)
    return Float32(value)


@dsl_user_op
def float_bits(value: Float32, *, loc: Any = None, ip: Any = None) -> Uint32:
    """The number's 32 bits."""
    return Uint32(llvm.bitcast(T.i32(), value.ir_value(loc=loc, ip=ip), loc=loc, ip=ip))
