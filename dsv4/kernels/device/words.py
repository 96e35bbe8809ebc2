"""Words of 32 bits: moved several at once, seen as float32 or as two bfloat16.

The lower half of a word is the first of a pair. What touches memory keeps its order; everything
else is free of side effects.
"""

from __future__ import annotations

from typing import Any

from cutlass import BFloat16, Float32, Int32, Uint32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op


@dsl_user_op
def load(address: Any, count: int, *, loc: Any = None, ip: Any = None) -> tuple[Uint32, ...]:
    """1, 2 or 4 words from `address` (a pointer), past L1: nobody else here wants them."""
    return _load("ld.global.cg", "l", address.to_llvm_ptr(loc=loc, ip=ip), count, loc, ip)


@dsl_user_op
def load_shared(slot: Int32, count: int, *, loc: Any = None, ip: Any = None) -> tuple[Uint32, ...]:
    """1, 2 or 4 words at byte `slot` of shared memory."""
    return _load("ld.shared", "r", slot.ir_value(loc=loc, ip=ip), count, loc, ip)


@dsl_user_op
def store(address: Any, words: Any, *, loc: Any = None, ip: Any = None) -> None:
    """1, 2 or 4 words. address: a pointer."""
    values = [word.ir_value(loc=loc, ip=ip) for word in words]
    _effect(
        f"st.global{_vector(len(words))}.u32 [$0], {_registers(1, len(words))};",
        ",".join(["l"] + ["r"] * len(words)),
        [address.to_llvm_ptr(loc=loc, ip=ip), *values],
        loc,
        ip,
    )


@dsl_user_op
def copy(slot: Int32, address: Any, count: int, *, loc: Any = None, ip: Any = None) -> None:
    """2 or 4 words from `address` (a pointer) to byte `slot` of shared memory; see `ring`."""
    through = {2: "ca", 4: "cg"}[count]
    _effect(
        f"cp.async.{through}.shared.global.L2::256B [$0], [$1], {4 * count};",
        "r,l",
        [slot.ir_value(loc=loc, ip=ip), address.to_llvm_ptr(loc=loc, ip=ip)],
        loc,
        ip,
    )


@dsl_user_op
def as_float(word: Uint32, *, loc: Any = None, ip: Any = None) -> Float32:
    """The float32 with these bits."""
    return Float32(llvm.bitcast(T.f32(), word.ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@dsl_user_op
def as_word(value: Float32, *, loc: Any = None, ip: Any = None) -> Uint32:
    """The bits of a float32."""
    return Uint32(llvm.bitcast(T.i32(), value.ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@dsl_user_op
def pack(low: Float32, high: Float32, *, loc: Any = None, ip: Any = None) -> Uint32:
    """Two float32 rounded to bfloat16, ties to even."""
    result = llvm.inline_asm(
        T.i32(),
        [high.ir_value(loc=loc, ip=ip), low.ir_value(loc=loc, ip=ip)],
        "cvt.rn.bf16x2.f32 $0, $1, $2;",
        "=r,f,f",
        has_side_effects=False,
        loc=loc,
        ip=ip,
    )
    return Uint32(result)


def unpack(words: Any) -> list[Float32]:
    """The bfloat16 numbers of words, in order."""
    values = []
    for word in words:
        values += [as_float(word << 16), as_float(word & Uint32(0xFFFF0000))]
    return values


def pack_all(values: Any) -> list[Uint32]:
    """An even number of float32 rounded to bfloat16, in pairs."""
    return [pack(values[n], values[n + 1]) for n in range(0, len(values), 2)]


def rounded(value: Float32) -> Float32:
    """To the nearest bfloat16, ties to even."""
    return Float32(BFloat16(value))


def _vector(count: int) -> str:
    return "" if count == 1 else f".v{count}"


def _registers(first: int, count: int) -> str:
    listed = ", ".join(f"${first + n}" for n in range(count))
    return listed if count == 1 else f"{{{listed}}}"


def _load(
    instruction: str, kind: str, address: Any, count: int, loc: Any, ip: Any
) -> tuple[Uint32, ...]:
    result = T.i32() if count == 1 else _struct(count)
    packed = llvm.inline_asm(
        result,
        [address],
        f"{instruction}{_vector(count)}.u32 {_registers(0, count)}, [${count}];",
        ",".join(["=r"] * count + [kind]),
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )
    if count == 1:
        return (Uint32(packed),)
    return tuple(
        Uint32(llvm.extractvalue(T.i32(), packed, [n], loc=loc, ip=ip)) for n in range(count)
    )


def _struct(count: int) -> Any:
    return ir.Type.parse(f"!llvm.struct<({', '.join(['i32'] * count)})>")


def _effect(text: str, constraints: str, operands: list[Any], loc: Any, ip: Any) -> None:
    llvm.inline_asm(None, operands, text, constraints, has_side_effects=True, loc=loc, ip=ip)
