"""Loads and stores of a few bytes, at byte addresses: `Int32` in shared memory, `Int64` in global.

They keep their order among each other, and what a load of a few numbers returns is a tuple.
"""

from __future__ import annotations

from typing import Any

from cutlass import Float32, Int32, Int64, Uint32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

Numbers = tuple[Float32, ...]


@dsl_user_op
def load(address: Int32, count: int, *, loc: Any = None, ip: Any = None) -> Numbers:
    """2 or 4 numbers from shared memory."""
    names = ", ".join(f"${n}" for n in range(count))
    text = f"ld.shared.v{count}.f32 {{{names}}}, [${count}];"
    operands = [address.ir_value(loc=loc, ip=ip)]
    return _several(Float32, "f", count, text, "r", operands, loc, ip)


@dsl_user_op
def load_float(address: Int32, *, loc: Any = None, ip: Any = None) -> Float32:
    """One number from shared memory."""
    return Float32(_one(T.f32(), "ld.shared.f32 $0, [$1];", "=f,r", [address], loc, ip))


@dsl_user_op
def load_word(address: Int32, *, loc: Any = None, ip: Any = None) -> Uint32:
    """Four bytes from shared memory."""
    return Uint32(_one(T.i32(), "ld.shared.u32 $0, [$1];", "=r,r", [address], loc, ip))


@dsl_user_op
def load_byte(address: Int32, *, loc: Any = None, ip: Any = None) -> Uint32:
    """One byte from shared memory."""
    return Uint32(_one(T.i32(), "ld.shared.u8 $0, [$1];", "=r,r", [address], loc, ip))


@dsl_user_op
def store_float(address: Int32, value: Float32, *, loc: Any = None, ip: Any = None) -> None:
    """One number to shared memory."""
    _one(None, "st.shared.f32 [$0], $1;", "r,f", [address, value], loc, ip)


@dsl_user_op
def store_words(address: Int32, words: Any, *, loc: Any = None, ip: Any = None) -> None:
    """16 bytes to shared memory."""
    text = "st.shared.v4.u32 [$0], {$1, $2, $3, $4};"
    _one(None, text, "r,r,r,r,r", [address, *words], loc, ip)


@dsl_user_op
def store_word(address: Int32, value: Any, *, loc: Any = None, ip: Any = None) -> None:
    """Four bytes to shared memory."""
    _one(None, "st.shared.u32 [$0], $1;", "r,r", [address, value], loc, ip)


@dsl_user_op
def store_byte(address: Int32, value: Any, *, loc: Any = None, ip: Any = None) -> None:
    """The lowest byte to shared memory."""
    _one(None, "st.shared.u8 [$0], $1;", "r,r", [address, value], loc, ip)


@dsl_user_op
def load_global_word(address: Int64, *, loc: Any = None, ip: Any = None) -> Int32:
    """Four bytes from global memory."""
    return Int32(_one(T.i32(), "ld.global.u32 $0, [$1];", "=r,l", [address], loc, ip))


@dsl_user_op
def load_global_pair(address: Int64, *, loc: Any = None, ip: Any = None) -> Numbers:
    """2 numbers from global memory."""
    operands = [address.ir_value(loc=loc, ip=ip)]
    text = "ld.global.v2.f32 {$0, $1}, [$2];"
    return _several(Float32, "f", 2, text, "l", operands, loc, ip)


@dsl_user_op
def store_global(address: Int64, values: Numbers, *, loc: Any = None, ip: Any = None) -> None:
    """2 or 4 numbers to global memory."""
    count = len(values)
    names = ", ".join(f"${n + 1}" for n in range(count))
    text = f"st.global.v{count}.f32 [$0], {{{names}}};"
    _one(None, text, "l" + ",f" * count, [address, *values], loc, ip)


@dsl_user_op
def store_global_word(address: Int64, value: Uint32, *, loc: Any = None, ip: Any = None) -> None:
    """Four bytes to global memory."""
    _one(None, "st.global.u32 [$0], $1;", "l,r", [address, value], loc, ip)


@dsl_user_op
def store_global_words(address: Int64, words: Any, *, loc: Any = None, ip: Any = None) -> None:
    """Eight bytes to global memory."""
    _one(None, "st.global.v2.u32 [$0], {$1, $2};", "l,r,r", [address, *words], loc, ip)


def _several(
    kind: Any,
    letter: str,
    count: int,
    text: str,
    inputs: str,
    operands: list[Any],
    loc: Any,
    ip: Any,
) -> tuple[Any, ...]:
    element = kind.mlir_type
    struct = ir.Type.parse(f"!llvm.struct<({', '.join([str(element)] * count)})>")
    constraints = f"={letter}," * count + inputs
    packed = llvm.inline_asm(
        struct, operands, text, constraints, has_side_effects=True, loc=loc, ip=ip
    )
    return tuple(
        kind(llvm.extractvalue(element, packed, [n], loc=loc, ip=ip)) for n in range(count)
    )


def _one(kind: Any, text: str, constraints: str, values: list[Any], loc: Any, ip: Any) -> Any:
    operands = [value.ir_value(loc=loc, ip=ip) for value in values]
    return llvm.inline_asm(kind, operands, text, constraints, has_side_effects=True, loc=loc, ip=ip)
