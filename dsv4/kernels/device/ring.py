"""A warp's own ring of shared memory: asynchronous copies that only the copying thread reads.

A slot is `pieces` times 16 bytes for each lane, `[piece][lane][16]`, so that a warp reads it
without bank conflicts. A thread waits for its own copies and needs no barrier. This keeps tens of
kilobytes in flight on a multiprocessor at no cost in registers: plain loads, however early they are
asked for, are moved next to their use by the assembler.
"""

from __future__ import annotations

from typing import Any

from cutlass import Int32, Int64, Uint32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op

LANE_BYTES = 16
PIECE_BYTES = 32 * LANE_BYTES


@dsl_user_op
def copy_weights(slot: Int32, address: Any, *, loc: Any = None, ip: Any = None) -> None:
    """16 bytes from `address` (a pointer) to shared memory at byte `slot`, past L1."""
    _effect(
        "cp.async.cg.shared.global.L2::256B [$0], [$1], 16;",
        "r,l",
        [slot.ir_value(loc=loc, ip=ip), address.to_llvm_ptr(loc=loc, ip=ip)],
        loc,
        ip,
    )


@dsl_user_op
def copy_shared(
    slot: Int32, address: Any, condition: Int32, *, loc: Any = None, ip: Any = None
) -> None:
    """16 bytes that other warps read too, through L1; nothing where `condition` is 0."""
    _effect(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.ca.shared.global [$0], [$1], 16; }",
        "r,l,r",
        [
            slot.ir_value(loc=loc, ip=ip),
            address.to_llvm_ptr(loc=loc, ip=ip),
            condition.ir_value(loc=loc, ip=ip),
        ],
        loc,
        ip,
    )


@dsl_user_op
def copy_or_zero(
    slot: Int32, address: Int64, nbytes: int, live: Int32, *, loc: Any = None, ip: Any = None
) -> None:
    """8 or 16 bytes from byte `address`; zeros where `live` is 0, and nothing is read."""
    way = "cg" if nbytes == LANE_BYTES else "ca"
    _effect(
        "{ .reg .pred p; .reg .u32 n; setp.ne.s32 p, $2, 0; "
        f"selp.u32 n, {nbytes}, 0, p; cp.async.{way}.shared.global [$0], [$1], {nbytes}, n; }}",
        "r,l,r",
        [value.ir_value(loc=loc, ip=ip) for value in (slot, address, live)],
        loc,
        ip,
    )


@dsl_user_op
def commit(*, loc: Any = None, ip: Any = None) -> None:
    """Close a group: all copies since the last one, possibly none."""
    _effect("cp.async.commit_group;", "", [], loc, ip)


@dsl_user_op
def wait(pending: int, *, loc: Any = None, ip: Any = None) -> None:
    """Until at most `pending` groups are under way."""
    _effect(f"cp.async.wait_group {pending};", "~{memory}", [], loc, ip)


@dsl_user_op
def read(slot: Int32, *, loc: Any = None, ip: Any = None) -> tuple[Uint32, ...]:
    """The 16 bytes at byte `slot` of shared memory."""
    struct = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
    packed = llvm.inline_asm(
        struct,
        [slot.ir_value(loc=loc, ip=ip)],
        "ld.shared.v4.u32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,r",
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )
    return tuple(
        Uint32(llvm.extractvalue(Uint32.mlir_type, packed, [n], loc=loc, ip=ip)) for n in range(4)
    )


@dsl_user_op
def clear(slot: Int32, *, loc: Any = None, ip: Any = None) -> None:
    """16 zero bytes at byte `slot` of shared memory."""
    _effect(
        "{ .reg .u32 z; mov.u32 z, 0; st.shared.v4.u32 [$0], {z, z, z, z}; }",
        "r",
        [slot.ir_value(loc=loc, ip=ip)],
        loc,
        ip,
    )


def _effect(text: str, constraints: str, operands: list[Any], loc: Any, ip: Any) -> None:
    llvm.inline_asm(None, operands, text, constraints, has_side_effects=True, loc=loc, ip=ip)
