"""Hopper's warpgroup matrix product: four warps, asynchronous, B in shared memory.

`acc + a · b`: a `[64, 16]` bfloat16, from registers (as of `mma.m16n8k16`, warp `w` of the
warpgroup having rows `16w`…) or from shared memory; b `[16, n]`; acc `[64, n]` float32.

Operands in shared memory are tiles `[rows][64 columns]` of bfloat16, 128 bytes a row, whose
16-byte chunk `c` of row `r` lies at place `c ^ (r % 8)` (the 128-byte swizzle); a tile begins at a
multiple of 1024 bytes. A product is over 16 of the 64 columns: 32 bytes on, at a tile's start; or,
for b transposed, over 16 of its rows, with tiles of 64 of its n columns one after another.
"""

from __future__ import annotations

from typing import Any

from cutlass import Float32, Int32, Int64, Uint32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op

TILE_COLS = 64
TILE_ROW_BYTES = 128
MMA_COLS = 16

# Descriptor: address / 16 in bits 0..13, 1024 / 16 between groups of 8 rows in bits 32..45, the
# 128-byte swizzle in bits 62..63.
_DESCRIPTOR = (1 << 62) | (64 << 32) | (1 << 16)


def descriptor(address: Int32) -> Int64:
    """Of a tile at this address of shared memory."""
    return Int64((Uint32(address) & Uint32(0x3FFFF)) >> 4) | Int64(_DESCRIPTOR)


def transposed(address: Int32, tile_bytes: int) -> Int64:
    """Of b `[16, n]`: rows of tiles that lie `tile_bytes` apart, each of 64 columns."""
    fixed = (1 << 62) | (64 << 32) | (tile_bytes // 16 << 16)
    return Int64((Uint32(address) & Uint32(0x3FFFF)) >> 4) | Int64(fixed)


def advance(tile: Int64, step: int) -> Int64:
    """The descriptor of the tile's columns `16 step`…"""
    return tile + Int64(step * MMA_COLS * 2 // 16)


@dsl_user_op
def multiply(
    acc: list[Any],
    a: Any,
    b: Int64,
    turned: bool = False,
    *,
    loc: Any = None,
    ip: Any = None,
) -> list[Any]:
    """Issue `acc + a · b`. a: four registers, or a descriptor; acc: n / 2 Float32.

    turned: b is of `transposed`. What is returned must not be read, nor `a` be changed, before the
    product was waited for.
    """
    count = len(acc)
    operands = list(a) if isinstance(a, (tuple, list)) else [a]
    outs = ", ".join(f"${i}" for i in range(count))
    first = 2 * count  # the tied inputs come between
    if len(operands) == 4:
        text_a = "{" + ", ".join(f"${first + i}" for i in range(4)) + "}"
        kinds, flags = ["r"] * 4, f"p, 1, 1, {int(turned)}"
    else:
        text_a, kinds, flags = f"${first}", ["l"], f"p, 1, 1, 0, {int(turned)}"
    text = (
        "{ .reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned"
        f".m64n{2 * count}k16.f32.bf16.bf16 {{{outs}}}, {text_a}, ${first + len(operands)}, "
        f"{flags}; }}"
    )
    constraints = ["=f"] * count + [str(i) for i in range(count)] + kinds + ["l"]
    return _tied(acc, [*operands, b], text, constraints, loc, ip)


@dsl_user_op
def fence(*, loc: Any = None, ip: Any = None) -> None:
    """Before the first product after registers were written."""
    _plain("wgmma.fence.sync.aligned;", loc, ip)


@dsl_user_op
def commit(*, loc: Any = None, ip: Any = None) -> None:
    """The products issued since the last commit are one group."""
    _plain("wgmma.commit_group.sync.aligned;", loc, ip)


@dsl_user_op
def wait(pending: int, *, loc: Any = None, ip: Any = None) -> None:
    """Until at most `pending` of the latest groups are not done."""
    _plain(f"wgmma.wait_group.sync.aligned {pending};", loc, ip)


@dsl_user_op
def wait_for(acc: list[Any], *, loc: Any = None, ip: Any = None) -> list[Any]:
    """Until all is done; -> the sums, which may be read."""
    constraints = ["=f"] * len(acc) + [str(i) for i in range(len(acc))]
    return _tied(acc, [], "wgmma.wait_group.sync.aligned 0;", constraints, loc, ip)


def _tied(
    acc: list[Any], others: list[Any], text: str, constraints: list[str], loc: Any, ip: Any
) -> list[Any]:
    struct = ir.Type.parse("!llvm.struct<(" + ", ".join(["f32"] * len(acc)) + ")>")
    values = [value.ir_value(loc=loc, ip=ip) for value in [*acc, *others]]
    packed = llvm.inline_asm(
        struct, values, text, ",".join(constraints), has_side_effects=True, loc=loc, ip=ip
    )
    return [
        Float32(llvm.extractvalue(Float32.mlir_type, packed, [i], loc=loc, ip=ip))
        for i in range(len(acc))
    ]


def _plain(text: str, loc: Any, ip: Any) -> None:
    llvm.inline_asm(None, [], text, "~{memory}", has_side_effects=True, loc=loc, ip=ip)
