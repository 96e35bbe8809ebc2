"""A token's experts and their weights, from its activations, in one launch.

    logits = gate · x,   affinity = sqrt(softplus(logit))
    the experts of highest affinity + bias, or those that a table lists for the token
    weight = affinity / Σ chosen affinities * scaling

Workers and finishers share the launch (see `roles`). A worker takes 32 experts (see
`weight_operands`) and a part of the columns, for eight tokens at once, and sends its sums to a
mailbox. A finisher per token has a thread for each expert, which adds that expert's sums in the
workers' order; one warp then picks the best, one after another: the highest score, the lowest
number among equal ones. Experts that do not fill a tile of 128 rows are read as copies of the last
one, whose sums nobody sends; threads that do not fill a warp look after no expert.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, range_constexpr

from dsv4.kernels.core.sizes import MAX_EXPERTS, MAX_TOP_K, SCALE_TILE_ROWS
from dsv4.kernels.device import async_copies, global_memory, mailbox, shared_memory
from dsv4.kernels.device.async_copies import LANE_BYTES, PIECE_BYTES
from dsv4.kernels.device.elementary import sqrt_softplus
from dsv4.kernels.device.global_memory import Load
from dsv4.kernels.device.mma import mma_bf16
from dsv4.kernels.device.roles import (
    FINISHER_BARRIER,
    GROUP,
    MAX_FINISHERS,
    WORKER_BARRIER,
    Roles,
)
from dsv4.kernels.device.weight_operands import (
    BAND_SUMS,
    MMAS,
    OPERANDS,
    STEP,
    WeightTensors,
    first_row,
    sum_place,
    sum_row,
)

X_PIECES = 4
TINY = 1e-20  # as the reference: keeps the quotient finite
LANES = 32


class ByScore(NamedTuple):
    """What chooses: bias float32 `[E]`, added to the affinities."""

    bias: cute.Tensor


class ByTable(NamedTuple):
    """What chooses: ids int32 `[T]`, and the experts of each id, tid2eid int64 `[V, top_k]`."""

    ids: cute.Tensor
    tid2eid: cute.Tensor


Choice = ByScore | ByTable


class Band(NamedTuple):
    """Of a worker's sums: tokens, experts and part of the columns; parity: which of two places."""

    group: Int32
    band: Int32
    part: Int32
    parity: Int32


