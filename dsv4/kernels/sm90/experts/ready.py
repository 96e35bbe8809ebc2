"""Which experts' activations are complete, among the CTAs of a launch, all of them resident.

counters: int32 `[66]` in memory, zero before and after: of each chosen expert the units that are
done, of the shared expert, and the CTAs that have ended. The last to end clears them. What a CTA
wrote before it counted a unit is seen by a warp that saw the count.
"""

from __future__ import annotations

from typing import Any

import cutlass.cute as cute
from cutlass import Boolean, Int32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op

from dsv4.kernels.sm90.experts.chosen import MAX_CHOICES

SHARED = MAX_CHOICES
_ENDED = SHARED + 1
COUNTERS = _ENDED + 1
MOST_POLLS = 1 << 22  # seconds: whoever is still missing then is not coming


@dsl_user_op
def _trap(*, loc: Any = None, ip: Any = None) -> None:
    llvm.inline_asm(None, [], "trap;", "", has_side_effects=True, loc=loc, ip=ip)


@cute.jit
def done(counters: cute.Tensor, place: Int32) -> None:
    """By one thread, behind a barrier of its CTA: a unit more of `place`."""
    cute.arch.fence_acq_rel_gpu()
    cute.arch.atomic_add(counters.iterator + place, Int32(1), sem="release", scope="gpu")


@cute.jit
def wait_for(counters: cute.Tensor, expert: Int32, count: Int32, units: int) -> Int32:
    """By a warp: until `expert` is complete -> how many of the first ones are."""
    ready, polls = Int32(0), Int32(0)
    while (ready <= expert) & (polls < MOST_POLLS):
        ready = _complete(counters, count, units)
        polls += 1
    if ready <= expert:
        _trap()
    return ready


@cute.jit
def _complete(counters: cute.Tensor, count: Int32, units: int) -> Int32:
    lane = cute.arch.lane_idx()
    low = _load(counters, lane) < units
    high = _load(counters, lane + 32) < units
    lows = cute.arch.vote_ballot_sync(Boolean(low & (lane < count)))
    highs = cute.arch.vote_ballot_sync(Boolean(high & (lane + 32 < count)))
    cute.arch.sync_warp()
    ready = count
    if highs != 0:
        ready = 32 + _first(highs)
    if lows != 0:
        ready = _first(lows)
    return ready


@cute.jit
def wait_for_shared(counters: cute.Tensor, units: int) -> None:
    """By a warp: until the shared expert is complete."""
    polls = Int32(0)
    here = _load(counters, Int32(SHARED))
    while (here < units) & (polls < MOST_POLLS):
        here = _load(counters, Int32(SHARED))
        polls += 1
    if here < units:
        _trap()
    cute.arch.sync_warp()


@cute.jit
def end(counters: cute.Tensor, ctas: Int32) -> None:
    """By all threads of a CTA that does not look at the counters any more."""
    thread, _, _ = cute.arch.thread_idx()
    cute.arch.sync_threads()
    if thread == 0:
        ended = counters.iterator + _ENDED
        before = cute.arch.atomic_add(ended, Int32(1), sem="relaxed", scope="gpu")
        if before == ctas - 1:
            for place in range(COUNTERS):
                counters[place] = Int32(0)


@cute.jit
def _load(counters: cute.Tensor, place: Int32) -> Int32:
    return cute.arch.load(counters.iterator + place, Int32, sem="acquire", scope="gpu")


def _first(mask: Int32) -> Int32:
    """The lowest bit that is set."""
    return cute.arch.popc(~mask & (mask - 1))
