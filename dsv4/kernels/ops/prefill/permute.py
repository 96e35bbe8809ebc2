"""What surrounds the products: the list of each expert's tokens, arranging, and the last sum."""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint32, range_constexpr

from dsv4.kernels.device import conversions, global_memory, shared_memory
from dsv4.kernels.device.global_memory import Load

ROUTE_THREADS = 1024
THREADS = 256
LINE = 8  # bfloat16 numbers of 16 bytes


class Route:
    """Which tokens visit an expert, for all experts: one CTA each, none waits for another.

    topk_idx: int32 `[T, k]`, not from 0 to E - 1 where an expert is not here; topk_weights: float32
    `[T, k]`. The list has the choices of expert 0 first, then those of 1, …: entries: int32, token
    times k plus choice; targets: int32, token times k plus how many of the token's experts come
    before this one; weights: float32; all three with room for T k or more; offsets: int32
    `[E + 1]`, where an expert's part begins.
    """

    def __init__(self, experts: int, top_k: int) -> None:
        self.experts, self.top_k = experts, top_k

    @cute.jit
    def __call__(
        self,
        topk_idx: cute.Tensor,
        topk_weights: cute.Tensor,
        entries: cute.Tensor,
        targets: cute.Tensor,
        weights: cute.Tensor,
        offsets: cute.Tensor,
        stream: cuda.CUstream,
    ) -> None:
        self.kernel(topk_idx, topk_weights, entries, targets, weights, offsets).launch(
            grid=[self.experts, 1, 1], block=[ROUTE_THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(
        self,
        topk_idx: cute.Tensor,
        topk_weights: cute.Tensor,
        entries: cute.Tensor,
        targets: cute.Tensor,
        weights: cute.Tensor,
        offsets: cute.Tensor,
    ) -> None:
        thread, _, _ = cute.arch.thread_idx()
        expert, _, _ = cute.arch.block_idx()
        total = Int32(topk_idx.shape[0]) * self.top_k
        before, own = Int32(0), Int32(0)
        for at in cutlass.range(thread, total, ROUTE_THREADS, unroll=4):
            found = topk_idx.iterator[at]
            before += Int32(_precedes(found, expert))
            own += Int32(found == expert)
        base, place, count = self._scan(before, own, thread)
        if thread == 0:
            offsets[expert] = base
            if expert == self.experts - 1:
                offsets[self.experts] = base + count
        place += base
        for at in cutlass.range(thread, total, ROUTE_THREADS, unroll=4):
            if topk_idx.iterator[at] == expert:
                token = at // self.top_k
                rank = Int32(0)
                for choice in range_constexpr(self.top_k):
                    other, own_choice = topk_idx[token, choice], at % self.top_k
                    rank += Int32(_precedes(other, expert))
                    rank += Int32(other == expert) * Int32(choice < own_choice)
                entries.iterator[place] = at
                targets.iterator[place] = token * self.top_k + rank
                weights.iterator[place] = topk_weights.iterator[at]
                place += 1

    @cute.jit
    def _scan(self, before: Int32, own: Int32, thread: Int32) -> Any:
        """-> (sum of `before`, sum of `own` of the threads before, sum of `own` of all)."""
        smem = cutlass.memory.SmemAllocator()
        sums = smem.allocate_tensor(Int32, cute.make_layout((2, ROUTE_THREADS // 32)), 16)
        lane, warp = thread % 32, thread // 32
        scanned = own
        for distance in (1, 2, 4, 8, 16):
            other = cute.arch.shuffle_sync_up(scanned, distance, mask_and_clamp=0)
            scanned += other * Int32(lane >= distance)
        for distance in (1, 2, 4, 8, 16):
            before += cute.arch.shuffle_sync_bfly(before, distance)
        if lane == 31:
            sums[0, warp] = before
            sums[1, warp] = scanned
        cute.arch.sync_threads()
        base, place, count = Int32(0), scanned - own, Int32(0)
        for other_warp in range_constexpr(ROUTE_THREADS // 32):
            base += sums[0, other_warp]
            count += sums[1, other_warp]
            place += sums[1, other_warp] * Int32(other_warp < warp)
        return base, place, count


def _precedes(other: Int32, expert: Int32) -> Any:
    """Whether `other` is an expert before `expert`."""
    return (other >= 0) & (other < expert)


class Combine:
    """A token's rows, summed in float32 in ascending order of expert.

    partial: bfloat16 `[T k or more, D]`; topk_idx: int32 `[T, k]`, which says how many rows a token
    has; y: float32 or bfloat16 `[T, D]`.
    """

    def __init__(self, experts: int, hidden: int, top_k: int, out: str) -> None:
        self.experts, self.hidden, self.top_k = experts, hidden, top_k
        self.rounded = out == "bfloat16"

    @cute.jit
    def __call__(
        self, partial: cute.Tensor, topk_idx: cute.Tensor, y: cute.Tensor, stream: cuda.CUstream
    ) -> None:
        self.kernel(partial, topk_idx, y).launch(
            grid=[y.shape[0], -(-self.hidden // (THREADS * LINE)), 1],
            block=[THREADS, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, partial: cute.Tensor, topk_idx: cute.Tensor, y: cute.Tensor) -> None:
        thread, _, _ = cute.arch.thread_idx()
        token, part, _ = cute.arch.block_idx()
        column = (part * THREADS + thread) * LINE
        if column < self.hidden:
            first = partial.iterator.toint() + Int64(token) * (self.top_k * self.hidden * 2)
            rows = [
                global_memory.load_words(
                    first + Int64(column * 2 + i * self.hidden * 2), 4, Load.PLAIN
                )
                for i in range(self.top_k)
            ]
            count = Int32(0)
            for choice in range_constexpr(self.top_k):
                count += Int32(_precedes(topk_idx[token, choice], Int32(self.experts)))
            sums = []
            for i in range_constexpr(LINE):
                total = Float32(0.0)
                for row in range_constexpr(self.top_k):
                    value = (conversions.bf16_low, conversions.bf16_high)[i % 2](rows[row][i // 2])
                    total += value if row < count else Float32(0.0)
                sums.append(total)
            to = y.iterator.toint()
            if cutlass.const_expr(self.rounded):
                words = [conversions.bf16_pair(sums[2 * i], sums[2 * i + 1]) for i in range(4)]
                to += (Int64(token) * self.hidden + Int64(column)) * 2
                global_memory.store_words(to, words)
            else:
                to += (Int64(token) * self.hidden + Int64(column)) * 4
                for half in range_constexpr(2):
                    words = [sums[4 * half + i].bitcast(Uint32) for i in range(4)]
                    global_memory.store_words(to + half * 16, words)


class Arrange:
    """Activations in the order of columns that packed weights are multiplied in.

    The order is that of weight_fragments.py.

    x, arranged: bfloat16 `[M, G, K]`, each 64 columns for themselves.
    """

    def __init__(self, groups: int, k: int) -> None:
        self.cols = groups * k

    @cute.jit
    def __call__(self, x: cute.Tensor, arranged: cute.Tensor, stream: cuda.CUstream) -> None:
        self.kernel(x, arranged).launch(
            grid=[x.shape[0], -(-self.cols // (THREADS * LINE)), 1],
            block=[THREADS, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, x: cute.Tensor, arranged: cute.Tensor) -> None:
        thread, _, _ = cute.arch.thread_idx()
        row, part, _ = cute.arch.block_idx()
        smem = cutlass.memory.SmemAllocator()
        line = smem.allocate_tensor(BFloat16, cute.make_layout(THREADS * LINE), 16)
        at = line.iterator.toint()
        column = (part * THREADS + thread) * LINE
        offset = (Int64(row) * self.cols + Int64(column)) * 2
        if column < self.cols:
            shared_memory.store_words(
                at + thread * 16,
                global_memory.load_words(x.iterator.toint() + offset, 4, Load.PLAIN),
            )
        cute.arch.sync_threads()
        if column < self.cols:
            # Chunk `c` of 64 columns: place 2t + second holds column 16 t + own + 4 second.
            chunk = thread % 8
            own = chunk // 4 * 8 + chunk // 2 % 2 * 2 + chunk % 2
            source = at + thread // 8 * 128 + own * 2
            words = []
            for t in range_constexpr(4):
                low = shared_memory.load_half(source + t * 32)
                words.append(low | (shared_memory.load_half(source + t * 32 + 8) << 16))
            global_memory.store_words(arranged.iterator.toint() + offset, words)
