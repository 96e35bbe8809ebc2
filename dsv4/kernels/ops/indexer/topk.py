"""The best `topk` visible blocks of each row, in ascending order: an exact radix select.

Scores become integers of the same order. Rounds look at 11 bits at a time: a histogram of those
that agree with what is known of the smallest chosen score, then the digit at which the count from
above reaches `topk`. A round after which nothing is left to decide is the last. Equal scores at the
threshold are taken from the lowest block on.

Of many scores most are dropped first: each thread's largest of a few, `topk` of which are a bound
that as many scores reach; what reaches it moves closer together, in order. Long rows are cut into
parts, one for a CTA, and what is chosen of each is chosen from again.
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, range_constexpr

from dsv4.kernels.device import async_copies
from dsv4.kernels.ops.indexer import selection
from dsv4.kernels.ops.indexer.selection import BINS, THREADS, Selection

VECTOR = 4  # neighbouring scores of a thread
WARP_TURN = 32 * VECTOR  # neighbouring scores of a warp
TURN = THREADS * VECTOR  # scores of a CTA at a time
MOST_TURNS = 8
LIST = 2 * TURN  # scores that are chosen from without dropping any first
BOUND_ROUNDS = 2
ROUNDS = 3


class IndexTopk:
    """ratio: tokens per block; turns: of 2048 scores that a CTA takes at most; part: scores of one.

    stage "whole": of scores float32 `[T, capacity]`, a multiple of 4, into blocks int32
    `[T, topk]`, -1 where a row sees fewer. "parts": of each `part` scores into part_scores and
    part_blocks `[T, parts · topk]`; "merge": of those into blocks. position: int32 `[T]`.
    """

    def __init__(self, ratio: int, topk: int, stage: str, turns: int, part: int, pdl: bool) -> None:
        most = MOST_TURNS * TURN
        if topk > 2 * THREADS or turns > MOST_TURNS or (stage == "parts" and part > turns * TURN):
            raise ValueError(f"{topk} of {turns * TURN} scores, expected at most 1024 of {most}")
        self.part = part
        self.ratio, self.topk, self.stage, self.turns, self.pdl = ratio, topk, stage, turns, pdl
        self.groups = 2 * topk // THREADS  # of a thread's scores, whose largest make the bound

    @cute.jit
    def __call__(self, position: cute.Tensor, operands: Any, stream: cuda.CUstream) -> None:
        parts = 1
        if cutlass.const_expr(self.stage == "parts"):
            parts = operands[1].shape[1] // self.topk
        self.kernel(position, operands).launch(
            grid=[parts, position.shape[0], 1],
            block=[THREADS, 1, 1],
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def kernel(self, position: cute.Tensor, operands: Any) -> None:
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        part, row, _ = cute.arch.block_idx()
        smem = cutlass.memory.SmemAllocator()
        keys = smem.allocate(max(self.turns * TURN, LIST) * 4, 128).toint()
        ids = smem.allocate(LIST * 4, 128).toint()
        select = Selection(smem, BOUND_ROUNDS + ROUNDS)
        select.clear()
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        at = async_copies.load_b32((position.iterator + row).toint())
        own = cute.make_rmem_tensor((VECTOR, self.turns), Uint32)
        source = operands[0]
        if cutlass.const_expr(self.turns == 1):
            self._load(source, row, source.shape[1], Int32(0), Int32(1), own)
        visible = (Int32(at) + 1) // self.ratio
        count, start = self._items(visible, part, operands), part * self.part
        thread, _, _ = cute.arch.thread_idx()
        if visible <= self.topk:
            if cutlass.const_expr(self.stage != "parts"):
                for turn in range_constexpr(self.topk // THREADS):
                    item = turn * THREADS + thread
                    operands[-1][row, item] = item if item < visible else -1
        else:
            if count > self.topk:
                turns = (count + TURN - 1) // TURN
                if cutlass.const_expr(self.turns > 1):
                    self._load(source, row, count, start, turns, own)
                else:
                    self._hide(own, count)
                self._select(operands, (row, part, count), own, turns, keys, ids, select)
            elif count > 0:
                self._take_all(operands, row, part, count)

    def _items(self, visible: Int32, part: Int32, operands: Any) -> Int32:
        """How many scores the CTA has to choose from."""
        if self.stage == "whole":
            return cutlass.min(visible, operands[0].shape[1])
        if self.stage == "parts":
            visible = cutlass.min(visible, operands[0].shape[1])
            return cutlass.min(visible - part * self.part, self.part)
        parts = operands[0].shape[1] // self.topk
        return cutlass.min((visible + self.part - 1) // self.part, parts) * self.topk

    @cute.jit
    def _take_all(self, operands: Any, row: Int32, part: Int32, count: Int32) -> None:
        """Of a last part with no more than `topk` scores; what was chosen of the only part."""
        thread, _, _ = cute.arch.thread_idx()
        if cutlass.const_expr(self.stage == "merge"):
            for turn in range_constexpr(self.topk // THREADS):
                item = turn * THREADS + thread
                operands[2][row, item] = operands[1][row, item]
        if cutlass.const_expr(self.stage == "parts"):
            scores, part_scores, part_blocks = operands
            for turn in range_constexpr(self.topk // THREADS):
                item = turn * THREADS + thread
                target, block = part * self.topk + item, part * self.part + item
                present = item < count
                part_blocks[row, target] = block if present else -1
                score = Float32(-float("inf"))
                if present:
                    score = scores[row, block]
                part_scores[row, target] = score

    def _first(self, turns: Int32) -> Int32:
        """Of the thread's items: a warp has as many turns of neighbouring ones."""
        return cute.arch.warp_idx() * (turns * WARP_TURN) + cute.arch.lane_idx() * VECTOR

    @cute.jit
    def _load(
        self, scores: Any, row: Int32, count: Int32, start: Int32, turns: Int32, own: cute.Tensor
    ) -> None:
        """The thread's scores as integers of their order; 0, below all, beyond the last."""
        first = self._first(turns)
        at = (scores.iterator + Int64(row) * scores.shape[1] + start).toint()
        loaded = []
        for turn in range_constexpr(self.turns):
            item = first + turn * WARP_TURN
            present = Int32((turn < turns) & (item < count))
            loaded.append(async_copies.load_f32x4_if(present, at + Int64(item) * 4))
        for turn in range_constexpr(self.turns):
            for i in range_constexpr(VECTOR):
                bits = loaded[turn][i].bitcast(Uint32)
                bits = Uint32(0) if bits == Uint32(0x80000000) else bits  # -0 equals 0
                sign = Uint32(Int32(bits) >> 31)
                present = (turn < turns) & (first + turn * WARP_TURN + i < count)
                own[i, turn] = bits ^ (sign | Uint32(0x80000000)) if present else Uint32(0)

    @cute.jit
    def _hide(self, own: cute.Tensor, count: Int32) -> None:
        """Put what lies beyond `count`, loaded before that was known, below all."""
        first = self._first(Int32(1))
        for i in range_constexpr(VECTOR):
            own[i, 0] = own[i, 0] if first + i < count else Uint32(0)

    @cute.jit
    def _select(
        self,
        operands: Any,
        place: Any,
        own: cute.Tensor,
        turns: Int32,
        keys: Int32,
        ids: Int32,
        select: cutlass.Constexpr,
    ) -> None:
        row, part, count = place
        first = self._first(turns)
        listed = Int32(0)
        if cutlass.const_expr(self.turns * TURN > LIST):
            listed = self._drop(own, turns, first, keys, ids, select)
        if listed == 0:
            for turn in range_constexpr(self.turns):
                if turn < turns:
                    words = tuple(own[i, turn] for i in range(VECTOR))
                    async_copies.store_shared_b128(keys + (first + turn * WARP_TURN) * 4, words)
        else:
            turns = (listed + TURN - 1) // TURN
            first = self._first(turns)
        cute.arch.sync_threads()
        last = select.threshold(keys + first * 4, turns, self.topk, BOUND_ROUNDS)
        self._write(operands, (row, part, count), keys, ids, listed, turns, last, select)

    @cute.jit
    def _drop(
        self,
        own: cute.Tensor,
        turns: Int32,
        first: Int32,
        keys: Int32,
        ids: Int32,
        select: cutlass.Constexpr,
    ) -> Int32:
        """Of many scores, keep those that may be chosen; -> how many, or 0 for all of them."""
        listed = Int32(0)
        if turns * TURN > LIST:
            bound = self._bound(own, select)
            listed = self._gather(own, turns, first, bound, keys, ids, select)
        return listed

    @cute.jit
    def _bound(self, own: cute.Tensor, select: cutlass.Constexpr) -> Uint32:
        """A key that at least `topk` of the CTA's reach, and not many more."""
        largest = []
        for group in range_constexpr(self.groups):
            most = Uint32(0)
            for turn in range_constexpr(group, self.turns, self.groups):
                for i in range_constexpr(VECTOR):
                    most = cutlass.max(most, own[i, turn])
            largest.append(most)
        prefix, wanted, known, below = Uint32(0), Uint32(self.topk), Uint32(0), Uint32(21)
        cute.arch.sync_threads()
        for index in range_constexpr(BOUND_ROUNDS):
            select.count(largest, prefix, known, below, Int32(index))
            digit, wanted, _ = select.find(wanted, Int32(index))
            prefix = prefix | (digit << below)
            known, below = known | (Uint32(BINS - 1) << below), below - 11
        return prefix

    @cute.jit
    def _gather(
        self,
        own: cute.Tensor,
        turns: Int32,
        first: Int32,
        bound: Uint32,
        keys: Int32,
        ids: Int32,
        select: cutlass.Constexpr,
    ) -> Int32:
        """Move the keys that reach the bound, and their items, together; -> their number.

        0 where they do not fit, and none is moved.
        """
        thread, _, _ = cute.arch.thread_idx()
        count = Uint32(0)
        for turn in range_constexpr(self.turns):
            for i in range_constexpr(VECTOR):
                count += Uint32(own[i, turn] >= bound)
        for part in range_constexpr(LIST // TURN):
            place = keys + (part * TURN + thread * VECTOR) * 4
            async_copies.store_shared_b128(place, (Uint32(0), Uint32(0), Uint32(0), Uint32(0)))
        before, whole = select.before(cute.arch.warp_redux_sync(count, "add"))
        fits = Int32(whole) if whole <= LIST else Int32(0)
        if fits > 0:
            for turn in range_constexpr(self.turns):
                if turn < turns:
                    marks = [Uint32(own[i, turn] >= bound) for i in range(VECTOR)]
                    at, before = selection.ranks(marks, before)
                    for i in range_constexpr(VECTOR):
                        if marks[i] == 1:
                            async_copies.store_shared_b32(keys + Int32(at[i]) * 4, own[i, turn])
                            item = first + turn * WARP_TURN + i
                            async_copies.store_shared_b32(ids + Int32(at[i]) * 4, Uint32(item))
        return fits

    @cute.jit
    def _write(
        self,
        operands: Any,
        place: Any,
        keys: Int32,
        ids: Int32,
        listed: Int32,
        turns: Int32,
        last: Any,
        select: cutlass.Constexpr,
    ) -> None:
        """Chosen: above the last, and the first `ties` at it."""
        row, part, _ = place
        limit, ties = last
        first = self._first(turns)
        own = keys + first * 4
        count = Uint32(0)
        for turn in cutlass.range(turns, unroll=1):
            for key in async_copies.load_shared_b128(own + turn * (WARP_TURN * 4)):
                count += selection.mark(key, limit)
        before, _ = select.before(cute.arch.warp_redux_sync(count, "add"))
        for turn in cutlass.range(turns, unroll=1):
            loaded = async_copies.load_shared_b128(own + turn * (WARP_TURN * 4))
            marks = [selection.mark(loaded[i], limit) for i in range(VECTOR)]
            at, before = selection.ranks(marks, before)
            for i in range_constexpr(VECTOR):
                above, equal = selection.parts(at[i])
                if (marks[i] == 1) | ((marks[i] > 1) & (equal < ties)):
                    item = first + turn * WARP_TURN + i
                    if listed > 0:
                        item = Int32(async_copies.load_shared_b32(ids + item * 4))
                    target = Int32(above + cutlass.min(equal, ties))
                    self._put(operands, row, part, target, item, loaded[i])

    @cute.jit
    def _put(
        self, operands: Any, row: Int32, part: Int32, target: Int32, item: Int32, key: Uint32
    ) -> None:
        """A chosen item of the CTA's scores."""
        if cutlass.const_expr(self.stage == "whole"):
            operands[1][row, target] = item
        elif cutlass.const_expr(self.stage == "merge"):
            operands[2][row, target] = operands[1][row, item]
        else:
            positive = Uint32(Int32(key) >> 31)
            bits = key ^ (~positive | Uint32(0x80000000))
            operands[1][row, part * self.topk + target] = bits.bitcast(Float32)
            operands[2][row, part * self.topk + target] = part * self.part + item
