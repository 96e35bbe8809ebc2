"""The best `topk` visible blocks of each row, in ascending order: an exact radix select.

Scores become integers of the same order. Three rounds look at 11, 11 and 10 bits: a histogram of
those that agree with what is known of the smallest chosen score, then the digit at which the count
from above reaches `topk`. A round after which nothing is left to decide is the last. Equal scores
at the threshold are taken from the lowest block on.

A CTA holds its scores in shared memory, 16 bytes of a thread at a time; a longer row is shared by a
cluster, whose histograms are added up through distributed shared memory.
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, range_constexpr

from dsv4.kernels.sm90 import memory, ring

WARPS = 32
THREADS = 32 * WARPS
VECTOR = 4  # neighbouring scores of a thread
TURN = THREADS * VECTOR  # scores of a CTA at a time
WARP_TURN = 32 * VECTOR  # neighbouring scores of a warp at a time
TURN_BYTES = TURN * 4
BINS = 2048
ROUNDS = 3
TIE = 4096  # what a score at the threshold counts as; more than `topk` are never above it
ALONE = 8192  # scores up to which one CTA of a cluster does it all


class IndexTopk:
    """ratio: tokens per block; ctas: of a row's cluster; turns: of 4096 scores, in each of them.

    position: int32 `[T]`; scores: float32 `[T, capacity]`, capacity a multiple of 4 and at most
    `4096 ctas turns`; blocks: int32 `[T, topk]`, -1 where a row sees fewer.
    """

    def __init__(self, ratio: int, topk: int, ctas: int, turns: int, pdl: bool) -> None:
        if topk > min(THREADS, TIE - 1):
            raise ValueError(f"{topk} blocks to choose, expected no more than {THREADS}")
        self.ratio, self.topk, self.pdl = ratio, topk, pdl
        self.ctas, self.turns = ctas, turns

    @cute.jit
    def __call__(
        self,
        position: cute.Tensor,
        scores: cute.Tensor,
        blocks: cute.Tensor,
        stream: cuda.CUstream,
    ) -> None:
        self.kernel(position, scores, blocks).launch(
            grid=[self.ctas, position.shape[0], 1],
            block=[THREADS, 1, 1],
            cluster=[self.ctas, 1, 1] if self.ctas > 1 else None,
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def kernel(self, position: cute.Tensor, scores: cute.Tensor, blocks: cute.Tensor) -> None:
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        rank, row, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        smem = cutlass.memory.SmemAllocator()
        keys = smem.allocate(self.turns * TURN_BYTES, 128).toint() + thread * 16
        counts = smem.allocate(ROUNDS * BINS * 4, 128).toint()
        totals = smem.allocate_tensor(Uint32, cute.make_layout(WARPS + 1), 16)
        found = smem.allocate_tensor(Uint32, cute.make_layout(3), 16)
        zero = Uint32(0)
        if thread < ROUNDS * BINS // 8:
            for part in range_constexpr(2):
                place = counts + part * (ROUNDS * BINS * 2) + thread * 16
                memory.store_shared_b128(place, (zero, zero, zero, zero))
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        visible = cutlass.min((position[row] + 1) // self.ratio, scores.shape[1])
        if visible <= self.topk:
            if (rank == 0) & (thread < self.topk):
                blocks[row, thread] = thread if thread < visible else -1
        else:
            active = Int32(self.ctas)
            if cutlass.const_expr(self.ctas > 1):
                active = Int32(1) if visible <= ALONE else active
            if rank < active:
                self._select(
                    scores, blocks, (row, rank, active, visible), keys, counts, totals, found
                )

    @cute.jit
    def _select(
        self,
        scores: Any,
        blocks: Any,
        place: Any,
        keys: Int32,
        counts: Int32,
        totals: Any,
        found: Any,
    ) -> None:
        row, rank, active, visible = place
        turns = (visible + active * TURN - 1) // (active * TURN)
        warp = cute.arch.warp_idx()
        first = (rank * WARPS + warp) * (turns * WARP_TURN) + cute.arch.lane_idx() * VECTOR
        self._load(scores, row, visible, first, turns, keys)
        cute.arch.sync_threads()
        prefix, wanted, done = Uint32(0), Uint32(self.topk), Int32(0)
        known, below = Uint32(0), Uint32(21)
        for index in cutlass.range(ROUNDS, unroll=1):
            if done == 0:
                at = counts + index * BINS * 4
                self._count(keys, turns, prefix, known, below, at)
                self._barrier(active)
                self._find(at, wanted, active, totals, found)
                prefix = prefix | (found[0] << below)
                wanted = found[1]
                if found[2] == 1:
                    # All that share the prefix are chosen: as if above a threshold just below.
                    done, prefix, wanted = Int32(1), prefix - 1, Uint32(0)
                known = known | (Uint32(BINS - 1) << below)
                below = Uint32(10) if index == 0 else Uint32(0)
        self._write(keys, turns, first, (prefix, wanted), blocks, (row, rank, active), totals)

    @cute.jit
    def _barrier(self, active: Int32) -> None:
        """Of the CTAs that share the row."""
        if cutlass.const_expr(self.ctas == 1):
            cute.arch.sync_threads()
        else:
            if active > 1:
                cute.arch.cluster_arrive()
                cute.arch.cluster_wait()
            else:
                cute.arch.sync_threads()

    @cute.jit
    def _load(
        self, scores: Any, row: Int32, visible: Int32, first: Int32, turns: Int32, keys: Int32
    ) -> None:
        """The thread's scores as integers of their order; 0, below all, beyond the visible."""
        start = (scores.iterator + Int64(row) * scores.shape[1]).toint()
        for turn in cutlass.range(turns, unroll=1):
            at = first + turn * WARP_TURN
            address = start + Int64(cutlass.min(at, visible - 1)) // VECTOR * 16
            memory.copy_b128_or_zero(keys + turn * TURN_BYTES, address, Int32(at < visible))
        ring.commit()
        ring.wait(0)
        for turn in cutlass.range(turns, unroll=1):
            loaded = memory.load_shared_b128(keys + turn * TURN_BYTES)
            ordered = []
            for i in range_constexpr(VECTOR):
                bits = loaded[i]
                bits = Uint32(0) if bits == Uint32(0x80000000) else bits  # -0 equals 0
                sign = Uint32(Int32(bits) >> 31)
                present = first + turn * WARP_TURN + i < visible
                ordered.append(bits ^ (sign | Uint32(0x80000000)) if present else Uint32(0))
            memory.store_shared_b128(keys + turn * TURN_BYTES, ordered)

    @cute.jit
    def _count(
        self, keys: Int32, turns: Int32, prefix: Uint32, known: Uint32, below: Uint32, at: Int32
    ) -> None:
        """Histogram of the digit above bit `below`, of keys that have the `known` bits of prefix.

        The last round's digit has a bit of the one before, which is the same for all of them.
        """
        for turn in cutlass.range(turns, unroll=1):
            loaded = memory.load_shared_b128(keys + turn * TURN_BYTES)
            for i in range_constexpr(VECTOR):
                if ((loaded[i] ^ prefix) & known) == 0:
                    digit = (loaded[i] >> below) & Uint32(BINS - 1)
                    memory.count_shared(at + Int32(digit) * 4)

    @cute.jit
    def _find(
        self,
        at: Int32,
        wanted: Uint32,
        active: Int32,
        totals: Any,
        found: Any,
    ) -> None:
        """-> found: the digit that the last wanted key has, how many of its keys are wanted, and
        whether that is all of them."""
        thread, _, _ = cute.arch.thread_idx()
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        each = BINS // THREADS
        own = []
        for i in range_constexpr(each):
            digit = BINS - 1 - (thread * each + i)
            own.append(self._sum(at + digit * 4, active))
        count = own[0]
        for i in range_constexpr(1, each):
            count += own[i]
        upto = _warp_scan(count, lane)
        if lane == 31:
            totals[warp] = upto
        cute.arch.sync_threads()
        before = _before(totals, warp, lane) + upto - count
        for i in range_constexpr(each):
            if (before < wanted) & (wanted <= before + own[i]):
                found[0] = Uint32(BINS - 1 - (thread * each + i))
                found[1] = wanted - before
                found[2] = Uint32(1) if wanted - before == own[i] else Uint32(0)
            before += own[i]
        cute.arch.sync_threads()

    @cute.jit
    def _sum(self, address: Int32, active: Int32) -> Uint32:
        """A word of shared memory, over the CTAs that share the row."""
        value = Uint32(0)
        if cutlass.const_expr(self.ctas == 1):
            value = memory.load_shared_b32(address)
        else:
            if active == 1:
                value = memory.load_shared_b32(address)
            else:
                for rank in range_constexpr(self.ctas):
                    value += memory.load_cluster_b32(address, Int32(rank))
        return value

    @cute.jit
    def _write(
        self,
        keys: Int32,
        turns: Int32,
        first: Int32,
        threshold: Any,
        blocks: Any,
        place: Any,
        totals: Any,
    ) -> None:
        """Chosen: above the threshold, and the first `ties` at it. Counts of both share a word."""
        limit, ties = threshold
        row, rank, active = place
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        count = Uint32(0)
        for turn in cutlass.range(turns, unroll=1):
            for key in memory.load_shared_b128(keys + turn * TURN_BYTES):
                count += _mark(key, limit)
        count = cute.arch.warp_reduction_sum(count)
        if lane == 0:
            totals[warp] = count
        cute.arch.sync_threads()
        before = _before(totals, warp, lane)
        if cutlass.const_expr(self.ctas > 1):
            before += self._before_cta(totals, warp, lane, rank, active)
        for turn in cutlass.range(turns, unroll=1):
            loaded = memory.load_shared_b128(keys + turn * TURN_BYTES)
            marks = [_mark(loaded[i], limit) for i in range(VECTOR)]
            count = marks[0] + marks[1] + marks[2] + marks[3]
            upto = _warp_scan(count, lane)
            own = before + upto - count
            before += cute.arch.shuffle_sync(upto, 31)
            for i in range_constexpr(VECTOR):
                above, equal = own & Uint32(TIE - 1), own // TIE
                if (marks[i] == 1) | ((marks[i] > 1) & (equal < ties)):
                    target = above + cutlass.min(equal, ties)
                    blocks[row, Int32(target)] = first + turn * WARP_TURN + i
                own += marks[i]

    @cute.jit
    def _before_cta(
        self, totals: Any, warp: Int32, lane: Int32, rank: Int32, active: Int32
    ) -> Uint32:
        """What the CTAs of lower rank counted."""
        before = Uint32(0)
        if active > 1:
            before = self._gather(totals, warp, lane, rank)
        return before

    @cute.jit
    def _gather(self, totals: Any, warp: Int32, lane: Int32, rank: Int32) -> Uint32:
        if warp == 0:
            whole = cute.arch.warp_reduction_sum(totals[lane])
            if lane == 0:
                totals[WARPS] = whole
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        address = (totals.iterator + WARPS).toint()
        before = Uint32(0)
        for other in range_constexpr(self.ctas - 1):
            value = memory.load_cluster_b32(address, Int32(other))
            before += value if other < rank else Uint32(0)
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()  # nobody leaves while others read
        return before


@cute.jit
def _mark(key: Uint32, limit: Uint32) -> Uint32:
    """1 above the limit, TIE at it."""
    above = Uint32(1) if key > limit else Uint32(0)
    return Uint32(TIE) if key == limit else above


@cute.jit
def _warp_scan(value: Uint32, lane: Int32) -> Uint32:
    """Sum over the lanes up to this one."""
    for stage in range_constexpr(5):
        lower = cute.arch.shuffle_sync_up(value, offset=1 << stage)
        value += lower if lane >= 1 << stage else Uint32(0)
    return value


@cute.jit
def _before(totals: Any, warp: Int32, lane: Int32) -> Uint32:
    """Sum of the totals of the warps before this one."""
    own = totals[lane] if lane < warp else Uint32(0)
    return cute.arch.warp_reduction_sum(own)
