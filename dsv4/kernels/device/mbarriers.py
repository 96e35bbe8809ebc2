"""Barriers in shared memory that asynchronous copies arrive at.

A barrier takes 8 bytes at a byte address. A phase is complete when all expected threads have
arrived; phases alternate between parity 0 and 1. Who waits sees what was copied.
"""

from __future__ import annotations

from typing import Any

from cutlass import Int32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op


@dsl_user_op
def init(barrier: Int32, arrivals: int, *, loc: Any = None, ip: Any = None) -> None:
    """A barrier for that many arrivals a phase; the CTA meets before it is used."""
    _effect(f"mbarrier.init.shared.b64 [$0], {arrivals};", "r", [barrier], loc, ip)


@dsl_user_op
def arrive_after_copies(barrier: Int32, *, loc: Any = None, ip: Any = None) -> None:
    """This thread's arrival, once all copies that it asked for have come."""
    _effect("cp.async.mbarrier.arrive.noinc.shared.b64 [$0];", "r", [barrier], loc, ip)


@dsl_user_op
def wait(barrier: Int32, parity: Int32, *, loc: Any = None, ip: Any = None) -> None:
    """Until the phase of that parity is complete."""
    text = (
        "{ .reg .pred p; WAIT_${:uid}: "
        "mbarrier.try_wait.parity.shared.b64 p, [$0], $1, 10000000; @!p bra WAIT_${:uid}; }"
    )
    _effect(text, "r,r,~{memory}", [barrier, parity], loc, ip)


def _effect(text: str, constraints: str, values: list[Any], loc: Any, ip: Any) -> None:
    operands = [value.ir_value(loc=loc, ip=ip) for value in values]
    llvm.inline_asm(None, operands, text, constraints, has_side_effects=True, loc=loc, ip=ip)
