"""Radix selection by one CTA: histograms in shared memory, and the ranks of what is chosen."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32, range_constexpr

from dsv4.kernels.device import shared_memory

WARPS = 16
THREADS = 32 * WARPS
BINS = 2048
EACH = BINS // THREADS  # bins of a thread
KEYS = 4  # that a thread reads at once
TURN_BYTES = 32 * KEYS * 4  # between a warp's keys
TIE = 4096  # what a key at the threshold counts as; fewer than this are ever above it


class Digit(NamedTuple):
    """value: the digit that the last wanted key has; left: how many of its keys are wanted; exact:
    1 if that is all of them.
    """

    value: Uint32
    left: Uint32
    exact: Uint32


class Threshold(NamedTuple):
    """The last wanted key, and how many equal to it are wanted."""

    limit: Uint32
    ties: Uint32


class Selection:
    """What a CTA shares. rounds: histograms, each used once; keys: that are chosen from at once;
    ids: of those that are moved together, which item each was.
    """

    def __init__(self, smem: Any, rounds: int, keys: int, ids: int) -> None:
        self.rounds = rounds
        self.keys = smem.allocate(keys * 4, 128).toint()
        self.ids = smem.allocate(ids * 4, 128).toint()
        self.counts = smem.allocate(rounds * BINS * 4, 128).toint()
        self.totals = smem.allocate_tensor(Uint32, cute.make_layout(WARPS), 16)
        self.found = smem.allocate_tensor(Uint32, cute.make_layout(4), 16)  # read as a vector

    @cute.jit
    def clear(self) -> None:
        """Zero the histograms; a barrier has to follow."""
        thread, _, _ = cute.arch.thread_idx()
        zero = Uint32(0)
        for index in range_constexpr(self.rounds):
            place = self.counts + index * (BINS * 4) + thread * (EACH * 4)
            shared_memory.store_words(place, (zero, zero, zero, zero))

    @cute.jit
    def count(self, keys: Any, prefix: Uint32, known: Uint32, below: Uint32, index: Int32) -> None:
        """Count the digits above bit `below`, of keys that have the `known` bits of `prefix`."""
        for key in keys:
            if ((key ^ prefix) & known) == 0:
                digit = Int32((key >> below) & Uint32(BINS - 1))
                shared_memory.count(self.counts + (index * BINS + digit) * 4)

    @cute.jit
    def find(self, wanted: Uint32, index: Int32) -> Digit:
        """The digit of the last of `wanted` keys in histogram `index`."""
        thread, _, _ = cute.arch.thread_idx()
        cute.arch.sync_threads()
        digit = BINS - EACH * (thread + 1)
        own = shared_memory.load_words(self.counts + (index * BINS + digit) * 4, 4)
        count = own[0] + own[1] + own[2] + own[3]
        upto = warp_scan(count)
        before, _ = self.before(cute.arch.shuffle_sync(upto, 31))
        before += upto - count
        found = self.found
        for i in range_constexpr(EACH):
            here = own[EACH - 1 - i]
            if (before < wanted) & (wanted <= before + here):
                found[0] = Uint32(digit + EACH - 1 - i)
                found[1] = wanted - before
                found[2] = Uint32(wanted - before == here)
            before += here
        cute.arch.sync_threads()
        return Digit(found[0], found[1], found[2])

    @cute.jit
    def threshold(
        self, own: Int32, turns: Int32, wanted: cutlass.Constexpr, first: cutlass.Constexpr
    ) -> Threshold:
        """Of the CTA's keys, the last of the `wanted` largest.

        own: where the thread's keys start in shared memory, four of each of its warp's `turns`;
        first: number of the first histogram. The digit of the last round has a bit of the one
        before, the same in all keys that count.
        """
        prefix, left, done = Uint32(0), Uint32(wanted), Int32(0)
        known, below = Uint32(0), Uint32(21)
        for index in cutlass.range(3, unroll=1):
            if done == 0:
                for turn in cutlass.range(turns, unroll=1):
                    keys = shared_memory.load_words(own + turn * TURN_BYTES, 4)
                    self.count(keys, prefix, known, below, first + index)
                digit, left, exact = self.find(left, first + index)
                prefix = prefix | (digit << below)
                if exact == 1:
                    # All that share the prefix are wanted: as if above a key just below.
                    done, prefix, left = Int32(1), prefix - 1, Uint32(0)
                known = known | (Uint32(BINS - 1) << below)
                below = Uint32(10) if index == 0 else Uint32(0)
        return Threshold(prefix, left)

    @cute.jit
    def before(self, own: Uint32) -> tuple[Uint32, Uint32]:
        """-> sum of the warps' numbers before this warp's, and of all."""
        lane, warp, totals = cute.arch.lane_idx(), cute.arch.warp_idx(), self.totals
        if lane == 0:
            totals[warp] = own
        cute.arch.sync_threads()
        total = totals[lane] if lane < WARPS else Uint32(0)
        lower = total if lane < warp else Uint32(0)
        return cute.arch.warp_redux_sync(lower, "add"), cute.arch.warp_redux_sync(total, "add")


@cute.jit
def ranks(marks: Any, before: Uint32) -> tuple[list[Uint32], Uint32]:
    """-> sums of the marks before each of the thread's, and of all up to the warp's last."""
    count = marks[0]
    for i in range_constexpr(1, KEYS):
        count += marks[i]
    upto = warp_scan(count)
    at = [before + upto - count]
    for i in range_constexpr(KEYS - 1):
        at.append(at[i] + marks[i])
    return at, before + cute.arch.shuffle_sync(upto, 31)


@cute.jit
def mark(key: Uint32, limit: Uint32) -> Uint32:
    """1 above the limit, TIE at it: counts of both are summed in one word."""
    above = Uint32(key > limit)
    return Uint32(TIE) if key == limit else above


def parts(marks: Uint32) -> tuple[Uint32, Uint32]:
    """-> how many were above, how many at the limit."""
    return marks & Uint32(TIE - 1), marks // TIE


@cute.jit
def warp_scan(value: Uint32) -> Uint32:
    """Sum over the lanes up to this one."""
    lane = cute.arch.lane_idx()
    for stage in range_constexpr(5):
        lower = cute.arch.shuffle_sync_up(value, offset=1 << stage)
        value += lower if lane >= 1 << stage else Uint32(0)
    return value