@dataclasses.dataclass(eq=False, repr=False)
class Router:
    """The router of one layer.

    kind: of gate `[E, D]`, "nvfp4" or "bf16", with its slabs. top_k: experts of a token; hashed:
    whether a table chooses them. warps: of a worker, each of which takes 128 columns.

    x: bfloat16 `[T, D]`; gate: its tensors (`WeightTensors`); choice: those of `ByScore`, or of
    `ByTable`; topk_idx int32, topk_weights float32 `[T, top_k]`; letters: float32
    `[T, parts, E]`, zero before and after.
    """

    kind: str
    experts: int
    hidden: int
    slabs: int
    top_k: int
    hashed: bool
    scaling: float
    warps: int
    pdl: bool

    def __post_init__(self) -> None:
        self.ragged = self.experts % SCALE_TILE_ROWS != 0
        self.operand = OPERANDS[self.kind](self.experts, self.hidden, self.slabs, not self.ragged)
        self.parts = self.hidden // STEP // self.warps
        self.bands = -(-self.experts // SCALE_TILE_ROWS) * (SCALE_TILE_ROWS // LANES)
        self.finishing = -(-self.experts // LANES) * LANES  # threads
        self.roles = Roles(self.bands * self.parts, self.pdl)
        if self.hidden % (STEP * self.warps):
            raise ValueError(
                f"a gate of {self.experts} x {self.hidden} does not divide into {self.warps} warps"
            )
        if not self.top_k <= self.experts <= MAX_EXPERTS or self.top_k > MAX_TOP_K:
            raise ValueError(
                f"{self.top_k} of {self.experts} experts, expected at most {MAX_TOP_K} of "
                f"{MAX_EXPERTS}"
            )

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        gate: Any,
        choice: Any,
        topk_idx: cute.Tensor,
        topk_weights: cute.Tensor,
        letters: cute.Tensor,
        stream: cuda.CUstream,
    ) -> None:
        self.kernel(x, gate, choice, topk_idx, topk_weights, letters).launch(
            grid=[self.roles.ctas(Int32(x.shape[0])), 1, 1],
            block=[max(32 * self.warps, self.finishing), 1, 1],
            stream=stream,
            use_pdl=self.roles.pdl,
        )

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        gate: Any,
        choice: Any,
        topk_idx: cute.Tensor,
        topk_weights: cute.Tensor,
        letters: cute.Tensor,
    ) -> None:
        self.roles.begin()
        smem = cutlass.memory.SmemAllocator()
        sums = smem.allocate_tensor(Float32, cute.make_layout((BAND_SUMS, self.warps, 2)), 16)
        found = smem.allocate_tensor(Float32, cute.make_layout((self.finishing, 2, 2)), 16)
        copies = smem.allocate(self.operand.pieces * PIECE_BYTES * self.warps, 128).toint()
        block, _, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        slices = self.roles.slices(Int32(x.shape[0]))
        finisher = self.roles.finisher(block, slices)
        if finisher < 0:
            if thread < 32 * self.warps:
                self._work(x, WeightTensors(*gate), letters, sums, copies, slices)
        else:
            if thread < self.finishing:
                named = ByTable(*choice) if self.hashed else ByScore(*choice)
                self._finish(named, topk_idx, topk_weights, letters, found, finisher)

    @cute.jit
    def _work(
        self,
        x: cute.Tensor,
        gate: WeightTensors,
        letters: cute.Tensor,
        sums: cute.Tensor,
        copies: Int32,
        slices: Int32,
    ) -> None:
        """A worker: 32 experts' sums over its part of the columns, for groups of eight tokens."""
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        block, _, _ = cute.arch.block_idx()
        band = block % self.bands
        part = (block // self.bands) % self.parts
        step, t = part * self.warps + warp, lane % 4
        row = first_row(band) + lane // 4
        slot = copies + warp * (self.operand.pieces * PIECE_BYTES) + lane * LANE_BYTES
        scales = None if gate.scales is None else gate.scales.iterator
        at = slot
        for address in self.operand.addresses(gate.codes.iterator, scales, row, step, t):
            async_copies.copy(at, address, l2=256)
            at += PIECE_BYTES
        async_copies.commit()
        async_copies.wait(0)
        factor = Float32(self.operand.factor)
        if cutlass.const_expr(self.kind == "nvfp4"):
            factor *= gate.global_scale[0]
        self.roles.wait()
        tokens = Int32(x.shape[0])
        groups = self.roles.groups(tokens)
        parity = Int32(0)
        for group in cutlass.range(block // self.roles.workers, groups, slices, unroll=1):
            token = cutlass.min(group * GROUP + lane // 4, tokens - 1)
            acts: list[Any] = []
            for piece in range_constexpr(X_PIECES):
                column = step * STEP + self.operand.x_column(piece, t)
                acts.extend(
                    global_memory.load_words(
                        x.iterator + token * self.hidden + column, 4, Load.PAST_L1
                    )
                )
            own: list[Any] = []  # read again here: decoded while the activations are under way
            for piece in range_constexpr(self.operand.pieces):
                own.extend(shared_memory.load_words(slot + piece * PIECE_BYTES, 4))
            acc = self._multiply(own, acts, t)
            for c in range_constexpr(8):
                sums[c * 32 + lane, warp, parity] = acc[c]
            cute.arch.barrier(barrier_id=WORKER_BARRIER, number_of_threads=32 * self.warps)
            own_sums = Band(group, band, part, parity)
            self._send(letters, sums, own_sums, factor, tokens)
            parity = 1 - parity  # the next group's sums lie beside: nobody waits for readers

    def _multiply(self, own: Any, acts: Any, t: Int32) -> list[Float32]:
        """The lane's sums: two tiles of 16 rows, each in two chains of MMAs."""
        prepared = self.operand.prepare(own, t)
        sums: list[Float32] = []
        for tile in range(2):
            chains = [(Float32(0.0),) * 4] * 2
            for mma in range(MMAS):
                a = self.operand.a(own, prepared, tile, mma)
                chains[mma % 2] = mma_bf16(chains[mma % 2], a, self.operand.b(acts, mma))
            sums += [a + b for a, b in zip(*chains, strict=True)]
        return sums

    @cute.jit
    def _send(
        self,
        letters: cute.Tensor,
        sums: cute.Tensor,
        own: Band,
        factor: Float32,
        tokens: Int32,
    ) -> None:
        """Add the warps' sums in their order: one letter for each token."""
        thread, _, _ = cute.arch.thread_idx()
        for turn in range_constexpr(-(-BAND_SUMS // (32 * self.warps))):
            item = turn * 32 * self.warps + thread
            source, column = sum_place(item)
            token = own.group * GROUP + column
            expert = sum_row(own.band, item)
            there = (item < BAND_SUMS) & (token < tokens)
            if cutlass.const_expr(self.ragged):
                there = there & (expert < self.experts)
            if there:
                total = sums[source, 0, own.parity]
                for warp in range_constexpr(1, self.warps):
                    total += sums[source, warp, own.parity]
                place = (token * self.parts + own.part) * self.experts + expert
                mailbox.send(letters.iterator + place, total * factor)

    @cute.jit
    def _finish(
        self,
        choice: Any,
        topk_idx: cute.Tensor,
        topk_weights: cute.Tensor,
        letters: cute.Tensor,
        found: cute.Tensor,
        finisher: Int32,
    ) -> None:
        """A finisher: a thread for each expert; found: the experts' affinities, and their scores.

        One warp chooses while the others wait for the next token's sums.
        """
        thread, _, _ = cute.arch.thread_idx()
        bias = Float32(0.0)
        if cutlass.const_expr(not self.hashed):
            bias = choice.bias[cutlass.min(thread, self.experts - 1) if self.ragged else thread]
        self.roles.wait()
        tokens = Int32(topk_idx.shape[0])
        parity = Int32(0)
        for token in cutlass.range(finisher, tokens, MAX_FINISHERS, unroll=1):
            box = letters.iterator + token * self.parts * self.experts + thread
            logit = Float32(0.0)
            if cutlass.const_expr(self.ragged):
                if thread < self.experts:
                    logit = mailbox.receive(box, self.parts, self.experts)
            else:
                logit = mailbox.receive(box, self.parts, self.experts)
            affinity = sqrt_softplus(logit)
            found[thread, 0, parity] = affinity
            found[thread, 1, parity] = affinity + bias
            cute.arch.barrier(barrier_id=FINISHER_BARRIER, number_of_threads=self.finishing)
            if thread < LANES:
                expert = self._listed(choice, token)
                if cutlass.const_expr(not self.hashed):
                    expert = self._best(found, parity)
                own = Float32(0.0)
                if thread < self.top_k:
                    own = found[expert, 0, parity]
                total = Float32(TINY)
                for k in range_constexpr(self.top_k):
                    total += cute.arch.shuffle_sync(own, k)
                if thread < self.top_k:
                    topk_idx[token, thread] = expert
                    scaled = own * cute.arch.rcp_approx(total) * Float32(self.scaling)
                    topk_weights[token, thread] = scaled
            parity = 1 - parity

    def _listed(self, choice: Choice, token: Int32) -> Int32:
        """The lane's expert by the table. An id out of range reads the nearest row there is."""
        if isinstance(choice, ByScore):
            return Int32(0)
        ids, table = choice
        row = cutlass.min(cutlass.max(Int32(ids[token]), 0), Int32(table.shape[0]) - 1)
        return Int32(table[row, cutlass.min(cute.arch.lane_idx(), self.top_k - 1)])

    @cute.jit
    def _best(self, found: cute.Tensor, parity: Int32) -> Int32:
        """Lane k: the expert of the k-th highest score. A lane looks after neighbouring experts."""
        lane = cute.arch.lane_idx()
        count = self.finishing // LANES
        keys = [_ordered(found[lane * count + i, 1, parity]) for i in range(count)]
        if cutlass.const_expr(self.ragged):
            keys = [
                Uint32(cutlass.select_(lane * count + i < self.experts, keys[i], Uint32(0)))
                for i in range(count)
            ]
        chosen = Int32(0)
        for k in range_constexpr(self.top_k):
            highest = keys[0]
            for key in keys[1:]:
                highest = cutlass.max(highest, key)
            highest = cute.arch.warp_redux_sync(highest, "max")
            first = Int32(self.experts)
            for i in range_constexpr(count - 1, -1, -1):
                first = Int32(cutlass.select_(keys[i] == highest, lane * count + i, first))
            first = cute.arch.warp_redux_sync(first, "min")
            keys = [
                Uint32(cutlass.select_(lane * count + i == first, Uint32(0), keys[i]))
                for i in range(count)
            ]
            chosen = Int32(cutlass.select_(lane == k, first, chosen))
        return chosen


def _ordered(score: Float32) -> Uint32:
    """Unsigned numbers in the order of the scores; above 0."""
    bits = score.bitcast(Uint32)
    flipped = cutlass.select_(score < 0, bits ^ Uint32(0xFFFFFFFF), bits | Uint32(0x80000000))
    return Uint32(flipped)
