"""Inline PTX: every instruction that the DSL has no name for passes through this file.

In a text `$0`, `$1`, ... are registers: results first, then arguments. The kind of each register
follows from the type of its number, so that nobody writes constraint strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cutlass import Float32, Float64, Int32, Int64, Uint32, Uint64
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op

_REGISTERS = {Float32: "f", Float64: "d", Int32: "r", Uint32: "r", Int64: "l", Uint64: "l"}


@dsl_user_op
def compute(
    text: str, *args: Any, out: Any, early: bool = False, loc: Any = None, ip: Any = None
) -> Any:
    """Instructions without side effects: the compiler may move, merge and drop them.

    args: numbers. out: the type of the result, or a tuple of types for as many results. early: the
    results are written before all arguments are read.
    """
    return _run(text, args, out, early, False, loc, ip)


@dsl_user_op
def effect(
    text: str,
    *args: Any,
    out: Any = None,
    early: bool = False,
    loc: Any = None,
    ip: Any = None,
) -> Any:
    """Instructions that touch memory or wait: they keep their order among each other.

    args: numbers, or pointers into global memory. out, early: as of `compute`; None for no result.
    """
    return _run(text, args, out, early, True, loc, ip)


@dsl_user_op
def accumulate(
    text: str, acc: Sequence[Any], *others: Any, loc: Any = None, ip: Any = None
) -> list[Any]:
    """`$0`, ... are `acc`, Float32 that are read and written; after twice as many come `others`.

    -> acc afterwards.
    """
    count = len(acc)
    tied = [str(i) for i in range(count)]
    constraints = ["=f"] * count + tied + [_register(one) for one in others]
    values = [_value(one, loc, ip) for one in [*acc, *others]]
    packed = llvm.inline_asm(
        _struct([Float32] * count),
        values,
        text,
        ",".join(constraints),
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )
    return _parts(packed, [Float32] * count, loc, ip)


def listed(first: int, count: int) -> str:
    """Registers as a vector instruction names them: `$1` or `{$1, $2}`."""
    names = ", ".join(f"${first + n}" for n in range(count))
    return names if count == 1 else f"{{{names}}}"


def at(register: int, offset: int = 0) -> str:
    """The address in a register plus a constant, which is part of the instruction and so free."""
    return f"[${register} + {offset}]" if offset else f"[${register}]"


def vector(count: int) -> str:
    """How an instruction says that it moves so many numbers."""
    return "" if count == 1 else f".v{count}"


def _run(
    text: str, args: tuple[Any, ...], out: Any, early: bool, effects: bool, loc: Any, ip: Any
) -> Any:
    types = list(out) if isinstance(out, tuple) else [] if out is None else [out]
    constraints = [("=&" if early else "=") + _REGISTERS[one] for one in types]
    constraints += [_register(one) for one in args]
    if effects:
        constraints.append("~{memory}")
    result = None
    if types:
        result = types[0].mlir_type if len(types) == 1 else _struct(types)
    packed = llvm.inline_asm(
        result,
        [_value(one, loc, ip) for one in args],
        text,
        ",".join(constraints),
        has_side_effects=effects,
        loc=loc,
        ip=ip,
    )
    if isinstance(out, tuple):
        return tuple(_parts(packed, types, loc, ip)) if len(types) > 1 else (types[0](packed),)
    return None if out is None else out(packed)


def _register(one: Any) -> str:
    return "l" if hasattr(one, "to_llvm_ptr") else _REGISTERS[type(one)]


def _value(one: Any, loc: Any, ip: Any) -> Any:
    if hasattr(one, "to_llvm_ptr"):
        return one.to_llvm_ptr(loc=loc, ip=ip)
    return one.ir_value(loc=loc, ip=ip)


def _struct(types: Sequence[Any]) -> Any:
    return ir.Type.parse(f"!llvm.struct<({', '.join(str(one.mlir_type) for one in types)})>")


def _parts(packed: Any, types: Sequence[Any], loc: Any, ip: Any) -> list[Any]:
    return [
        kind(llvm.extractvalue(kind.mlir_type, packed, [n], loc=loc, ip=ip))
        for n, kind in enumerate(types)
    ]
