"""Scores of an indexer: `score(b) = Σ_h w_h · relu(q_h · k_b)` over the visible keys of a row.

Queries and keys are E2M1 with a power-of-two scale per 32 channels: their products are exact in
bfloat16 MMAs with float32 sums. Both are held relative to the largest scale of their head or key,
which goes into `w_h` and into the score. Query heads are the A operand and stay in registers;
eight keys at a time are the B operand, 16 bytes a lane, straight from a ring (see `async_copies`).
Lane `4g + t` has block `t` of 32 channels of head or key `g`, so that one scale serves all a lane
reads.

A CTA makes the queries of its row; its warps then take turns at eight keys. A score does not depend
on which warp makes it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, range_constexpr

from dsv4.kernels.device import (
    arithmetic,
    async_copies,
    conversions,
    global_memory,
    rounding,
    shared_memory,
)
from dsv4.kernels.device.async_copies import PIECE_BYTES
from dsv4.kernels.device.mma import mma_bf16
from dsv4.kernels.ops.indexer import query
from dsv4.kernels.ops.indexer.query import PARTS, STEPS, WIDTH

HEADS = 64
WARPS = HEADS // query.HEADS
THREADS = 32 * WARPS
KEYS = 8  # of a warp at a time
KEY_BYTES = WIDTH // 2
M_TILES = HEADS // 16
STAGE_BYTES = PIECE_BYTES + 32 * 4  # codes, then each lane's copy of its key's scales


class Queries(NamedTuple):
    """A row's, in shared memory: the A operand (an address), and what each head's score counts."""

    operand: Int32
    factors: cute.Tensor


class Keys(NamedTuple):
    """Addresses of a slot's codes and scales."""

    codes: Int64
    scales: Int64


