"""Words that say themselves whether they have arrived: how CTAs of one launch meet without a fence.

A mailbox is global memory full of zero words. A writer puts float32 values into it, +0 as -0; a
reader asks for each word until it is not zero, and puts the zero back. A value is its own flag, so
one trip through the L2 cache takes both; a counter beside it would need a fence and a second trip.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Float32, Int32, Uint32, cute, range_constexpr
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from dsv4.kernels.device import words

PATIENCE = 1 << 20  # rounds of asking before a reader gives up: a wrong result, not a hung GPU


@dsl_user_op
def send(address: Any, value: Float32, *, loc: Any = None, ip: Any = None) -> None:
    """Put `value` into the word at `address` (a pointer)."""
    llvm.inline_asm(
        None,
        [address.to_llvm_ptr(loc=loc, ip=ip), value.ir_value(loc=loc, ip=ip)],
        "{ .reg .pred p; .reg .b32 w; mov.b32 w, $1; setp.eq.u32 p, w, 0; "
        "selp.b32 w, 0x80000000, w, p; st.relaxed.gpu.global.b32 [$0], w; }",
        "l,f",
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )


@dsl_user_op
def ask(word: Uint32, address: Any, *, loc: Any = None, ip: Any = None) -> Uint32:
    """`word` if it is not zero, else what is at `address` (a pointer) now."""
    result = llvm.inline_asm(
        T.i32(),
        [word.ir_value(loc=loc, ip=ip), address.to_llvm_ptr(loc=loc, ip=ip)],
        "{ .reg .pred p; setp.eq.u32 p, $1, 0; mov.b32 $0, $1; "
        "@p ld.relaxed.gpu.global.b32 $0, [$2]; }",
        "=&r,r,l",
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )
    return Uint32(result)


@dsl_user_op
def clear(address: Any, *, loc: Any = None, ip: Any = None) -> None:
    """Empty the word at `address` (a pointer) for the next launch."""
    llvm.inline_asm(
        None,
        [address.to_llvm_ptr(loc=loc, ip=ip)],
        "{ .reg .b32 z; mov.b32 z, 0; st.relaxed.gpu.global.b32 [$0], z; }",
        "l",
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )


@cute.jit
def receive(box: Any, count: cutlass.Constexpr, stride: cutlass.Constexpr) -> Float32:
    """Wait for the `count` words from `box` (a pointer) on, empty them; -> their sum in order."""
    found = cute.make_rmem_tensor(count, Uint32)
    found.fill(0)
    least, rounds = Uint32(0), Int32(0)
    while (least == 0) & (rounds < PATIENCE):
        for n in range_constexpr(count):
            found[n] = ask(found[n], box + n * stride)
        least = found[0]
        for n in range_constexpr(1, count):
            least = cutlass.min(least, found[n])
        rounds += 1
    total = Float32(0.0)
    for n in range_constexpr(count):
        clear(box + n * stride)
        total += words.as_float(found[n])
    return total
