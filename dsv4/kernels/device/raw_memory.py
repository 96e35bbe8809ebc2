"""Memory at raw addresses, with offsets that become part of the instruction.

A stack of experts is larger than 2 GiB: its addresses are 64-bit integers, and what is constant
in them is kept apart so that it costs nothing.
"""

from __future__ import annotations

from typing import Any

from cutlass import Int32, Int64, Uint32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op

QUAD = 4  # words of 16 bytes


def _words(text: str, constraints: str, args: list[Any], loc: Any, ip: Any) -> tuple[Uint32, ...]:
    struct = ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>")
    values = [arg.ir_value(loc=loc, ip=ip) for arg in args]
    packed = llvm.inline_asm(
        struct, values, text, constraints, has_side_effects=True, loc=loc, ip=ip
    )
    return tuple(
        Uint32(llvm.extractvalue(Uint32.mlir_type, packed, [n], loc=loc, ip=ip))
        for n in range(QUAD)
    )


def _effect(text: str, constraints: str, args: list[Any], loc: Any, ip: Any) -> None:
    values = [arg.ir_value(loc=loc, ip=ip) for arg in args]
    llvm.inline_asm(None, values, text, constraints, has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def copy_weights(
    slot: Int32, at: int, address: Int64, offset: int, *, loc: Any = None, ip: Any = None
) -> None:
    """16 bytes from `address + offset` to shared memory at byte `slot + at`, past L1."""
    text = f"cp.async.cg.shared.global.L2::256B [$0 + {at}], [$1 + {offset}], 16;"
    _effect(text, "r,l", [slot, address], loc, ip)


@dsl_user_op
def copy_word(slot: Int32, at: int, address: Int64, *, loc: Any = None, ip: Any = None) -> None:
    """4 bytes, the aligned ones that `address` lies in, to shared memory at byte `slot + at`."""
    text = f"{{ .reg .b64 a; and.b64 a, $1, -4; cp.async.ca.shared.global [$0 + {at}], [a], 4; }}"
    _effect(text, "r,l", [slot, address], loc, ip)


@dsl_user_op
def read_shared(slot: Int32, at: int, *, loc: Any = None, ip: Any = None) -> tuple[Uint32, ...]:
    """The 16 bytes at byte `slot + at` of shared memory."""
    text = f"ld.shared.v4.u32 {{$0, $1, $2, $3}}, [$4 + {at}];"
    return _words(text, "=r,=r,=r,=r,r", [slot], loc, ip)


@dsl_user_op
def write_shared(
    slot: Int32, at: int, words: tuple[Uint32, ...], *, loc: Any = None, ip: Any = None
) -> None:
    """16 bytes to byte `slot + at` of shared memory."""
    text = f"st.shared.v4.u32 [$0 + {at}], {{$1, $2, $3, $4}};"
    _effect(text, "r,r,r,r,r", [slot, *words], loc, ip)


@dsl_user_op
def load_if(
    condition: Int32,
    address: Int64,
    offset: int,
    *,
    fresh: bool = False,
    loc: Any = None,
    ip: Any = None,
) -> tuple[Uint32, ...]:
    """The 16 bytes at `address + offset`; zeros, and nothing is read, where `condition` is 0.

    fresh: another multiprocessor may have written them during this launch.
    """
    kind = "ld.relaxed.gpu.global" if fresh else "ld.global"
    text = (
        "{ .reg .pred p; setp.ne.s32 p, $4, 0; "
        "mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0; "
        f"@p {kind}.v4.u32 {{$0, $1, $2, $3}}, [$5 + {offset}]; }}"
    )
    return _words(text, "=&r,=&r,=&r,=&r,r,l", [condition, address], loc, ip)
