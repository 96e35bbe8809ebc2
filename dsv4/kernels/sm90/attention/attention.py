"""Sparse attention of all heads over one FP8 row per position: a part of the rows each CTA.

A CTA takes a contiguous part of the rows that a token sees, for `block_heads` of the heads, and
writes what it summed, not yet normalised, for `merge` to join; alone, it writes the output. A warp
owns 64 of a row's 512 dimensions, one scale block, for the scores and for the values: it makes them
bfloat16 once, multiplies them with its part of the queries, and later, transposed, with the
probabilities. Only scores cross between warps.

Within its 64 dimensions lane `4g + t` holds 16 consecutive ones, `16t ...`, of rows g and g + 8: an
MMA of 16 dimensions takes four of them, `16t + 4i + (0, 2)` and `(1, 3)`. Transposed, row g of an
MMA's result is dimension `16 (g / 2) + 4i + 2 (g % 2)` and row g + 8 the next one: a pair that
rotates together stays in one lane.
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, range_constexpr

from dsv4.kernels.sm90 import ptx, ring
from dsv4.kernels.sm90.attention import barriers, fragments, shared
from dsv4.kernels.sm90.attention.merge import HEAD_DIM, LOG2E, LOWEST, STEPS, Output
from dsv4.kernels.sm90.attention.rows import ROW_BYTES, SCALE_BYTES, WARPS, Rows

SLICE = 64  # dimensions of a warp
HEAD_BYTES = 2 * HEAD_DIM
LIVE_BYTES = 8  # a bit for each of 64 rows


class Attention:
    """`softmax(q kᵀ / sqrt(512), sinks) k`, rotated back, over the rows that a token sees.

    mode: "none" for the window alone, "all" for it and every complete block of `ratio` tokens,
    "list" for it and `topk` listed blocks. splits: parts at most; with 1, `out` is (sinks, cos,
    sin, o), else (sums, statistics) as `merge` takes them. block_heads: of a CTA, a multiple of 8;
    m_tiles: of 16 rows that it takes at once; stages: such tiles on their way;
    resident: CTAs of a multiprocessor that registers must suffice for.
    """

    def __init__(
        self,
        mode: str,
        heads: int,
        window: int,
        ratio: int,
        topk: int,
        splits: int,
        block_heads: int,
        m_tiles: int,
        stages: int,
        resident: int,
        pdl: bool,
    ) -> None:
        self.heads, self.block_heads, self.head_blocks = heads, block_heads, block_heads // 8
        self.m_tiles, self.tile, self.chunks = m_tiles, 16 * m_tiles, -(-m_tiles // 2)
        self.splits, self.stages, self.pdl = splits, stages, pdl
        self.resident = resident
        self.rows = Rows(mode, window, ratio, topk, splits, self.tile)
        self.output = Output(heads)
        self.scale = HEAD_DIM**-0.5 * LOG2E
        # Paddings that keep lanes on different banks.
        self.partial_row = (self.tile + 4) * 4
        self.probability_row = 2 * self.tile + (32 if self.tile % 32 == 0 else 0)
        sizes = {
            "rows": stages * self.tile * ROW_BYTES,
            "scales": stages * self.tile * SCALE_BYTES,
            "q": block_heads * HEAD_BYTES,
            "partial": WARPS * block_heads * self.partial_row,
            "probabilities": block_heads * self.probability_row,
            "fades": block_heads * 4,
            "statistics": block_heads * 8,
            "live": stages * LIVE_BYTES,
            "barriers": (stages + 1) * 8,
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
            grid=[self.splits, self.heads // self.block_heads, q.shape[0]],
            block=[32 * WARPS, 1, 1],
            min_blocks_per_mp=self.resident,
            preferred_smem_carveout=100,
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def kernel(
        self, q: cute.Tensor, caches: Any, position: cute.Tensor, slot: cute.Tensor, out: Any
    ) -> None:
        part, block, token = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        smem = cutlass.memory.SmemAllocator()
        base = Int32(smem.allocate(self.shared_bytes, 128).toint())
        if thread == 0:
            barriers.init(base + self.at["barriers"] + self.stages * 8, 32 * WARPS)
            for stage in range_constexpr(self.stages):
                barriers.init(base + self.at["barriers"] + stage * 8, self.rows.arrivals)
        cute.arch.sync_threads()
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
            # After the wait: `merge` may read what earlier kernels wrote before it waits.
            cute.arch.griddepcontrol_launch_dependents()
        sequence = shared.load_global_word(slot.iterator.toint() + Int64(token) * 4)
        place = shared.load_global_word(position.iterator.toint() + Int64(token) * 4)
        self._copy_query(q, base, token, block)
        blocks, seen = self.rows.count(place)
        share = self.rows.share(blocks, seen)
        first, last = part * share, cutlass.min((part + 1) * share, blocks + seen)
        listed = [
            self.rows.listed(caches, token, first + stage * self.tile)
            for stage in range(self.stages)
        ]
        # What is loaded is asked for at once: the branch depends on all of it.
        asked = (first < last) & (sequence >= 0)
        for entry in listed:
            asked = asked & (entry >= -1)
        if cute.arch.vote_ballot_sync(asked) != 0:
            oldest = (place + 1 - seen) % Int32(caches[0].shape[1])
            find = (caches, sequence, oldest, blocks, last, place)
            self._run(find, listed, base, token, first, part, block, out)
        ring.wait(0)

    @cute.jit
    def _copy_query(self, q: Any, base: Int32, token: Int32, block: Int32) -> None:
        """The CTA's heads, `[head][512]`."""
        thread, _, _ = cute.arch.thread_idx()
        row = Int64(token * self.heads + block * self.block_heads)
        source = q.iterator.toint() + row * HEAD_BYTES + thread * 16
        slot = base + self.at["q"] + thread * 16
        turn = 32 * WARPS * 16
        for piece in range_constexpr(self.block_heads * HEAD_BYTES // turn):
            ring.copy_or_zero(slot + piece * turn, source + piece * turn, 16, Int32(1))
        barriers.arrive_after_copies(base + self.at["barriers"] + self.stages * 8)

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
        out: Any,
    ) -> None:
        """All tiles of a part that has rows."""
        tiles = (find[4] - first + self.tile - 1) // self.tile
        for stage in range_constexpr(self.stages):
            if stage < tiles:
                at = self._stage(base, Int32(stage))
                self.rows.fetch(find, listed[stage], first + stage * self.tile, at)
        acc = cute.make_rmem_tensor(4 * STEPS * self.head_blocks, Float32)
        acc.fill(0.0)
        largest = cute.make_rmem_tensor(self.head_blocks, Float32)
        largest.fill(LOWEST)
        weight = cute.make_rmem_tensor(self.head_blocks, Float32)
        weight.fill(0.0)
        barriers.wait(base + self.at["barriers"] + self.stages * 8, Int32(0))
        stage, parity = Int32(0), Int32(0)
        for turn in cutlass.range(tiles, unroll=1):
            ahead = first + (turn + self.stages) * self.tile
            then = self.rows.listed(find[0], token, ahead)
            barriers.wait(base + self.at["barriers"] + stage * 8, parity)
            frags = self._fragments(base, stage)
            self._score(frags, base)
            cute.arch.sync_threads()
            self._softmax(base, stage, largest, weight)
            cute.arch.sync_threads()
            if ahead < find[4]:
                self.rows.fetch(find, then, ahead, self._stage(base, stage))
            self._add_values(base, frags, acc)
            stage = stage + 1 if stage < self.stages - 1 else 0
            parity = parity if stage > 0 else 1 - parity
        self._finish(base, acc, largest, weight, token, find, part, block, out)

    def _stage(self, base: Any, stage: Any) -> tuple[Any, ...]:
        """Where a tile's rows, scales, live bits and barrier lie."""
        return (
            base + self.at["rows"] + stage * (self.tile * ROW_BYTES),
            base + self.at["scales"] + stage * (self.tile * SCALE_BYTES),
            base + self.at["live"] + stage * LIVE_BYTES,
            base + self.at["barriers"] + stage * 8,
        )

    @cute.jit
    def _fragments(self, base: Int32, stage: Int32) -> Any:
        """The warp's part of the tile as bfloat16: `[m_tiles][STEPS][4]` words."""
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        frags = cute.make_rmem_tensor(self.m_tiles * STEPS * 4, Uint32)
        rows, scales, _, _ = self._stage(base, stage)
        slot = rows + (lane // 4) * ROW_BYTES + warp * SLICE
        scales += (lane // 4) * SCALE_BYTES + warp
        if warp == WARPS - 1:
            slot += (lane % 4) * 32
            for piece in range_constexpr(2 * self.m_tiles):
                place = (piece // 2) * 4 * STEPS + piece % 2
                here = slot + piece * (8 * ROW_BYTES)
                words = [*ring.read(here), *ring.read(here + 16)]
                for step in range_constexpr(STEPS):
                    pair = fragments.bf16_pairs(words[2 * step], words[2 * step + 1])
                    frags[place + 4 * step], frags[place + 4 * step + 2] = pair
        else:
            slot += (lane % 4) * 16
            for piece in range_constexpr(2 * self.m_tiles):
                place = (piece // 2) * 4 * STEPS + piece % 2
                words = ring.read(slot + piece * (8 * ROW_BYTES))
                code = shared.load_byte(scales + piece * (8 * SCALE_BYTES))
                factor = fragments.e4m3_factor(code)
                for step in range_constexpr(STEPS):
                    pair = fragments.e4m3_pairs(words[step], factor)
                    frags[place + 4 * step], frags[place + 4 * step + 2] = pair
        return frags

    @cute.jit
    def _score(self, frags: Any, base: Int32) -> None:
        """The warp's part of the products with the queries: `[head][row]` of each warp."""
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        g, t = lane // 4, lane % 4
        slot = base + self.at["q"] + g * HEAD_BYTES + warp * (2 * SLICE) + t * 32
        out = base + self.at["partial"] + warp * (self.block_heads * self.partial_row)
        out += t * (2 * self.partial_row) + g * 4
        for n in range_constexpr(self.head_blocks):
            here = slot + n * (8 * HEAD_BYTES)
            words = [*ring.read(here), *ring.read(here + 16)]
            query = [fragments.bf16_pairs(words[2 * i], words[2 * i + 1]) for i in range(STEPS)]
            for m in range_constexpr(self.m_tiles):
                sums = (Float32(0.0),) * 4
                for step in range_constexpr(STEPS):
                    a = tuple(frags[(m * STEPS + step) * 4 + c] for c in range(4))
                    sums = ptx.mma_bf16(sums, a, query[step])
                for c in range_constexpr(4):
                    here = out + (8 * n + c % 2) * self.partial_row + (16 * m + 8 * (c // 2)) * 4
                    shared.store_float(here, sums[c])

    @cute.jit
    def _softmax(self, base: Int32, stage: Int32, largest: Any, weight: Any) -> None:
        """Scores summed over the warps, in their order; probabilities `[head][m][t][half][2]`.

        A warp does every 8th head, a lane every 32nd row, and keeps its rows' part of the weight.
        "fades" tells by how much what was summed so far has to shrink.
        """
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        r = lane % 16
        place = (lane // 16) * 32 + (r % 8) // 2 * 8 + (r // 8) * 4 + (r % 2) * 2
        _, _, live, _ = self._stage(base, stage)
        for n in range_constexpr(self.head_blocks):
            head = 8 * n + warp
            source = base + self.at["partial"] + head * self.partial_row + lane * 4
            scores = []
            top = Float32(LOWEST)
            for chunk in range_constexpr(self.chunks):
                inside = chunk * 32 + lane < self.tile
                present = ((shared.load_word(live + chunk * 4) >> Uint32(lane)) & 1 != 0) & inside
                total = Float32(0.0)
                for part in range_constexpr(WARPS):
                    offset = part * (self.block_heads * self.partial_row) + chunk * 128
                    total += shared.load_float(source + offset)
                score = total * self.scale if present else -Float32.inf
                scores.append(score)
                top = cute.arch.fmax(top, score)
            top = cute.arch.fmax(fragments.warp_max(top), largest[n])
            fade = fragments.exp2(largest[n] - top)
            largest[n] = top
            total = weight[n] * fade
            target = base + self.at["probabilities"] + head * self.probability_row + place
            for chunk in range_constexpr(self.chunks):
                inside = chunk * 32 + lane < self.tile
                probability = fragments.exp2(scores[chunk] - top)
                total += probability
                if inside:
                    shared.store_half(target + chunk * 64, fragments.bf16_bits(probability))
            weight[n] = total
            if lane == 0:
                shared.store_float(base + self.at["fades"] + head * 4, fade)

    @cute.jit
    def _add_values(self, base: Int32, frags: Any, acc: Any) -> None:
        """`[step][n][4]` sums: dimensions by heads."""
        lane = cute.arch.lane_idx()
        g, t = lane // 4, lane % 4
        for n in range_constexpr(self.head_blocks):
            fade = shared.load(base + self.at["fades"] + (8 * n + 2 * t) * 4, 2)
            for index in range_constexpr(4 * STEPS):
                at = (index // 4 * self.head_blocks + n) * 4 + index % 4
                acc[at] *= fade[index % 2]
        for m in range_constexpr(self.m_tiles):
            probabilities = []
            for n in range_constexpr(self.head_blocks):
                source = base + self.at["probabilities"] + (8 * n + g) * self.probability_row
                probabilities.append(shared.load_words(source + m * 32 + t * 8))
            for step in range_constexpr(STEPS):
                at = (m * STEPS + step) * 4
                a = tuple(fragments.transpose(frags[at + c]) for c in (0, 2, 1, 3))
                for n in range_constexpr(self.head_blocks):
                    own = (step * self.head_blocks + n) * 4
                    sums = tuple(acc[own + c] for c in range(4))
                    sums = ptx.mma_bf16(sums, a, probabilities[n])
                    for c in range_constexpr(4):
                        acc[own + c] = sums[c]

    @cute.jit
    def _finish(
        self,
        base: Int32,
        acc: Any,
        largest: Any,
        weight: Any,
        token: Int32,
        find: Any,
        part: Int32,
        block: Int32,
        out: Any,
    ) -> None:
        """Write the sums `[T][split][tile][n][lane][4]` and (maximum, weight); or the output."""
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        row = Int64(token * self.splits + part) * self.heads
        for n in range_constexpr(self.head_blocks):
            total = cute.arch.warp_reduction_sum(weight[n])
            if lane == 0:
                head = 8 * n + warp
                pair = (largest[n], total)
                if cutlass.const_expr(self.splits > 1):
                    at = row + (block * self.block_heads + head)
                    shared.store_global(out[1].iterator.toint() + at * 8, pair)
                else:
                    shared.store(base + self.at["statistics"] + head * 8, pair)
        if cutlass.const_expr(self.splits > 1):
            sums = out[0].iterator.toint() + row * (HEAD_DIM * 4) + lane * 16
            for step in range_constexpr(STEPS):
                for n in range_constexpr(self.head_blocks):
                    item = (warp * STEPS + step) * (self.heads // 8) + block * self.head_blocks + n
                    own = (step * self.head_blocks + n) * 4
                    four = tuple(acc[own + c] for c in range(4))
                    shared.store_global(sums + Int64(item * 512), four)
        else:
            cute.arch.sync_threads()
            statistics = base + self.at["statistics"]
            self.output.whole(acc, statistics, token, find, block * self.block_heads, out)
