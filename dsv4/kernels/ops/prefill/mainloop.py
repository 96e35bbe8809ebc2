"""The pipeline of a product of a weight with many tokens: who copies, who multiplies, and when.

A CTA is one warpgroup of producers and a few of consumers. Producers fill a ring of stages, rows
of the weight and `n_tile` tokens, some runs of 64 columns each; it goes on from one tile to the
next. A consumer warpgroup owns `64 m_each` rows. It turns them into bfloat16 in registers while its
previous product runs: the weight is the A operand, the tokens are the N side, so that a weight is
unpacked once for all tokens of a tile. A token's sums never meet another token's.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, range_constexpr

from dsv4.kernels.device import matrix_memory
from dsv4.kernels.device.tma_tiles import Tile, copy_tile
from dsv4.kernels.device.warpgroup import product
from dsv4.kernels.device.warpgroup.layout import MMA_COLS, TILE_ROW_BYTES
from dsv4.kernels.ops.prefill.weight_fragments import FRAGMENTS, RUN

WARPGROUP = 128
PRODUCERS = 128  # threads; those of the first warp alone drive the copy unit
STAGING_BARRIER = 1  # named barriers 1… are the consumer warpgroups' own, 15 is theirs together
CONSUMERS_BARRIER = 15
SHARED_BYTES = 227 << 10  # of a CTA
OTHER_BYTES = 4 << 10  # alignment, barriers, an expert's tiles
STAGING_TOKENS = 32
STAGING_BYTES = STAGING_TOKENS * 128  # of one warpgroup


class Mainloop:
    """One weight shape and one cut of the work.

    warpgroups: of `64 m_each` rows. n_tile: tokens. runs: of 64 columns in a stage. unroll: stages
    in the body of the loop. gathers: tokens are copied one by one, by all producers, from anywhere.
    """

    def __init__(
        self,
        kind: str,
        n: int,
        k: int,
        slabs: int,
        *,
        warpgroups: int,
        m_each: int,
        n_tile: int,
        runs: int,
        stages: int,
        unroll: int = 1,
        gathers: bool = False,
    ) -> None:
        self.m_each, self.n_tile, self.runs = m_each, n_tile, runs
        self.rows = 64 * warpgroups * m_each
        self.sums = n_tile // 2  # float32 registers of 64 rows
        self.weight: Any = FRAGMENTS[kind](n, k, slabs, self.rows, runs)
        self.n, self.k, self.warpgroups = n, k, warpgroups
        self.stages, self.unroll, self.gathers = stages, unroll, gathers
        self.steps = k // (runs * RUN)
        self.m_tiles = n // self.rows
        if self.steps % unroll or runs * unroll * m_each < 2 or m_each > 2:
            raise ValueError(f"{self.steps} steps, unrolled {unroll} x {runs} runs x {m_each}")
        self.token_bytes = n_tile * TILE_ROW_BYTES  # of one run
        self.weight_bytes = -(-self.weight.stage_bytes // 1024) * 1024
        self.stage_bytes = self.weight_bytes + runs * self.token_bytes
        self.threads = PRODUCERS + WARPGROUP * warpgroups
        self.own_rows = n_tile * 8 // PRODUCERS  # tokens that a thread of 128 moves chunks of
        element = BFloat16 if kind == "bf16" else Uint8
        weight = self.weight
        self.codes = Tile(weight.box, weight.row_elements, runs, element, weight.swizzled)
        self.tokens = Tile(n_tile, RUN, runs, BFloat16, True)
        producer, consumer = {1: (56, 240), 2: (56, 224), 3: (56, 144), 4: (64, 104)}[warpgroups]
        self.producer_registers, self.consumer_registers = producer, consumer

    @cute.jit
    def allocate(self, staging_bytes: cutlass.Constexpr[int]) -> Any:
        """-> (the stages, full barriers, empty ones after them, address of the staging)."""
        self._require_room(staging_bytes)
        smem = cutlass.memory.SmemAllocator()
        bytes_ = cute.make_layout(self.stages * self.stage_bytes)
        ring = smem.allocate_tensor(Uint8, bytes_, 1024)
        barriers = smem.allocate_tensor(Int64, cute.make_layout(2 * self.stages), 16)
        staging = smem.allocate_tensor(Uint8, cute.make_layout(staging_bytes), 128)
        thread, _, _ = cute.arch.thread_idx()
        if thread == 0:
            arrivals = 1 + (PRODUCERS if self.gathers else 0)
            for stage in range_constexpr(self.stages):
                cute.arch.mbarrier_init(barriers.iterator + stage, arrivals)
                cute.arch.mbarrier_init(
                    barriers.iterator + self.stages + stage, 4 * self.warpgroups
                )
            cute.arch.mbarrier_init_fence()
        return ring.iterator, barriers.iterator, staging.iterator.toint()

    def _require_room(self, staging_bytes: int) -> None:
        nbytes = self.stages * self.stage_bytes + staging_bytes + OTHER_BYTES
        if nbytes > SHARED_BYTES:
            raise ValueError(f"{nbytes} bytes of shared memory, there are {SHARED_BYTES}")

    @cute.jit
    def produce(
        self, ring: Any, barriers: Any, weight: Any, at: Any, tokens: Any, done: Int32
    ) -> Int32:
        """Copy one tile's stages. done: stages before; -> after.

        By the first warp, or by all producers when they gather. weight: (source of the codes,
        address of the scales); at: (matrix, its row). tokens: (source, first token, first run); or
        gathered, (address of the first column, offsets of the own_rows tokens `16 i + thread / 8`
        in 16 bytes, a bit for each that is there).
        """
        stage, turn = done % self.stages, done // self.stages
        for step in cutlass.range(self.steps, unroll=1):
            full = barriers + stage
            cute.arch.mbarrier_wait(full + self.stages, (turn & 1) ^ 1)
            if cutlass.const_expr(self.gathers):
                if cute.arch.warp_idx() == 0:
                    self._copy_weight(ring, weight, at, step, stage, full)
                self._gather(ring, tokens, step, stage)
                cute.arch.cp_async_mbarrier_arrive_noinc(full)
            else:
                self._copy_weight(ring, weight, at, step, stage, full)
                source, token, run = tokens
                to = self.tokens.stages(ring, self.weight_bytes, self.stages, self.stage_bytes)
                run += step * self.runs
                copy_tile(source, to, stage, token, run, full, self.tokens.shape)
            stage, turn = self._following(stage, turn)
        return done + self.steps

    def _following(self, stage: Int32, turn: Int32) -> tuple[Int32, Int32]:
        last = Int32(stage == self.stages - 1)
        return (stage + 1) * (1 - last), turn + last

    @cute.jit
    def _copy_weight(
        self, ring: Any, weight: Any, at: Any, step: Int32, stage: Int32, full: Any
    ) -> None:
        """Codes and scales, and the bytes that are to count at `full` in all."""
        source, scales = weight
        with cute.arch.elect_one():
            nbytes = self.weight.stage_bytes + (0 if self.gathers else self.tokens.nbytes)
            cute.arch.mbarrier_arrive_and_expect_tx(full, nbytes)
        place = self.weight.place(at[0], at[1], step)
        for box in range_constexpr(self.rows // self.weight.box):
            to = self.codes.stages(ring, box * self.codes.nbytes, self.stages, self.stage_bytes)
            row = place[0] + box * self.weight.box
            copy_tile(source, to, stage, row, place[1], full, self.codes.shape)
        if cutlass.const_expr(self.weight.scale_bytes > 0):
            with cute.arch.elect_one():
                base = ring.toint() + stage * self.stage_bytes
                self.weight.copy_scales(scales, place, base, full.toint())

    @cute.jit
    def _gather(self, ring: Any, tokens: Any, step: Int32, stage: Int32) -> None:
        """A thread's chunks of its tokens."""
        x, offsets, present = tokens
        thread, _, _ = cute.arch.thread_idx()
        chunk, row = thread % 8, thread // 8
        swizzled = row * TILE_ROW_BYTES + (chunk ^ (row % 8)) * 16
        from_x = x + Int64(step * (2 * RUN * self.runs) + chunk * 16)
        to_x = ring.toint() + stage * self.stage_bytes + self.weight_bytes + swizzled
        for i in range_constexpr(self.own_rows):
            nbytes = ((present >> i) & 1) * 16
            source_row = from_x + Int64(offsets[i]) * 16
            for run in range_constexpr(self.runs):
                to = i * (PRODUCERS // 8) * TILE_ROW_BYTES + run * self.token_bytes
                of = run * TILE_ROW_BYTES
                matrix_memory.copy_async(to_x, source_row, nbytes, to, of)

    @cute.jit
    def consume(
        self,
        acc: Any,
        ring: Any,
        barriers: Any,
        scales: Int64,
        row: Int32,
        done: Int32,
        n: cutlass.Constexpr[int],
    ) -> None:
        """Multiply one tile's stages into `acc`, `[m_each][n_tile / 2]`, for its first n tokens.

        scales: address of the block scales and row the tile's first, where the format has them.
        done: stages before.
        """
        lane = cute.arch.lane_idx()
        first = self.first_row() + lane // 4
        places = [self.weight.lane(first + 64 * m, lane % 4) for m in range(self.m_each)]
        empty = barriers + self.stages
        acc.fill(0.0)
        row += self.first_row()
        following = self.weight.block_scale(scales, row, Int32(0))
        stage, turn, before = done % self.stages, done // self.stages, Int32(0)
        for body in cutlass.range(self.steps // self.unroll, unroll=1):
            for part in range_constexpr(self.unroll):
                block_scale = following
                if cutlass.const_expr(self.weight.block_scales):
                    step = cutlass.min(body * self.unroll + part + 1, self.steps - 1)
                    following = self.weight.block_scale(scales, row, step)
                self._await(barriers + stage, turn & 1)
                base = ring.toint() + stage * self.stage_bytes
                for run in range_constexpr(self.runs):
                    for m in range_constexpr(self.m_each):
                        self._multiply(acc, base, run, m, places[m], block_scale, n)
                        # All products but the last are done, so the stage before is free.
                        if (run + m == 0) & ((body > 0) | (part > 0)) & (lane == 0):
                            cute.arch.mbarrier_arrive(empty + before)
                before = stage
                stage, turn = self._following(stage, turn)
        for m in range_constexpr(self.m_each):
            sums = product.wait_for([acc[m * self.sums + i] for i in range(n // 2)])
            _put(sums, acc, m * self.sums)
        if lane == 0:
            cute.arch.mbarrier_arrive(empty + before)

    @cute.jit
    def _await(self, full: Any, phase: Int32) -> None:
        """A warp waits for a stage."""
        cute.arch.mbarrier_wait(full, phase)
        if cutlass.const_expr(self.gathers):  # by cp.async, and `wgmma` reads otherwise
            cute.arch.fence_proxy("async.shared", space="cta")

    @cute.jit
    def _multiply(
        self,
        acc: Any,
        stage: Int32,
        run: cutlass.Constexpr[int],
        m: cutlass.Constexpr[int],
        place: Any,
        block_scale: Any,
        n: cutlass.Constexpr[int],
    ) -> None:
        """Unpack a run of 64 rows and issue its products; return when those before are done.

        Until then the registers of `a` are the tensor cores': two calls must not share them, hence
        at least two in the body of the loop.
        """
        a = self.weight.a(self.weight.load(stage, run, place), block_scale)
        tile = product.tile(stage + self.weight_bytes + run * self.token_bytes)
        sums = [acc[m * self.sums + i] for i in range(n // 2)]
        product.fence()
        for step in range_constexpr(RUN // MMA_COLS):
            sums = product.multiply(sums, a[step], product.columns(tile, step))
        product.commit()
        _put(sums, acc, m * self.sums)
        product.wait(1)

    @cute.jit
    def first_row(self) -> Int32:
        """The first of the 16 rows of the CTA's that a warp has of its warpgroup's first 64."""
        warp = cute.arch.warp_idx() - PRODUCERS // 32
        return warp // 4 * (64 * self.m_each) + warp % 4 * 16

    @cute.jit
    def write_bf16(
        self,
        acc: Any,
        m: cutlass.Constexpr[int],
        staging: Any,
        factor: Float32,
        out: Int64,
        rows: Any,
    ) -> None:
        """Round 64 rows of a tile to bfloat16 and write them: whole lines of 128 bytes a token.

        staging: address of the warpgroup's STAGING_BYTES. out: address of the first of the 64
        columns in row 0. rows: of the output, for tokens `16 i + thread / 8` of the warpgroup's
        threads; -1 where there is none.
        """
        thread, _, _ = cute.arch.thread_idx()
        lane, warp = thread % 32, thread // 32 % 4
        group, chunk = thread // WARPGROUP, thread % 8
        for first in range_constexpr(0, self.n_tile, STAGING_TOKENS):
            cute.arch.barrier(barrier_id=STAGING_BARRIER + group, number_of_threads=WARPGROUP)
            for some in range_constexpr(0, STAGING_TOKENS, 16):
                pairs = []
                for part in range_constexpr(4):
                    at = m * self.sums + (first + some) // 2 + 2 * part
                    pairs.append(matrix_memory.pack_bf16(acc[at] * factor, acc[at + 1] * factor))
                token = some + lane // 16 * 8 + lane % 8
                place = (warp * 2 + lane // 8 % 2) ^ (token % 8)
                matrix_memory.store_transposed(staging + token * 128 + place * 16, pairs)
            cute.arch.barrier(barrier_id=STAGING_BARRIER + group, number_of_threads=WARPGROUP)
            for i in range_constexpr(STAGING_TOKENS // 16):
                token = thread % WARPGROUP // 8 + i * 16
                row = rows[first // 16 + i]
                if row >= 0:
                    words = matrix_memory.load_b128(
                        staging + token * 128 + (chunk ^ (token % 8)) * 16
                    )
                    to = out + Int64(row) * (2 * self.n) + Int64(chunk * 16)
                    matrix_memory.store_global_b128(to, words)


def _put(sums: list[Any], acc: Any, first: int) -> None:
    """Into registers from `first` on."""
    for i, value in enumerate(sums):
        acc[first + i] = value