@dataclasses.dataclass(eq=False, repr=False)
class IndexScores:
    """ratio: tokens per key; ctas: on all of the device, to share rows and keys among.

    position, slot: int32 `[T]`; cos, sin: float32 `[P, rope / 2]`; q: float32 `[T, 64 · 128]`;
    weights: float32 `[T, 64]`, not scaled yet; keys, scales: uint8 `[S, capacity, 64]` and
    `[S, capacity, 4]`; scores: float32 `[T, capacity]`. Only the visible keys' scores are written,
    and none where they are no more than `topk`, as there is nothing to choose.
    """

    heads: int
    width: int
    rope: int
    ratio: int
    topk: int
    ctas: int
    stages: int
    pdl: bool

    def __post_init__(self) -> None:
        if (self.heads, self.width) != (HEADS, WIDTH) or self.rope % query.BLOCK:
            raise ValueError(
                f"{self.heads} heads of {self.width} channels, {self.rope} of them rotated, "
                f"expected {HEADS} of {WIDTH} and a multiple of {query.BLOCK}"
            )
        self.scale = self.width**-0.5 * self.heads**-0.5

    @cute.jit
    def __call__(
        self,
        position: cute.Tensor,
        slot: cute.Tensor,
        cos: cute.Tensor,
        sin: cute.Tensor,
        q: cute.Tensor,
        weights: cute.Tensor,
        keys: cute.Tensor,
        scales: cute.Tensor,
        scores: cute.Tensor,
        stream: cuda.CUstream,
    ) -> None:
        rows, capacity = scores.shape
        share = cutlass.max(self.ctas // rows, 1)
        most = (capacity + KEYS - 1) // KEYS
        self.kernel(position, slot, cos, sin, q, weights, keys, scales, scores).launch(
            grid=[cutlass.min(share, most), rows, 1],
            block=[THREADS, 1, 1],
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def kernel(
        self,
        position: cute.Tensor,
        slot: cute.Tensor,
        cos: cute.Tensor,
        sin: cute.Tensor,
        q: cute.Tensor,
        weights: cute.Tensor,
        keys: cute.Tensor,
        scales: cute.Tensor,
        scores: cute.Tensor,
    ) -> None:
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
            cute.arch.griddepcontrol_wait()
        block, row, _ = cute.arch.block_idx()
        smem = cutlass.memory.SmemAllocator()
        operand = smem.allocate(M_TILES * query.M_TILE, 128).toint()
        rings = smem.allocate(WARPS * self.stages * STAGE_BYTES, 128).toint()
        each = query.raw_bytes(self.rope)
        raw = smem.allocate(WARPS * each, 128).toint() + cute.arch.warp_idx() * each
        factors = smem.allocate_tensor(Float32, cute.make_layout(HEADS), 16)
        own_ring = rings + cute.arch.warp_idx() * (self.stages * STAGE_BYTES)

        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        head = warp * query.HEADS + lane // 4
        at = Int32(global_memory.load_word((position.iterator + row).toint()))
        own_slot = global_memory.load_word((slot.iterator + row).toint())
        weight = global_memory.load_word((weights.iterator + row * HEADS + head).toint())
        query.fetch(q, row, HEADS, raw)
        visible = cutlass.min((at + 1) // self.ratio, keys.shape[1])
        if (visible > self.topk) & (block * KEYS < visible):
            query.fetch_angles(cos, sin, at, self.rope, raw)
            async_copies.commit()
            keys_at = own_slot.to(Int64) * keys.shape[1]
            source = Keys(
                (keys.iterator + keys_at * KEY_BYTES).toint(),
                (scales.iterator + keys_at * PARTS).toint(),
            )
            for stage in range_constexpr(self.stages - 1):
                self._copy(source, stage, visible, own_ring, stage)
                async_copies.commit()
            async_copies.wait(self.stages - 1)
            cute.arch.sync_warp()
            largest = query.encode(raw, self.rope, operand)
            if lane % 4 == 0:
                factors[head] = self._factor(weight.bitcast(Float32), largest)
            cute.arch.sync_threads()
            if self._first_key(0) < visible:
                self._score(Queries(operand, factors), source, scores, row, visible, own_ring)

    def _factor(self, weight: Float32, largest: Uint32) -> Float32:
        """The head's weight as the reference rounds it, times its scale."""
        low = conversions.bf16_low(conversions.bf16_pair(weight, Float32(0.0)))
        scaled = arithmetic.product(low, Float32(self.scale))
        return conversions.bf16_low(
            conversions.bf16_pair(scaled, Float32(0.0))
        ) * conversions.e8m0_to_f32(largest)

    @cute.jit
    def _copy(self, keys: Keys, turn: Int32, visible: Int32, own_ring: Int32, stage: Int32) -> None:
        """Ask for eight keys; the last visible one stands for those beyond it."""
        first = self._first_key(turn)
        if first < visible:
            lane = cute.arch.lane_idx()
            key = Int64(cutlass.min(first + lane // PARTS, visible - 1))
            slot = own_ring + stage * STAGE_BYTES
            async_copies.copy(slot + lane * 16, keys.codes + key * KEY_BYTES + (lane % PARTS) * 16)
            async_copies.copy(slot + PIECE_BYTES + lane * 4, keys.scales + key * PARTS, 4)

    def _first_key(self, turn: Any) -> Int32:
        """Of the warp; few keys are spread over all CTAs before a CTA's second warp has any."""
        block, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        return ((turn * WARPS + cute.arch.warp_idx()) * ctas + block) * KEYS

    @cute.jit
    def _score(
        self,
        queries: Queries,
        keys: Keys,
        scores: cute.Tensor,
        row: Int32,
        visible: Int32,
        own_ring: Int32,
    ) -> None:
        operand, factors = queries
        lane = cute.arch.lane_idx()
        a, w = [], []
        for tile in range_constexpr(M_TILES):
            for step in range_constexpr(STEPS):
                a.append(query.fragment(operand, tile, step))
            for half in range_constexpr(2):
                w.append(factors[tile * 16 + half * 8 + lane // 4])
        first, apart = self._first_key(0), self._first_key(1) - self._first_key(0)
        stage = Int32(0)
        for turn in cutlass.range((visible - first + apart - 1) // apart, unroll=1):
            async_copies.wait(self.stages - 2)
            at = own_ring + stage * STAGE_BYTES
            words = shared_memory.load_words(at + lane * 16, 4)
            packed = shared_memory.load_word(at + PIECE_BYTES + lane * 4)
            free = stage - 1 if stage > 0 else stage + self.stages - 1
            self._copy(keys, turn + self.stages - 1, visible, own_ring, free)
            async_copies.commit()
            stage = stage + 1 if stage < self.stages - 1 else 0
            sums = self._multiply(a, w, words, packed)
            self._store(sums, packed, scores, row, visible, self._first_key(turn))

    @cute.jit
    def _multiply(self, a: Any, w: Any, words: Any, packed: Uint32) -> Any:
        """-> the lane's part of the sums over heads, for keys `2t` and `2t + 1` of eight."""
        exponent = (packed >> Uint32((cute.arch.lane_idx() % 4) * 8)) & Uint32(0xFF)
        scale = rounding.relative_scale(exponent, rounding.bytes_max(packed))
        b = rounding.e2m1_operands(words, scale)
        dots = [tuple(Float32(0.0) for _ in range(4)) for _ in range(M_TILES)]
        for step in range_constexpr(STEPS):
            for tile in range_constexpr(M_TILES):
                dots[tile] = mma_bf16(dots[tile], a[tile * STEPS + step], b[step])
        sums = [Float32(0.0), Float32(0.0)]
        for tile in range_constexpr(M_TILES):
            for half in range_constexpr(2):
                for key in range_constexpr(2):
                    hit = cute.arch.fmax(dots[tile][2 * half + key], Float32(0.0))
                    sums[key] += hit * w[2 * tile + half]
        return sums

    @cute.jit
    def _store(
        self, sums: Any, packed: Uint32, scores: Any, row: Int32, visible: Int32, first: Int32
    ) -> None:
        """Sum over the lanes of other heads; lane `4g + t`, g < 2, writes key `2t + g`."""
        lane = cute.arch.lane_idx()
        g, t = lane // 4, lane % 4
        odd = g % 2
        kept = sums[1] if odd == 1 else sums[0]
        sent = sums[0] if odd == 1 else sums[1]
        total = kept + cute.arch.shuffle_sync_bfly(sent, offset=4)
        total += cute.arch.shuffle_sync_bfly(total, offset=8)
        total += cute.arch.shuffle_sync_bfly(total, offset=16)
        key = 2 * t + odd
        scale = cute.arch.shuffle_sync(conversions.e8m0_to_f32(rounding.bytes_max(packed)), key * 4)
        if (g < 2) & (first + key < visible):
            scores[row, first + key] = total * scale
