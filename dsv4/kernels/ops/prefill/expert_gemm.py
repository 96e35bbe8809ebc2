"""The two products of the routed experts for many tokens, each over all experts in one launch.

The tokens of an expert stand together in a list (routing.py). A persistent grid walks the tiles
(expert, `n_tile` tokens of its list, rows of its weight); a CTA finds its tiles from the list's
offsets alone. The weight's rows change fastest, so that CTAs that share tokens run together, and
so do those that share a weight when an expert has many tokens.
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, range_constexpr

from dsv4.kernels.device import conversions, global_memory, shared_memory
from dsv4.kernels.device.elementary import swiglu
from dsv4.kernels.ops.experts.record import W2_SLABS, Record
from dsv4.kernels.ops.prefill.mainloop import (
    CONSUMERS_BARRIER,
    PRODUCERS,
    STAGING_BYTES,
    STAGING_TOKENS,
    WARPGROUP,
    Mainloop,
)
from dsv4.kernels.ops.prefill.weight_fragments import RUN, Nvfp4Fragments


class RecordFragments(Nvfp4Fragments):
    """A matrix of an expert that lies in its record: matrices are numbered by records' places.

    All records together are rows of codes, of which a part is this matrix: so the copy unit needs
    one description of them, wherever the chosen ones lie. first, scales_at: where codes and scales
    begin in a record, in rows and in bytes.
    """

    def __init__(self, record: Record, slabs: int, first: int, scales_at: int, *cut: Any) -> None:
        super().__init__(*cut)
        self.first, self.scales_at, self.nbytes = first, scales_at, record.nbytes
        self.record_rows = record.nbytes // self.pitch
        if record.nbytes % self.pitch:
            raise ValueError(f"a record of {record.nbytes} bytes is not rows of {self.pitch}")

    def place(self, matrix: Int32, row: Int32, step: Int32) -> tuple[Int32, Int32]:
        """See `Fragments`. matrix: the place of the record."""
        slab, within = step // self.slab_steps, step % self.slab_steps
        in_record = self.first + slab * self.n + row
        return matrix * self.record_rows + in_record, within * self.runs

    def copy_scales(
        self, scales: Int64, place: tuple[Int32, Int32], stage: Int32, barrier: Int32
    ) -> None:
        """See `Fragments`. scales: the address of the records."""
        record, row = place[0] // self.record_rows, place[0] % self.record_rows
        own = scales + Int64(record) * self.nbytes + self.scales_at
        super().copy_scales(own, (row - self.first, place[1]), stage, barrier)


class ExpertGemm(Mainloop):
    """What both products share: which tiles there are, and where.

    narrow: how many products of fewer tokens there are for tiles that are not full.
    """

    def __init__(
        self,
        record: Record,
        experts: int,
        top_k: int,
        ctas: int,
        narrow: int,
        *shape: Any,
        **tuning: Any,
    ) -> None:
        super().__init__("nvfp4", *shape, **tuning)
        n, k, slabs = shape
        down = slabs > 1
        first = record.codes2_at // record.row2 if down else 0
        scales_at = record.scales2_at if down else record.scales13_at
        cut = n, k, slabs, self.rows, self.runs, self.products
        self.weight = RecordFragments(record, slabs, first, scales_at, *cut)
        narrower = [width for width in (16, 32, 48, 56) if width < self.n_tile]
        self.widths = [*narrower[len(narrower) - narrow :], self.n_tile]
        self.experts, self.top_k, self.ctas = experts, top_k, ctas
        self.search = 1 << (experts - 1).bit_length()

    def records_source(self, records: Any) -> Any:
        """All records as rows of codes, to be copied from."""
        rows = records.shape[0] * self.weight.record_rows
        return self.codes.source(records, rows, self.weight.pitch)

    @cute.jit
    def tile_table(self, offsets: Any) -> Any:
        """-> in shared memory, for each expert the number of tiles of all before it; E + 1."""
        smem = cutlass.memory.SmemAllocator()
        per_lane = -(-self.experts // 32)
        table = smem.allocate_tensor(Int32, cute.make_layout(32 * per_lane + 1), 16)
        thread, _, _ = cute.arch.thread_idx()
        if thread < 32:
            total = Int32(0)
            for i in range_constexpr(per_lane):
                total += self._tiles_of(offsets, thread * per_lane + i)
            before = total
            for distance in (1, 2, 4, 8, 16):
                other = cute.arch.shuffle_sync_up(before, distance, mask_and_clamp=0)
                before += other * Int32(thread >= distance)
            before -= total
            for i in range_constexpr(per_lane):
                table[thread * per_lane + i] = before
                before += self._tiles_of(offsets, thread * per_lane + i)
            if thread == 31:
                table[32 * per_lane] = before
        cute.arch.sync_threads()
        return table

    @cute.jit
    def _tiles_of(self, offsets: Any, expert: Int32) -> Int32:
        own = cutlass.min(expert, self.experts - 1)
        count = offsets[own + 1] - offsets[own]
        return (count + self.n_tile - 1) // self.n_tile * Int32(expert < self.experts)

    @cute.jit
    def find(self, table: Any, offsets: Any, item: Int32) -> Any:
        """-> (expert, tile of rows, place in the list, tokens from there on) of a tile."""
        tile, m_tile = item // self.m_tiles, item % self.m_tiles
        expert = Int32(0)
        for i in range_constexpr(self.search.bit_length() - 1):
            step = self.search >> (i + 1)
            probe = cutlass.min(expert + step, self.experts)
            expert += step * Int32(table[probe] <= tile)
        first = offsets[expert] + (tile - table[expert]) * self.n_tile
        return expert, m_tile, first, cutlass.min(offsets[expert + 1] - first, self.n_tile)

    @cute.jit
    def consume_some(self, acc: Any, ring: Any, barriers: Any, count: Int32, done: Int32) -> None:
        """Multiply a tile of `count` tokens as the narrowest product that holds them."""
        for i in range_constexpr(len(self.widths)):
            narrower = self.widths[i - 1] if i else 0
            if (count > narrower) & (count <= self.widths[i]):
                self.consume(acc, ring, barriers, Int64(0), Int32(0), done, self.widths[i])


class ExpertsUp(ExpertGemm):
    """`h = silu(min(g, limit)) · clamp(u, -limit, limit) · weight`, g and u from w13.

    x: bfloat16 `[T, D]`, arranged; entries: int32, the list: token times k plus choice; offsets:
    int32 `[E + 1]`; weights: float32, in the list's order; places: int32 `[E]`, of the experts'
    records; records; global_scales: of w13; h: bfloat16 `[T k or more, I]`, rows in the list's
    order, columns arranged.
    """

    def __init__(
        self,
        experts: int,
        hidden: int,
        inter: int,
        top_k: int,
        limit: float,
        ctas: int,
        narrow: int = 0,
        *,
        arch: str,
        **tuning: int,
    ) -> None:
        record, shape = Record(hidden, inter), (2 * inter, hidden, 1)
        super().__init__(
            record, experts, top_k, ctas, narrow, *shape, gathers=True, arch=arch, **tuning
        )
        self.hidden, self.inter, self.limit = hidden, inter, limit
        self.h_cols = self.rows // 2
        self.h_pitch = self.h_cols * 2 + 16
        self.chunks = self.h_cols // 8

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        entries: cute.Tensor,
        offsets: cute.Tensor,
        weights: cute.Tensor,
        places: cute.Tensor,
        records: cute.Tensor,
        global_scales: cute.Tensor,
        h: cute.Tensor,
        stream: cuda.CUstream,
    ) -> None:
        source = self.records_source(records)
        listed = x, entries, offsets, weights
        self.kernel(*listed, *source, places, records, global_scales, h).launch(
            grid=[self.ctas, 1, 1],
            block=[self.threads, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        entries: cute.Tensor,
        offsets: cute.Tensor,
        weights: cute.Tensor,
        codes_atom: cute.CopyAtom,
        codes: cute.Tensor,
        places: cute.Tensor,
        records: cute.Tensor,
        global_scales: cute.Tensor,
        h: cute.Tensor,
    ) -> None:
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        ring, barriers, staging = self.allocate(STAGING_TOKENS * self.h_pitch)
        table = self.tile_table(offsets)
        items = table[self.experts] * self.m_tiles
        done = Int32(0)
        if thread < PRODUCERS:
            cute.arch.setmaxregister_decrease(self.producer_registers)
            tokens = cute.make_rmem_tensor(self.own_rows, Int32)
            weight = ((codes_atom, codes), records.iterator.toint())
            for item in cutlass.range(block, items, self.ctas, unroll=1):
                expert, m_tile, first, count = self.find(table, offsets, item)
                present = Int32(0)
                for i in range_constexpr(self.own_rows):
                    own = thread // 8 + 16 * i
                    here = Int32(own < count)
                    entry = entries.iterator[first + own * here]
                    tokens[i] = entry // self.top_k * (self.hidden // 8)
                    present = present | (here << i)
                source = (x.iterator.toint(), tokens, present)
                at = (places.iterator[expert], m_tile * self.rows)
                done = self.produce(ring, barriers, weight, at, source, done)
        else:
            cute.arch.setmaxregister_increase(self.consumer_registers)
            acc = cute.make_rmem_tensor(self.m_each * self.sums, Float32)
            for item in cutlass.range(block, items, self.ctas, unroll=1):
                expert, m_tile, first, count = self.find(table, offsets, item)
                self.consume_some(acc, ring, barriers, count, done)
                done += self.steps
                gate = global_scales[expert, 0] * Float32(self.weight.factor)
                up = global_scales[expert, 1] * Float32(self.weight.factor)
                for part in range_constexpr(self.n_tile // STAGING_TOKENS):
                    self._meet()
                    self._activate(acc, part, staging, weights, gate, up, first, count)
                    self._meet()
                    self._write(part, staging, h, m_tile, first, count)

    @cute.jit
    def _meet(self) -> None:
        """All consumers."""
        threads = WARPGROUP * self.warpgroups
        cute.arch.barrier(barrier_id=CONSUMERS_BARRIER, number_of_threads=threads)

    @cute.jit
    def _activate(
        self,
        acc: Any,
        part: cutlass.Constexpr[int],
        staging: Any,
        weights: Any,
        gate: Float32,
        up: Float32,
        first: Int32,
        count: Int32,
    ) -> None:
        """Gate and up stand in rows g and g + 8: one value for each token, into `staging`."""
        lane = cute.arch.lane_idx()
        g, t = lane // 4, lane % 4
        for m in range_constexpr(self.m_each):
            column = self.first_row() // 2 + 32 * m
            in_run = column % RUN
            place = (in_run // 8 % 2 * 2 + g % 4 // 2) * 16 + g % 2 * 8 + in_run // 16 * 2 + g // 4
            to = staging + (column // RUN * RUN + place) * 2
            for eight in range_constexpr(STAGING_TOKENS // 8):
                token = eight * 8 + t * 2
                at = m * self.sums + (part * STAGING_TOKENS + eight * 8) // 2
                values = []
                for second in range_constexpr(2):
                    own = cutlass.min(part * STAGING_TOKENS + token + second, count - 1)
                    value = swiglu(acc[at + second] * gate, acc[at + 2 + second] * up, self.limit)
                    values.append(value * weights.iterator[first + own])
                word = conversions.bf16_pair(values[0], values[1])
                shared_memory.store_half(to + token * self.h_pitch, word)
                shared_memory.store_half(to + (token + 1) * self.h_pitch, word >> 16)

    @cute.jit
    def _write(
        self,
        part: cutlass.Constexpr[int],
        staging: Any,
        h: Any,
        m_tile: Int32,
        first: Int32,
        count: Int32,
    ) -> None:
        """Some tokens of the tile's part of h, whole lines."""
        thread, _, _ = cute.arch.thread_idx()
        own = thread - PRODUCERS
        at_once = WARPGROUP * self.warpgroups // self.chunks
        base = h.iterator.toint() + Int64(m_tile * (self.h_cols * 2))
        for i in range_constexpr(STAGING_TOKENS // at_once):
            token, chunk = own // self.chunks + i * at_once, own % self.chunks
            if part * STAGING_TOKENS + token < count:
                words = shared_memory.load_words(staging + token * self.h_pitch + chunk * 16, 4)
                row = Int64(first + part * STAGING_TOKENS + token)
                to = base + row * (2 * self.inter) + Int64(chunk * 16)
                global_memory.store_words(to, words)


class ExpertsDown(ExpertGemm):
    """`w2 h`, a row for each token and choice, rounded to bfloat16.

    h: as `ExpertsUp` writes it; targets: int32, where the list's rows belong; offsets: int32
    `[E + 1]`; places, records: as of `ExpertsUp`; global_scales: of w2; partial: bfloat16
    `[T k or more, D]`.
    """

    def __init__(
        self,
        experts: int,
        hidden: int,
        inter: int,
        top_k: int,
        slabs: int,
        ctas: int,
        narrow: int = 0,
        *,
        arch: str,
        **tuning: int,
    ) -> None:
        assert slabs == W2_SLABS
        record, shape = Record(hidden, inter), (hidden, inter, slabs)
        super().__init__(record, experts, top_k, ctas, narrow, *shape, arch=arch, **tuning)
        self.inter = inter

    @cute.jit
    def __call__(
        self,
        h: cute.Tensor,
        targets: cute.Tensor,
        offsets: cute.Tensor,
        places: cute.Tensor,
        records: cute.Tensor,
        global_scales: cute.Tensor,
        partial: cute.Tensor,
        stream: cuda.CUstream,
    ) -> None:
        tokens = self.tokens.source(h, h.shape[0], self.inter)
        listed = *tokens, targets, offsets, *self.records_source(records)
        self.kernel(*listed, places, records, global_scales, partial).launch(
            grid=[self.ctas, 1, 1],
            block=[self.threads, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        h_atom: cute.CopyAtom,
        h: cute.Tensor,
        targets: cute.Tensor,
        offsets: cute.Tensor,
        codes_atom: cute.CopyAtom,
        codes: cute.Tensor,
        places: cute.Tensor,
        records: cute.Tensor,
        global_scales: cute.Tensor,
        partial: cute.Tensor,
    ) -> None:
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        ring, barriers, staging = self.allocate(self.warpgroups * STAGING_BYTES)
        table = self.tile_table(offsets)
        items = table[self.experts] * self.m_tiles
        done = Int32(0)
        if thread < PRODUCERS:
            cute.arch.setmaxregister_decrease(self.producer_registers)
            if thread < 32:
                weight = ((codes_atom, codes), records.iterator.toint())
                for item in cutlass.range(block, items, self.ctas, unroll=1):
                    expert, m_tile, first, _ = self.find(table, offsets, item)
                    source = ((h_atom, h), first, Int32(0))
                    at = (places.iterator[expert], m_tile * self.rows)
                    done = self.produce(ring, barriers, weight, at, source, done)
        else:
            cute.arch.setmaxregister_increase(self.consumer_registers)
            rows = cute.make_rmem_tensor(self.own_rows, Int32)
            acc = cute.make_rmem_tensor(self.m_each * self.sums, Float32)
            group = thread // WARPGROUP - 1
            for item in cutlass.range(block, items, self.ctas, unroll=1):
                expert, m_tile, first, count = self.find(table, offsets, item)
                self.consume_some(acc, ring, barriers, count, done)
                done += self.steps
                for i in range_constexpr(self.own_rows):
                    own = thread % WARPGROUP // 8 + 16 * i
                    here = Int32(own < count)
                    rows[i] = targets.iterator[first + own * here] * here + here - 1
                factor = global_scales[expert, 0] * Float32(self.weight.factor)
                own_staging = staging + group * STAGING_BYTES
                for m in range_constexpr(self.m_each):
                    column = m_tile * self.rows + (group * self.m_each + m) * 64
                    to = partial.iterator.toint() + Int64(column * 2)
                    self.write_bf16(acc, m, own_staging, factor, to, rows)
