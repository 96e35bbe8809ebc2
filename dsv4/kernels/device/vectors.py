"""Vectors to and from memory. All keep their order among each other."""

from __future__ import annotations

from typing import Any

from cutlass import Int32, Uint32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op

from dsv4.kernels.device.ptx import _parts

_FOUR_WORDS = "!llvm.struct<(i32, i32, i32, i32)>"


@dsl_user_op
def load_b128_if(
    condition: Int32, address: Any, *, loc: Any = None, ip: Any = None
) -> tuple[Uint32, ...]:
    """16 bytes from a pointer, or zeros where `condition` is 0 and nothing is read."""
    text = (
        "{ .reg .pred p; setp.ne.s32 p, $4, 0; "
        "mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0; "
        "@p ld.global.v4.u32 {$0, $1, $2, $3}, [$5]; }"
    )
    operands = [condition.ir_value(loc=loc, ip=ip), address.to_llvm_ptr(loc=loc, ip=ip)]
    packed = _effect(ir.Type.parse(_FOUR_WORDS), text, "=&r,=&r,=&r,=&r,r,l", operands, loc, ip)
    return _parts(packed, Uint32, 4, loc, ip)


@dsl_user_op
def store_b128(address: Any, words: Any, *, loc: Any = None, ip: Any = None) -> None:
    """Four words to a pointer into global memory."""
    operands = [address.to_llvm_ptr(loc=loc, ip=ip)]
    operands += [word.ir_value(loc=loc, ip=ip) for word in words]
    _effect(None, "st.global.v4.u32 [$0], {$1, $2, $3, $4};", "l,r,r,r,r", operands, loc, ip)


@dsl_user_op
def store_b64(address: Any, words: Any, *, loc: Any = None, ip: Any = None) -> None:
    """Two words to a pointer into global memory."""
    operands = [address.to_llvm_ptr(loc=loc, ip=ip)]
    operands += [word.ir_value(loc=loc, ip=ip) for word in words]
    _effect(None, "st.global.v2.u32 [$0], {$1, $2};", "l,r,r", operands, loc, ip)


@dsl_user_op
def store_b32(address: Any, word: Uint32, *, loc: Any = None, ip: Any = None) -> None:
    """A word to a pointer into global memory."""
    operands = [address.to_llvm_ptr(loc=loc, ip=ip), word.ir_value(loc=loc, ip=ip)]
    _effect(None, "st.global.u32 [$0], $1;", "l,r", operands, loc, ip)


@dsl_user_op
def store_shared_b128(slot: Int32, words: Any, *, loc: Any = None, ip: Any = None) -> None:
    """Four words to byte `slot` of shared memory."""
    operands = [slot.ir_value(loc=loc, ip=ip), *(word.ir_value(loc=loc, ip=ip) for word in words)]
    _effect(None, "st.shared.v4.u32 [$0], {$1, $2, $3, $4};", "r,r,r,r,r", operands, loc, ip)


def _effect(result: Any, text: str, constraints: str, operands: Any, loc: Any, ip: Any) -> Any:
    return llvm.inline_asm(
        result, operands, text, constraints, has_side_effects=True, loc=loc, ip=ip
    )
