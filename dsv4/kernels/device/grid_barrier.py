"""A barrier for all CTAs of a launch that are resident together.

counters: int32 `[2]` in memory, zero before and after: CTAs that came, and CTAs that went on. The
last to go on clears both. What a CTA wrote before it came is seen by those that went on.
"""

from __future__ import annotations

from typing import Any

import cutlass.cute as cute
from cutlass import Int32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op

MOST_POLLS = 1 << 24  # seconds: whoever is still missing then is not coming


@dsl_user_op
def _trap(*, loc: Any = None, ip: Any = None) -> None:
    llvm.inline_asm(None, [], "trap;", "", has_side_effects=True, loc=loc, ip=ip)


@cute.jit
def arrive_and_wait(counters: cute.Tensor, ctas: Int32) -> None:
    """By all threads of a CTA. ctas: of the launch; all must fit on the device at once."""
    thread, _, _ = cute.arch.thread_idx()
    came, went = counters.iterator, counters.iterator + 1
    cute.arch.sync_threads()
    if thread == 0:
        cute.arch.fence_acq_rel_gpu()
        cute.arch.atomic_add(came, Int32(1), sem="release", scope="gpu")
        polls = Int32(0)
        here = cute.arch.load(came, Int32, sem="acquire", scope="gpu")
        while (here < ctas) & (polls < MOST_POLLS):
            here = cute.arch.load(came, Int32, sem="acquire", scope="gpu")
            polls += 1
        if here < ctas:
            _trap()
        before = cute.arch.atomic_add(went, Int32(1), sem="relaxed", scope="gpu")
        if before == ctas - 1:
            cute.arch.store(came, Int32(0), sem="relaxed", scope="gpu")
            cute.arch.store(went, Int32(0), sem="relaxed", scope="gpu")
        cute.arch.fence_acq_rel_gpu()
    cute.arch.sync_threads()
