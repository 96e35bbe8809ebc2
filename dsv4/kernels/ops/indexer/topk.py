"""The best `topk` visible blocks of each row, in ascending order: an exact radix select.

Scores become integers of the same order. Rounds look at 11 bits at a time: a histogram of those
that agree with what is known of the smallest chosen score, then the digit at which the count from
above reaches `topk`. A round after which nothing is left to decide is the last. Equal scores at the
threshold are taken from the lowest block on.

Of many scores most are dropped first: each thread's largest of a few, `topk` of which are a bound
that as many scores reach; what reaches it moves closer together, in order. Long rows are cut into
parts, one for a CTA (`PartTopk`), and what is chosen of each is chosen from again (`MergeTopk`):
one CTA that chooses from 32,768 spills registers. A short row is one CTA's (`RowTopk`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, range_constexpr

from dsv4.kernels.device import global_memory, shared_memory
from dsv4.kernels.ops.indexer import selection
from dsv4.kernels.ops.indexer.selection import BINS, KEYS, THREADS, Selection, Threshold

WARP_TURN = 32 * KEYS  # neighbouring scores of a warp
TURN = THREADS * KEYS  # scores of a CTA at a time
MOST_TURNS = 8  # of scores that a thread holds in registers
LIST = 2 * TURN  # scores that are chosen from without dropping any first
BOUND_ROUNDS = 2
ROUNDS = 3


class Place(NamedTuple):
    """What a CTA chooses from: a row, its part of the row, and how many scores that has."""

    row: Int32
    part: Int32
    count: Int32


class RowTensors(NamedTuple):
    """scores: float32 `[T, capacity]`, a multiple of 4; blocks: int32 `[T, topk]`, written."""

    scores: cute.Tensor
    blocks: cute.Tensor


class PartTensors(NamedTuple):
    """scores as of a row; what each part chooses of them, `[T, parts · topk]`, written: its scores,
    float32, and their blocks, int32.
    """

    scores: cute.Tensor
    part_scores: cute.Tensor
    part_blocks: cute.Tensor


class MergeTensors(NamedTuple):
    """scores: those that the parts chose, and part_blocks their blocks; blocks as of a row."""

    scores: cute.Tensor
    part_blocks: cute.Tensor
    blocks: cute.Tensor


class _Topk:
    """What the three have in common. A subclass says what a CTA chooses from and where it puts it.

    ratio: tokens per block; turns: of 2048 scores that a CTA takes at most; part: scores of a part.
    position: int32 `[T]`. A row that sees no more than `topk` blocks has all of them, then -1.
    """

    def __init__(self, ratio: int, topk: int, turns: int, part: int, pdl: bool) -> None:
        if topk > 2 * THREADS or turns > MOST_TURNS:
            most = MOST_TURNS * TURN
            raise ValueError(f"{topk} of {turns * TURN} scores, expected at most 1024 of {most}")
        self.ratio, self.topk, self.turns, self.part, self.pdl = ratio, topk, turns, part, pdl
        self.groups = 2 * topk // THREADS  # of a thread's scores, whose largest make the bound

    def items(self, tensors: Any, visible: Int32, part: Int32) -> Int32:
        """How many scores the CTA has to choose from, of a row with more than `topk` visible."""
        raise NotImplementedError

    def list_visible(self, tensors: Any, row: Int32, visible: Int32) -> None:
        """Of a row with no more than `topk` visible blocks: write all of them."""
        raise NotImplementedError

    def take_all(self, tensors: Any, place: Place) -> None:
        """Where a CTA has no more than `topk` scores to choose from: write all of them."""
        raise NotImplementedError

    def put(self, tensors: Any, place: Place, target: Int32, item: Int32, key: Uint32) -> None:
        """Write a chosen item of the CTA's scores, which has `key`, at `target` of the chosen."""
        raise NotImplementedError

    @cute.jit
    def choose(self, position: cute.Tensor, tensors: Any) -> None:
        """The whole kernel."""
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        part, row, _ = cute.arch.block_idx()
        smem = cutlass.memory.SmemAllocator()
        select = Selection(smem, BOUND_ROUNDS + ROUNDS, max(self.turns * TURN, LIST), LIST)
        select.clear()
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        at = global_memory.load_word((position.iterator + row).toint())
        own = cute.make_rmem_tensor((KEYS, self.turns), Uint32)
        source = tensors.scores
        # One turn is loaded before the row's length is known: its latency is that of the position.
        if cutlass.const_expr(self.turns == 1):
            self._load(source, row, source.shape[1], Int32(0), Int32(1), own)
        visible = (Int32(at) + 1) // self.ratio
        count, start = self.items(tensors, visible, part), part * self.part
        if visible <= self.topk:
            self.list_visible(tensors, row, visible)
        else:
            if count > self.topk:
                turns = (count + TURN - 1) // TURN
                if cutlass.const_expr(self.turns > 1):
                    self._load(source, row, count, start, turns, own)
                else:
                    self._hide(own, count)
                self._select(tensors, Place(row, part, count), own, turns, select)
            elif count > 0:
                self.take_all(tensors, Place(row, part, count))

    def _first(self, turns: Int32) -> Int32:
        """Of the thread's items: a warp has as many turns of neighbouring ones."""
        return cute.arch.warp_idx() * (turns * WARP_TURN) + cute.arch.lane_idx() * KEYS

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
            loaded.append(global_memory.load_floats_if(present, at + Int64(item) * 4))
        for turn in range_constexpr(self.turns):
            for i in range_constexpr(KEYS):
                bits = loaded[turn][i].bitcast(Uint32)
                bits = Uint32(0) if bits == Uint32(0x80000000) else bits  # -0 equals 0
                sign = Uint32(Int32(bits) >> 31)
                present = (turn < turns) & (first + turn * WARP_TURN + i < count)
                own[i, turn] = bits ^ (sign | Uint32(0x80000000)) if present else Uint32(0)

    @cute.jit
    def _hide(self, own: cute.Tensor, count: Int32) -> None:
        """Put what lies beyond `count`, loaded before that was known, below all."""
        first = self._first(Int32(1))
        for i in range_constexpr(KEYS):
            own[i, 0] = own[i, 0] if first + i < count else Uint32(0)

    @cute.jit
    def _select(
        self,
        tensors: Any,
        place: Place,
        own: cute.Tensor,
        turns: Int32,
        select: cutlass.Constexpr,
    ) -> None:
        """Write the best `topk` of more scores than that. own: the thread's, as integers."""
        first = self._first(turns)
        listed = Int32(0)
        if cutlass.const_expr(self.turns * TURN > LIST):
            listed = self._drop(own, turns, first, select)
        if listed == 0:
            for turn in range_constexpr(self.turns):
                if turn < turns:
                    words = tuple(own[i, turn] for i in range(KEYS))
                    shared_memory.store_words(select.keys + (first + turn * WARP_TURN) * 4, words)
        else:
            turns = (listed + TURN - 1) // TURN
            first = self._first(turns)
        cute.arch.sync_threads()
        last = select.threshold(select.keys + first * 4, turns, self.topk, BOUND_ROUNDS)
        self._write(tensors, place, listed, turns, last, select)

    @cute.jit
    def _drop(
        self, own: cute.Tensor, turns: Int32, first: Int32, select: cutlass.Constexpr
    ) -> Int32:
        """Of many scores, keep those that may be chosen; -> how many, or 0 for all of them."""
        listed = Int32(0)
        if turns * TURN > LIST:
            bound = self._bound(own, select)
            listed = self._gather(own, turns, first, bound, select)
        return listed

    @cute.jit
    def _bound(self, own: cute.Tensor, select: cutlass.Constexpr) -> Uint32:
        """A key that at least `topk` of the CTA's reach, and not many more."""
        largest = []
        for group in range_constexpr(self.groups):
            most = Uint32(0)
            for turn in range_constexpr(group, self.turns, self.groups):
                for i in range_constexpr(KEYS):
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
        select: cutlass.Constexpr,
    ) -> Int32:
        """Move the keys that reach the bound, and their items, together; -> their number.

        0 where they do not fit, and none is moved.
        """
        thread, _, _ = cute.arch.thread_idx()
        count = Uint32(0)
        for turn in range_constexpr(self.turns):
            for i in range_constexpr(KEYS):
                count += Uint32(own[i, turn] >= bound)
        for part in range_constexpr(LIST // TURN):
            place = select.keys + (part * TURN + thread * KEYS) * 4
            shared_memory.store_words(place, (Uint32(0), Uint32(0), Uint32(0), Uint32(0)))
        before, whole = select.before(cute.arch.warp_redux_sync(count, "add"))
        fits = Int32(whole) if whole <= LIST else Int32(0)
        if fits > 0:
            for turn in range_constexpr(self.turns):
                if turn < turns:
                    marks = [Uint32(own[i, turn] >= bound) for i in range(KEYS)]
                    at, before = selection.ranks(marks, before)
                    for i in range_constexpr(KEYS):
                        if marks[i] == 1:
                            shared_memory.store_word(select.keys + Int32(at[i]) * 4, own[i, turn])
                            item = first + turn * WARP_TURN + i
                            shared_memory.store_word(select.ids + Int32(at[i]) * 4, Uint32(item))
        return fits

    @cute.jit
    def _write(
        self,
        tensors: Any,
        place: Place,
        listed: Int32,
        turns: Int32,
        last: Threshold,
        select: cutlass.Constexpr,
    ) -> None:
        """Chosen: above the last, and the first `ties` at it.

        listed: how many keys were moved together, with their items in `select.ids`; 0: none was.
        """
        limit, ties = last
        first = self._first(turns)
        own = select.keys + first * 4
        count = Uint32(0)
        for turn in cutlass.range(turns, unroll=1):
            for key in shared_memory.load_words(own + turn * (WARP_TURN * 4), 4):
                count += selection.mark(key, limit)
        before, _ = select.before(cute.arch.warp_redux_sync(count, "add"))
        for turn in cutlass.range(turns, unroll=1):
            loaded = shared_memory.load_words(own + turn * (WARP_TURN * 4), 4)
            marks = [selection.mark(loaded[i], limit) for i in range(KEYS)]
            at, before = selection.ranks(marks, before)
            for i in range_constexpr(KEYS):
                above, equal = selection.parts(at[i])
                if (marks[i] == 1) | ((marks[i] > 1) & (equal < ties)):
                    item = first + turn * WARP_TURN + i
                    if listed > 0:
                        item = Int32(shared_memory.load_word(select.ids + item * 4))
                    target = Int32(above + cutlass.min(equal, ties))
                    self.put(tensors, place, target, item, loaded[i])


class RowTopk(_Topk):
    """Of all scores of a row into its blocks, by one CTA."""

    def __init__(self, ratio: int, topk: int, turns: int, pdl: bool) -> None:
        super().__init__(ratio, topk, turns, 0, pdl)

    @cute.jit
    def __call__(
        self,
        position: cute.Tensor,
        scores: cute.Tensor,
        blocks: cute.Tensor,
        stream: cuda.CUstream,
    ) -> None:
        self.kernel(position, scores, blocks).launch(
            grid=[1, position.shape[0], 1],
            block=[THREADS, 1, 1],
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def kernel(self, position: cute.Tensor, scores: cute.Tensor, blocks: cute.Tensor) -> None:
        self.choose(position, RowTensors(scores, blocks))

    def items(self, tensors: RowTensors, visible: Int32, part: Int32) -> Int32:
        return cutlass.min(visible, tensors.scores.shape[1])

    @cute.jit
    def list_visible(self, tensors: RowTensors, row: Int32, visible: Int32) -> None:
        _list_blocks(tensors.blocks, self.topk, row, visible)

    def take_all(self, tensors: RowTensors, place: Place) -> None:
        """Never: there are as many scores as visible blocks, which are more."""

    def put(
        self, tensors: RowTensors, place: Place, target: Int32, item: Int32, key: Uint32
    ) -> None:
        tensors.blocks[place.row, target] = item


class PartTopk(_Topk):
    """Of each `part` scores of a row the best, with their blocks; the last part may have fewer."""

    def __init__(self, ratio: int, topk: int, turns: int, part: int, pdl: bool) -> None:
        super().__init__(ratio, topk, turns, part, pdl)
        if part > turns * TURN:
            raise ValueError(f"parts of {part} scores, expected at most {turns * TURN}")

    @cute.jit
    def __call__(
        self,
        position: cute.Tensor,
        scores: cute.Tensor,
        part_scores: cute.Tensor,
        part_blocks: cute.Tensor,
        stream: cuda.CUstream,
    ) -> None:
        self.kernel(position, scores, part_scores, part_blocks).launch(
            grid=[part_scores.shape[1] // self.topk, position.shape[0], 1],
            block=[THREADS, 1, 1],
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def kernel(
        self,
        position: cute.Tensor,
        scores: cute.Tensor,
        part_scores: cute.Tensor,
        part_blocks: cute.Tensor,
    ) -> None:
        self.choose(position, PartTensors(scores, part_scores, part_blocks))

    def items(self, tensors: PartTensors, visible: Int32, part: Int32) -> Int32:
        visible = cutlass.min(visible, tensors.scores.shape[1])
        return cutlass.min(visible - part * self.part, self.part)

    def list_visible(self, tensors: PartTensors, row: Int32, visible: Int32) -> None:
        """Left to `MergeTopk`, which needs no scores for it."""

    @cute.jit
    def take_all(self, tensors: PartTensors, place: Place) -> None:
        thread, _, _ = cute.arch.thread_idx()
        row, part, count = place
        for turn in range_constexpr(self.topk // THREADS):
            item = turn * THREADS + thread
            target, block = part * self.topk + item, part * self.part + item
            present = item < count
            tensors.part_blocks[row, target] = block if present else -1
            score = Float32(-float("inf"))
            if present:
                score = tensors.scores[row, block]
            tensors.part_scores[row, target] = score

    def put(
        self, tensors: PartTensors, place: Place, target: Int32, item: Int32, key: Uint32
    ) -> None:
        positive = Uint32(Int32(key) >> 31)
        bits = key ^ (~positive | Uint32(0x80000000))
        at = place.part * self.topk + target
        tensors.part_scores[place.row, at] = bits.bitcast(Float32)
        tensors.part_blocks[place.row, at] = place.part * self.part + item


class MergeTopk(_Topk):
    """Of what `PartTopk` chose of a row's parts the best, into the row's blocks."""

    @cute.jit
    def __call__(
        self,
        position: cute.Tensor,
        part_scores: cute.Tensor,
        part_blocks: cute.Tensor,
        blocks: cute.Tensor,
        stream: cuda.CUstream,
    ) -> None:
        self.kernel(position, part_scores, part_blocks, blocks).launch(
            grid=[1, position.shape[0], 1],
            block=[THREADS, 1, 1],
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def kernel(
        self,
        position: cute.Tensor,
        part_scores: cute.Tensor,
        part_blocks: cute.Tensor,
        blocks: cute.Tensor,
    ) -> None:
        self.choose(position, MergeTensors(part_scores, part_blocks, blocks))

    def items(self, tensors: MergeTensors, visible: Int32, part: Int32) -> Int32:
        parts = tensors.scores.shape[1] // self.topk
        return cutlass.min((visible + self.part - 1) // self.part, parts) * self.topk

    @cute.jit
    def list_visible(self, tensors: MergeTensors, row: Int32, visible: Int32) -> None:
        _list_blocks(tensors.blocks, self.topk, row, visible)

    @cute.jit
    def take_all(self, tensors: MergeTensors, place: Place) -> None:
        """There was only one part."""
        thread, _, _ = cute.arch.thread_idx()
        for turn in range_constexpr(self.topk // THREADS):
            item = turn * THREADS + thread
            tensors.blocks[place.row, item] = tensors.part_blocks[place.row, item]

    def put(
        self, tensors: MergeTensors, place: Place, target: Int32, item: Int32, key: Uint32
    ) -> None:
        tensors.blocks[place.row, target] = tensors.part_blocks[place.row, item]


@cute.jit
def _list_blocks(blocks: cute.Tensor, topk: cutlass.Constexpr, row: Int32, visible: Int32) -> None:
    thread, _, _ = cute.arch.thread_idx()
    for turn in range_constexpr(topk // THREADS):
        item = turn * THREADS + thread
        blocks[row, item] = item if item < visible else -1
