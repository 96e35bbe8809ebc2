"""Inline PTX that adds to many registers at once."""

from __future__ import annotations

from typing import Any

from cutlass import Float32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm


def tied(acc: list[Any], others: list[Any], text: str, kinds: list[str], loc: Any, ip: Any) -> Any:
    """Run `text`: `$0`… are `acc`, in and out; after twice as many come `others`, of `kinds`.

    -> acc afterwards.
    """
    count = len(acc)
    constraints = ["=f"] * count + [str(i) for i in range(count)] + kinds
    struct = ir.Type.parse("!llvm.struct<(" + ", ".join(["f32"] * count) + ")>")
    values = [value.ir_value(loc=loc, ip=ip) for value in [*acc, *others]]
    packed = llvm.inline_asm(
        struct, values, text, ",".join(constraints), has_side_effects=True, loc=loc, ip=ip
    )
    return [
        Float32(llvm.extractvalue(Float32.mlir_type, packed, [i], loc=loc, ip=ip))
        for i in range(count)
    ]
