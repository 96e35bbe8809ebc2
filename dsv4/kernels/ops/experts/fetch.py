"""Experts that a step chose and that lie in host memory, copied into spare records of the GPU.

The records of a layer's experts are found by the table of places, -1 where there is none on the
GPU. Every CTA finds which chosen experts are absent and which spare records they replace, all the
same from the same state, and copies its share of them: 16 bytes a lane, whole lines, because the
bus carries 50 GB/s so and half of that in sectors of 32 bytes (H200). The CTA that is done last
writes the new state; nobody waits for anybody. If nothing is absent, the first CTA notes what was
used and the others are done.

Records that were used least recently are replaced, never one that this launch wants. So experts
that tokens keep choosing stay, and each comes over the bus once.
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, range_constexpr

from dsv4.kernels.device import global_memory
from dsv4.kernels.device.asm import effect
from dsv4.kernels.device.global_memory import Load
from dsv4.kernels.ops.experts.fetch_contract import MAX_SPARE, NEVER

THREADS = 256
MAX_CHOICES = 128  # of all tokens together
LINES = 8  # of 16 bytes that a thread has under way
PIECE = THREADS * LINES * 16
WANTED = -1  # the age of one that must stay
CLOCK, ARRIVED = 0, 1  # in `state`


class Plan:
    """In shared memory: ids of all choices; wanted: which are to be fetched; missing, victims: the
    absent experts and the spare records they go to; ages of the spare records; two words a warp.
    """

    def __init__(self, smem: Any) -> None:
        def table(size: int) -> Any:
            return smem.allocate_tensor(Int32, cute.make_layout(size), 16)

        self.ids, self.wanted = table(MAX_CHOICES), table(MAX_CHOICES)
        self.missing, self.victims = table(MAX_CHOICES), table(MAX_CHOICES)
        self.ages, self.words = table(MAX_SPARE), table(4 * THREADS // 32)


class Fetch:
    """record_nbytes: of a record. experts: of a layer. ctas: of the launch."""

    def __init__(self, record_nbytes: int, experts: int, ctas: int, pdl: bool) -> None:
        if record_nbytes % PIECE:
            raise ValueError(f"records of {record_nbytes} bytes are not whole pieces of {PIECE}")
        self.record_nbytes, self.experts, self.ctas, self.pdl = record_nbytes, experts, ctas, pdl
        self.pieces = record_nbytes // PIECE

    @cute.jit
    def __call__(
        self,
        topk_idx: cute.Tensor,
        table: cute.Tensor,
        cold: cute.Tensor,
        host: cute.Tensor,
        owners: cute.Tensor,
        used: cute.Tensor,
        state: cute.Tensor,
        counts: cute.Tensor,
        fetched: cute.Tensor,
        records: cute.Tensor,
        layer: Int32,
        first_spare: Int32,
        stream: cuda.CUstream,
    ) -> None:
        spare = owners, used, first_spare
        self.kernel(
            topk_idx, table, cold, host, spare, state, counts, fetched, records, layer
        ).launch(grid=[self.ctas, 1, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=self.pdl)

    @cute.kernel
    def kernel(
        self,
        topk_idx: cute.Tensor,
        table: cute.Tensor,
        cold: cute.Tensor,
        host: cute.Tensor,
        spare: Any,
        state: cute.Tensor,
        counts: cute.Tensor,
        fetched: cute.Tensor,
        records: cute.Tensor,
        layer: Int32,
    ) -> None:
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
            cute.arch.griddepcontrol_wait()
        block, _, _ = cute.arch.block_idx()
        plan = Plan(cutlass.memory.SmemAllocator())
        own, place, uses, count = self._choices(plan, topk_idx, table, layer)
        last = Int32(block == 0)
        if count > 0:
            self._choose_victims(plan, spare, state, place, count)
            self._copy(plan, cold, host, records, layer, spare[2], count)
            last = self._is_last(plan, state)
        if last != 0:
            self._note(plan, table, spare, state, counts, fetched, layer, own, place, uses, count)

    @cute.jit
    def _choices(self, plan: Any, topk_idx: Any, table: Any, layer: Int32) -> Any:
        """-> the thread's expert, or -1 where it is not one or an earlier thread has it; where its
        record lies; how often it was chosen; how many experts are absent. These are in `plan`.
        """
        thread, _, _ = cute.arch.thread_idx()
        ids, wanted, missing = plan.ids, plan.wanted, plan.missing
        top_k = topk_idx.shape[1]
        choices = Int32(topk_idx.shape[0]) * top_k
        own, place, uses = Int32(-1), Int32(-1), Int32(0)
        if thread < choices:
            own = topk_idx[thread // top_k, thread % top_k]
            if (own < 0) | (own >= self.experts):
                own = Int32(-1)
            if own >= 0:
                place = table[layer * self.experts + own]
        if thread < MAX_CHOICES:
            ids[thread] = own
        cute.arch.sync_threads()
        first = Int32(own >= 0)
        for other in cutlass.range(choices, unroll=8):
            same = Int32(ids[other] == own)
            uses += same
            if (same != 0) & (other < thread):
                first = Int32(0)
        if first == 0:
            own = Int32(-1)
        absent = Int32((own >= 0) & (place < 0))
        if thread < MAX_CHOICES:
            wanted[thread] = absent
        cute.arch.sync_threads()
        rank, count = Int32(0), Int32(0)
        for other in cutlass.range(choices, unroll=8):
            rank += wanted[other] * Int32(other < thread)
            count += wanted[other]
        if absent != 0:
            missing[rank] = own
        return own, place, uses, count

    @cute.jit
    def _choose_victims(
        self, plan: Any, spare: Any, state: Any, place: Int32, count: Int32
    ) -> None:
        """The `count` spare records whose use is longest ago, the lowest among equal ones."""
        thread, _, _ = cute.arch.thread_idx()
        owners, used, first_spare = spare
        ages, victims, words = plan.ages, plan.victims, plan.words
        records, now = Int32(owners.shape[0]), state[CLOCK]
        for slot in cutlass.range(thread, records, THREADS, unroll=1):
            age = cutlass.max(now - used[slot], 0)
            if owners[slot] < 0:
                age = Int32(NEVER)
            ages[slot] = age
        cute.arch.sync_threads()
        if place >= first_spare:
            ages[place - first_spare] = Int32(WANTED)
        cute.arch.sync_threads()
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        for turn in cutlass.range(count, unroll=1):
            oldest, which = Int32(WANTED), Int32(NEVER)
            for slot in cutlass.range(thread, records, THREADS, unroll=1):
                age = ages[slot]
                if age > oldest:
                    oldest, which = age, slot
            best = cute.arch.warp_redux_sync(oldest, "max")
            lowest = which if oldest == best else Int32(NEVER)
            lowest = cute.arch.warp_redux_sync(lowest, "min")
            if lane == 0:
                words[2 * warp], words[2 * warp + 1] = best, lowest
            cute.arch.sync_threads()
            oldest, which = words[0], words[1]
            for other in range_constexpr(1, THREADS // 32):
                age, slot = words[2 * other], words[2 * other + 1]
                if (age > oldest) | ((age == oldest) & (slot < which)):
                    oldest, which = age, slot
            if oldest == WANTED:
                effect("trap;")  # fewer spare records than a step may want: not an engine's
            if thread == 0:
                victims[turn] = which
                ages[which] = Int32(WANTED)
            cute.arch.sync_threads()

    @cute.jit
    def _copy(
        self,
        plan: Any,
        cold: Any,
        host: Any,
        records: Any,
        layer: Int32,
        first_spare: Int32,
        count: Int32,
    ) -> None:
        """This CTA's pieces of all absent records."""
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        for item in cutlass.range(block, count * self.pieces, self.ctas, unroll=1):
            which, piece = item // self.pieces, item % self.pieces
            row = cold[layer * self.experts + plan.missing[which]]
            offset = Int64(piece * PIECE + thread * 16)
            source = host[0] + Int64(row) * self.record_nbytes + offset
            target = records.iterator.toint() + offset
            target += Int64(first_spare + plan.victims[which]) * self.record_nbytes
            lines = []
            for line in range_constexpr(LINES):
                lines.append(
                    global_memory.load_words(source + line * THREADS * 16, 4, Load.PAST_L1)
                )
            for line in range_constexpr(LINES):
                global_memory.store_words(target + line * THREADS * 16, lines[line])

    @cute.jit
    def _is_last(self, plan: Any, state: Any) -> Int32:
        """Whether all other CTAs have read the state and written their pieces."""
        thread, _, _ = cute.arch.thread_idx()
        words = plan.words
        cute.arch.sync_threads()
        if thread == 0:
            cute.arch.fence_acq_rel_gpu()
            arrived = state.iterator + ARRIVED
            before = cute.arch.atomic_add(arrived, Int32(1), sem="release", scope="gpu")
            cute.arch.fence_acq_rel_gpu()
            words[0] = before
        cute.arch.sync_threads()
        return Int32(words[0] == self.ctas - 1)

    @cute.jit
    def _note(
        self,
        plan: Any,
        table: Any,
        spare: Any,
        state: Any,
        counts: Any,
        fetched: Any,
        layer: Int32,
        own: Int32,
        place: Int32,
        uses: Int32,
        count: Int32,
    ) -> None:
        """The new state."""
        thread, _, _ = cute.arch.thread_idx()
        owners, used, first_spare = spare
        first, now = layer * self.experts, state[CLOCK]
        if own >= 0:
            counts[first + own] = counts[first + own] + uses
            if place >= first_spare:
                used[place - first_spare] = now
        if thread < count:
            slot, expert = plan.victims[thread], first + plan.missing[thread]
            before = owners[slot]
            if before >= 0:
                table[before] = Int32(-1)
            owners[slot], used[slot] = expert, now
            table[expert] = first_spare + slot
        cute.arch.sync_threads()
        if thread == 0:
            state[CLOCK], state[ARRIVED] = now + 1, Int32(0)
            fetched[layer] = fetched[layer] + count
