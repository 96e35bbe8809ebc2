"""Sparse attention of 64 heads at a time over one FP8 row per position, with warpgroup products.

A CTA takes a contiguous part of the rows that a token sees, 64 at a time, for 64 of the heads. They
become bfloat16 once, in shared memory, as tiles of 64 rows by 64 dimensions: half of the dimensions
while the other half is multiplied with the queries, by each warpgroup for its half of the rows.
Maxima and probabilities meet in shared memory; each warpgroup multiplies these with the same tiles,
transposed, for its own dimensions: half of all, or of the CTA's cut of them.

A thread `4g + t` of warp w of a warpgroup has heads `16w + g` and `16w + g + 8`; of these scores at
rows `8j + 2t` and the next, and sums at such dimensions of its own.
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, range_constexpr

from dsv4.kernels.device import fragments, mbarriers, ring, shared_memory
from dsv4.kernels.device.warpgroup import product
from dsv4.kernels.device.warpgroup.layout import MMA_COLS, TILE_ROW_BYTES
from dsv4.kernels.ops.attention.combine import HEAD_DIM, LOG2E, LOWEST, Output
from dsv4.kernels.ops.attention.gather_rows import ROW_BYTES, SCALE_BYTES, TILE, WARPS, Rows

HEADS = 64  # of a CTA
SLICE = 64  # dimensions of a tile
SLICES = HEAD_DIM // SLICE
SLICE_BYTES = TILE * TILE_ROW_BYTES
PHASES = 2  # of a tile: the second is made bfloat16 while the first is multiplied
LIVE_BYTES = TILE // 8


class Attention:
    """`softmax(q kᵀ / sqrt(512), sinks) k` over the rows that a token sees, parts of it.

    mode: "none" for the window alone, "all" for it and every complete block of `ratio` tokens,
    "list" for it and `topk` listed blocks. splits: parts at most; with 1, `out` is (sinks, cos,
    sin, o), else (sums, statistics) as `Join` takes them. stages: tiles on their way; cuts: CTAs
    that share the dimensions of the same heads and rows, each with all scores.
    """

    def __init__(
        self,
        mode: str,
        heads: int,
        window: int,
        ratio: int,
        topk: int,
        splits: int,
        stages: int,
        cuts: int,
        pdl: bool,
    ) -> None:
        self.cuts = cuts
        self.own = HEAD_DIM // 2 // cuts
        assert heads % HEADS == 0
        self.heads, self.splits, self.stages, self.pdl = heads, splits, stages, pdl
        self.rows = Rows(mode, window, ratio, topk, splits)
        self.output = Output(heads)
        self.scale = HEAD_DIM**-0.5 * LOG2E
        sizes = {
            "q": SLICES * HEADS * TILE_ROW_BYTES,
            "tiles": SLICES * SLICE_BYTES,
            "probabilities": HEADS * TILE_ROW_BYTES,
            "rows": stages * TILE * ROW_BYTES,
            "scales": stages * TILE * SCALE_BYTES,
            "live": (stages + 1) * LIVE_BYTES,
            "barriers": stages * 8,
            "tops": 2 * HEADS * 4,
        }
        self.at: dict[str, int] = {}
        end = 0
        for name, size in sizes.items():
            self.at[name], end = end, end + -(-size // 128) * 128
        self.shared_bytes = end

    @cute.jit
    def __call__(
        self,
        q: cute.Tensor,
        caches: Any,
        position: cute.Tensor,
        slot: cute.Tensor,
        out: Any,
        stream: cuda.CUstream,
    ) -> None:
        self.kernel(q, caches, position, slot, out).launch(
            grid=[self.splits, self.heads // HEADS * self.cuts, q.shape[0]],
            block=[32 * WARPS, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def kernel(
        self, q: cute.Tensor, caches: Any, position: cute.Tensor, slot: cute.Tensor, out: Any
    ) -> None:
        part, item, token = cute.arch.block_idx()
        block, cut = item // self.cuts, item % self.cuts
        thread, _, _ = cute.arch.thread_idx()
        smem = cutlass.memory.SmemAllocator()
        base = Int32(smem.allocate(self.shared_bytes, 1024).toint())
        if thread == 0:
            for stage in range_constexpr(self.stages):
                mbarriers.init(base + self.at["barriers"] + stage * 8, 32 * WARPS)
        cute.arch.sync_threads()
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
            # After the wait: `Join` may read what earlier kernels wrote before it waits.
            cute.arch.griddepcontrol_launch_dependents()
        sequence = shared_memory.load_global_word(slot.iterator.toint() + Int64(token) * 4)
        place = shared_memory.load_global_word(position.iterator.toint() + Int64(token) * 4)
        self._copy_query(q, base, token, block)
        blocks, seen = self.rows.count(place)
        share = self.rows.share(blocks, seen)
        first, last = part * share, cutlass.min((part + 1) * share, blocks + seen)
        listed = [
            self.rows.listed(caches, token, first + stage * TILE) for stage in range(self.stages)
        ]
        # What is loaded is asked for at once: the branch depends on all of it.
        asked = (first < last) & (sequence >= 0)
        for entry in listed:
            asked = asked & (entry >= -1)
        if cute.arch.vote_ballot_sync(asked) != 0:
            oldest = (place + 1 - seen) % Int32(caches[0].shape[1])
            find = (caches, sequence, oldest, blocks, last, place)
            self._run(find, listed, base, token, first, part, block, cut, out)
        ring.wait(0)

    @cute.jit
    def _copy_query(self, q: Any, base: Int32, token: Int32, block: Int32) -> None:
        """The CTA's heads: tiles `[64 dimensions][head]`, swizzled. A thread's pieces are of heads
        `thread / 8 + 32 k`."""
        thread, _, _ = cute.arch.thread_idx()
        head, piece = thread // 8, thread % 8
        row = Int64(token * self.heads + block * HEADS + head)
        source = q.iterator.toint() + row * (2 * HEAD_DIM) + piece * 16
        target = base + self.at["q"] + head * TILE_ROW_BYTES + (piece ^ (head % 8)) * 16
        for turn in range_constexpr(HEADS // 32):
            for cut in range_constexpr(SLICES):
                ring.copy_or_zero(
                    target + cut * (HEADS * TILE_ROW_BYTES) + turn * (32 * TILE_ROW_BYTES),
                    source + cut * (2 * SLICE) + turn * (32 * 2 * HEAD_DIM),
                    16,
                    Int32(1),
                )
        ring.commit()

    @cute.jit
    def _run(
        self,
        find: Any,
        listed: Any,
        base: Int32,
        token: Int32,
        first: Int32,
        part: Int32,
        block: Int32,
        cut: Int32,
        out: Any,
    ) -> None:
        """All tiles of a part that has rows."""
        tiles = (find[4] - first + TILE - 1) // TILE
        for stage in range_constexpr(self.stages):
            if stage < tiles:
                at = self._stage(base, Int32(stage), Int32(stage))
                self.rows.fetch(find, listed[stage], first + stage * TILE, at)
        acc = cute.make_rmem_tensor(self.own // 2, Float32)
        acc.fill(0.0)
        largest = cute.make_rmem_tensor(2, Float32)
        largest.fill(LOWEST)
        weight = cute.make_rmem_tensor(2, Float32)
        weight.fill(0.0)
        ring.wait(0)  # the queries
        stage, parity, slot = Int32(0), Int32(0), Int32(0)
        for turn in cutlass.range(tiles, unroll=1):
            ahead = first + (turn + self.stages) * TILE
            then = self.rows.listed(find[0], token, ahead)
            mbarriers.wait(base + self.at["barriers"] + stage * 8, parity)
            scores = [Float32(0.0) for _ in range(TILE // 4)]
            for phase in range_constexpr(PHASES):
                self._widen(base, stage, phase)
                cute.arch.fence_view_async_shared()
                cute.arch.sync_threads()
                scores = self._score(base, scores, phase)
            before = slot - 1 if slot > 0 else Int32(self.stages)
            if ahead < find[4]:
                self.rows.fetch(find, then, ahead, self._stage(base, stage, before))
            scores = product.wait_for(scores)
            self._soften(scores, base, slot, acc, largest, weight)
            self._add_values(base, acc, cut)
            cute.arch.sync_threads()
            slot = slot + 1 if slot < self.stages else Int32(0)
            stage = stage + 1 if stage < self.stages - 1 else Int32(0)
            parity = parity if stage > 0 else 1 - parity
        self._finish(base, acc, largest, weight, token, find[5], part, block, cut, out)

    def _stage(self, base: Any, stage: Any, slot: Any) -> tuple[Any, ...]:
        """Where a tile's rows, scales, live bits and barrier lie.

        Live bits have a slot more: others may still read the last tile's.
        """
        return (
            base + self.at["rows"] + stage * (TILE * ROW_BYTES),
            base + self.at["scales"] + stage * (TILE * SCALE_BYTES),
            base + self.at["live"] + slot * LIVE_BYTES,
            base + self.at["barriers"] + stage * 8,
        )

    @cute.jit
    def _widen(self, base: Int32, stage: Int32, phase: int) -> None:
        """Half of the dimensions become bfloat16: a warp's are 64 of 32 rows.

        Lane `4g + t` has 16 dimensions of rows g, g + 8, ...
        """
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        g, t = lane // 4, lane % 4
        piece, row = phase * (SLICES // PHASES) + warp % 4, warp // 4 * (TILE // 2) + g
        rows, scales, _, _ = self._stage(base, stage, Int32(0))
        source = rows + row * ROW_BYTES + piece * SLICE
        scales += row * SCALE_BYTES + piece
        target = base + self.at["tiles"] + piece * SLICE_BYTES + row * TILE_ROW_BYTES
        places = target + ((2 * t) ^ g) * 16, target + ((2 * t + 1) ^ g) * 16
        if piece == SLICES - 1:
            for group in range_constexpr(TILE // 16):
                here = source + group * (8 * ROW_BYTES) + t * 32
                words = [ring.read(here + half * 16) for half in range(2)]
                for half in range_constexpr(2):
                    shared_memory.store_words(places[half] + group * 1024, words[half])
        else:
            # Loads keep their order with stores, so those of two groups come first.
            for pair in range_constexpr(TILE // 32):
                found = []
                for group in (2 * pair, 2 * pair + 1):
                    words = ring.read(source + group * (8 * ROW_BYTES) + t * 16)
                    code = shared_memory.load_byte(scales + group * (8 * SCALE_BYTES))
                    found.append((group, words, code))
                for group, words, code in found:
                    factor = fragments.e4m3_factor(code)
                    for half in range_constexpr(2):
                        low = fragments.e4m3_words(words[2 * half], factor)
                        high = fragments.e4m3_words(words[2 * half + 1], factor)
                        shared_memory.store_words(places[half] + group * 1024, (*low, *high))

    @cute.jit
    def _score(self, base: Int32, scores: Any, phase: int) -> Any:
        """Products of all heads with the tile's rows, over half of the dimensions."""
        tiles = base + self.at["tiles"] + cute.arch.warp_idx() // 4 * (SLICE_BYTES // 2)
        if cutlass.const_expr(phase == 0):
            product.fence()
        for index in range_constexpr(SLICES // PHASES):
            piece = phase * (SLICES // PHASES) + index
            query = product.tile(base + self.at["q"] + piece * (HEADS * TILE_ROW_BYTES))
            tile = product.tile(tiles + piece * SLICE_BYTES)
            for step in range_constexpr(SLICE // MMA_COLS):
                scores = product.multiply(
                    scores, product.columns(query, step), product.columns(tile, step)
                )
        product.commit()
        return scores

    @cute.jit
    def _soften(
        self, scores: Any, base: Int32, slot: Int32, acc: Any, largest: Any, weight: Any
    ) -> None:
        """Probabilities `[head][row]`; what was summed so far shrinks. weight: of the own rows."""
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        g, t, half = lane // 4, lane % 4, warp // 4
        live = base + self.at["live"] + slot * LIVE_BYTES + half * 4
        mask = shared_memory.load_word(live) >> Uint32(2 * t)
        own = warp % 4 * 16 + g
        tops = base + self.at["tops"] + own * 4
        kept = []
        for index in range_constexpr(TILE // 4):
            bit = 8 * (index // 4) + index % 2
            present = (mask >> Uint32(bit)) & 1 != 0
            kept.append(scores[index] if present else -Float32.inf)
        best = []
        for head in range_constexpr(2):
            mine = [index for index in range(TILE // 4) if index // 2 % 2 == head]
            top = kept[mine[0]]
            for index in mine[1:]:
                top = cute.arch.fmax(top, kept[index])
            for distance in (1, 2):
                top = cute.arch.fmax(top, cute.arch.shuffle_sync_bfly(top, distance))
            best.append(top)
            if t == 0:
                shared_memory.store_float(tops + half * (HEADS * 4) + head * 32, top)
        cute.arch.sync_threads()
        for head in range_constexpr(2):
            mine = [index for index in range(TILE // 4) if index // 2 % 2 == head]
            other = shared_memory.load_float(tops + (1 - half) * (HEADS * 4) + head * 32)
            top = cute.arch.fmax(best[head], other)
            top = cute.arch.fmax(top * self.scale, largest[head])
            fade = fragments.exp2(largest[head] - top)
            largest[head] = top
            total = weight[head] * fade
            for index in mine:
                kept[index] = fragments.exp2(kept[index] * self.scale - top)
                total += kept[index]
            weight[head] = total
            target = base + self.at["probabilities"] + (own + 8 * head) * TILE_ROW_BYTES
            for j in range_constexpr(TILE // 16):
                word = fragments.pack_bf16x2(kept[4 * j + 2 * head], kept[4 * j + 2 * head + 1])
                shared_memory.store_word(target + ((4 * half + j) ^ g) * 16 + t * 4, word)
            for j in range_constexpr(self.own // 8):
                for c in range_constexpr(2):
                    acc[4 * j + 2 * head + c] *= fade
        cute.arch.fence_view_async_shared()
        cute.arch.sync_threads()

    @cute.jit
    def _add_values(self, base: Int32, acc: Any, cut: Int32) -> None:
        """The warpgroup's own dimensions."""
        group = 2 * cut + cute.arch.warp_idx() // 4
        tiles = base + self.at["tiles"] + group * (self.own // SLICE * SLICE_BYTES)
        values = product.turned_tiles(tiles, SLICE_BYTES)
        probabilities = product.tile(base + self.at["probabilities"])
        sums = [acc[index] for index in range(self.own // 2)]
        product.fence()
        for step in range_constexpr(TILE // MMA_COLS):
            a = product.columns(probabilities, step)
            sums = product.multiply(sums, a, product.rows(values, step), True)
        product.commit()
        sums = product.wait_for(sums)
        for j in range_constexpr(self.own // 8):
            for c in range_constexpr(4):
                acc[4 * j + c] = sums[4 * j + c]

    @cute.jit
    def _finish(
        self,
        base: Int32,
        acc: Any,
        largest: Any,
        weight: Any,
        token: Int32,
        place: Int32,
        part: Int32,
        block: Int32,
        cut: Int32,
        out: Any,
    ) -> None:
        """Write the sums `[T][split][head][512]` and (maximum, weight); or the output."""
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        first = block * HEADS + warp % 4 * 16 + lane // 4
        column = (2 * cut + warp // 4) * self.own + 2 * (lane % 4)
        tops = base + self.at["tops"] + (warp % 4 * 16 + lane // 4) * 4
        for head in range_constexpr(2):
            total = weight[head]
            for distance in (1, 2):
                total += cute.arch.shuffle_sync_bfly(total, distance)
            if lane % 4 == 0:
                shared_memory.store_float(tops + warp // 4 * (HEADS * 4) + head * 32, total)
        cute.arch.sync_threads()
        for head in range_constexpr(2):
            both = [
                shared_memory.load_float(tops + half * (HEADS * 4) + head * 32) for half in range(2)
            ]
            pair = (largest[head], both[0] + both[1])
            own = [(acc[4 * j + 2 * head], acc[4 * j + 2 * head + 1]) for j in range(self.own // 8)]
            if cutlass.const_expr(self.splits > 1):
                row = Int64(token * self.splits + part) * self.heads + first + 8 * head
                if column == 0:
                    shared_memory.store_global(out[1].iterator.toint() + row * 8, pair)
                sums = out[0].iterator.toint() + (row * HEAD_DIM + column) * 4
                for j in range_constexpr(self.own // 8):
                    shared_memory.store_global(sums + j * 32, own[j])
            else:
                self.output.whole(own, pair, token, place, first + 8 * head, column, out)
