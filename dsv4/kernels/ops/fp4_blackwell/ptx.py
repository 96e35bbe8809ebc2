"""Blackwell instructions that the DSL has no name for, each one PTX instruction."""

from __future__ import annotations

from typing import Any

from cutlass import Float32, Int32, Uint32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from dsv4.kernels.device.ptx import _asm


@dsl_user_op
def copy_bulk(
    target: Any, source: Any, nbytes: int, barrier: Any, *, loc: Any = None, ip: Any = None
) -> None:
    """`nbytes` (a multiple of 16) of global memory to shared memory, counted by `barrier`.

    To be run by one thread. All three places are pointers.
    """
    operands = [
        target.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip),
        source.to_llvm_ptr(loc=loc, ip=ip),
        Int32(nbytes).ir_value(loc=loc, ip=ip),
        barrier.toint(loc=loc, ip=ip).ir_value(loc=loc, ip=ip),
    ]
    text = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];"
    _effect(text, "r,l,r,r", operands, loc, ip)


@dsl_user_op
def before_thread_sync(*, loc: Any = None, ip: Any = None) -> None:
    """Tensor-memory operations of this thread come before what a barrier makes others do."""
    _effect("tcgen05.fence::before_thread_sync;", "~{memory}", [], loc, ip)


@dsl_user_op
def after_thread_sync(*, loc: Any = None, ip: Any = None) -> None:
    """Tensor-memory operations of this thread come after what a barrier made it wait for."""
    _effect("tcgen05.fence::after_thread_sync;", "~{memory}", [], loc, ip)


@dsl_user_op
def bf16_pair(low: Float32, high: Float32, *, loc: Any = None, ip: Any = None) -> Uint32:
    """Both rounded to bfloat16, the first in the lower half."""
    return Uint32(_asm(T.i32(), "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], loc, ip))


def _effect(text: str, constraints: str, operands: Any, loc: Any, ip: Any) -> None:
    llvm.inline_asm(None, operands, text, constraints, has_side_effects=True, loc=loc, ip=ip)
