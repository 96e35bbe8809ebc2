"""Hyper-connections in one launch: spread a sublayer's output, mix, collapse, norm.

    X'   = the streams after the last sublayer (see `sources`), written
    mix  = (fn · X') / rms(X')                  24 values of a token, from 4 D columns
    pre, post, comb from mix;  x = rms_norm(Σ_j pre_j X'_j)

Workers and finishers share the launch (see `roles`). Workers own `4 * width * warps` columns of
every stream, with the columns of `fn` that meet them: they make X', write it, and send their part
of the sums to a mailbox. A finisher per token makes the token's X' once more, for itself, while the
sums are under way, then adds them in the workers' order; nothing is read back. Its last warp turns
the sums into post and comb while the others collapse and norm.

The product runs on tensor cores: `fn` is the A operand, split into three bfloat16 that sum to it
exactly, tokens are the eight columns of B. The four lanes of a token take `width` neighbouring
columns each; the 16 rows of a B operand are one column of each lane by the four streams, as post
leaves them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Uint32, range_constexpr

from dsv4.kernels.device import (
    arithmetic,
    async_copies,
    conversions,
    global_memory,
    mailbox,
    shared_memory,
)
from dsv4.kernels.device.async_copies import LANE_BYTES
from dsv4.kernels.device.elementary import exp, sigmoid
from dsv4.kernels.device.mma import mma_bf16
from dsv4.kernels.device.roles import (
    FINISHER_BARRIER,
    GROUP,
    MAX_FINISHERS,
    WORKER_BARRIER,
    Roles,
)
from dsv4.kernels.ops.hyper_connections.sinkhorn import sinkhorn
from dsv4.kernels.ops.hyper_connections.sources import STREAMS, Sources, Streams

TOKEN_LANES = 4  # of a token in an operand B
LETTER = 32  # words that a worker sends of a token: the mix, and at SQUARES the sum of squares
SQUARES = 24
PADDED = 36  # floats between tokens in shared memory: no bank conflicts
PIECES = 3  # bfloat16 that a float32 is the sum of
NORM_BARRIER = 3  # of a finisher's collapsing warps, which share the sum of squares


class Weights(NamedTuple):
    """fn: float32 `[24, 4 D]`, for the last place 4 rows; base, scale of the mix; norm `[D]`."""

    fn: cute.Tensor
    base: cute.Tensor
    scale: cute.Tensor
    norm: cute.Tensor


class Outputs(NamedTuple):
    """streams: not those of the sources; x: bfloat16 `[T, D]`; the last place has no more."""

    streams: cute.Tensor
    x: cute.Tensor
    post: Any = None
    comb: Any = None


class Shared(NamedTuple):
    """Shared memory of a CTA. copies: weights under way (an address); sums: a worker's, by warp;
    totals, squares: a finisher's, by warp. The last two and sums have two places in turn, so that
    nobody waits until a token's have been read.
    """

    copies: Int32
    sums: cute.Tensor
    totals: cute.Tensor
    squares: cute.Tensor


@dataclasses.dataclass(eq=False, repr=False)
class Mhc:
    """One place of hyper-connections in the model.

    place: "first" (the streams are embeddings), "middle", or "last" (collapse for the head, without
    post and comb). hidden: D. width: columns of a worker's lane; warps: of a worker; finish_warps:
    of a finisher, that collapse. u_type, u_parts: see `Streams`.

    The tensors of a launch: sources (see `Streams`), `Weights`, `Outputs`, and letters: float32
    `[T, workers, 32]`, zero before and after.
    """

    place: str
    hidden: int
    width: int
    warps: int
    finish_warps: int
    iterations: int
    hc_eps: float
    norm_eps: float
    u_type: str
    u_parts: int
    pdl: bool

    def __post_init__(self) -> None:
        self.last = self.place == "last"
        self.streams = Streams(self.hidden, self.place == "first", self.u_type, self.u_parts)
        self.rows = STREAMS if self.last else (2 + STREAMS) * STREAMS
        self.bands = -(-self.rows // 8)  # of eight rows of fn
        self.piece_bytes = 32 * 4 * self.width
        columns = TOKEN_LANES * self.width * self.warps
        self.workers = self.hidden // columns
        self.roles = Roles(self.workers, self.pdl)
        eights = 32 * self.finish_warps  # of columns, that a finisher's threads take at once
        self.chunks = self.hidden // 8 // eights
        whole = self.hidden == 8 * eights * self.chunks
        if not whole or self.hidden % columns or self.workers % self.finish_warps:
            raise ValueError(
                f"{self.hidden} columns do not divide into {self.warps}, {self.finish_warps} warps"
            )

    @cute.jit
    def __call__(
        self, sources: Any, weights: Any, outputs: Any, letters: cute.Tensor, stream: cuda.CUstream
    ) -> None:
        self.kernel(sources, weights, outputs, letters).launch(
            grid=[self.roles.ctas(Int32(Outputs(*outputs).x.shape[0])), 1, 1],
            block=[32 * max(self.warps, self.finish_warps + 1), 1, 1],
            stream=stream,
            use_pdl=self.roles.pdl,
        )

    @cute.kernel
    def kernel(self, sources: Any, weights: Any, outputs: Any, letters: cute.Tensor) -> None:
        self.roles.begin()
        smem = cutlass.memory.SmemAllocator()
        fn_bytes = STREAMS * self.bands * self.warps * self.piece_bytes
        copies = smem.allocate(max(fn_bytes, 4 * self.hidden), 128).toint()
        sums = smem.allocate_tensor(Float32, cute.make_layout((GROUP * PADDED, self.warps, 2)), 16)
        totals = smem.allocate_tensor(Float32, cute.make_layout((LETTER, self.finish_warps, 2)), 16)
        squares = smem.allocate_tensor(Float32, cute.make_layout((self.finish_warps, 2)), 16)
        shared = Shared(copies, sums, totals, squares)
        block, _, _ = cute.arch.block_idx()
        warp = cute.arch.warp_idx()
        named, out, given = Weights(*weights), Outputs(*outputs), self.streams.named(sources)
        slices = self.roles.slices(Int32(out.x.shape[0]))
        finisher = self.roles.finisher(block, slices)
        if finisher < 0:
            if warp < self.warps:
                self._work(given, named.fn, out.streams, letters, shared, slices)
        else:
            if warp < self.finish_warps:
                self._collapse(given, named, out.x, letters, shared, finisher)
            if cutlass.const_expr(not self.last):  # noqa: SIM102  (one is of the compiler)
                if warp == self.finish_warps:
                    self._coefficients(named, out, shared.totals, finisher)

    @cute.jit
    def _work(
        self,
        sources: Sources,
        fn: cute.Tensor,
        streams: cute.Tensor,
        letters: cute.Tensor,
        shared: Shared,
        slices: Int32,
    ) -> None:
        """A worker: X' of its columns, and what they add to the mix and to the sum of squares."""
        copies, sums = shared.copies, shared.sums
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        block, _, _ = cute.arch.block_idx()
        worker = block % self.workers
        g, t = lane // 4, lane % 4
        column = ((worker * self.warps + warp) * TOKEN_LANES + t) * self.width
        slot = copies + warp * (STREAMS * self.bands * self.piece_bytes) + lane * (4 * self.width)
        for band in range_constexpr(self.bands):
            row = (8 * band + g) % self.rows
            for j in range_constexpr(STREAMS):
                at = fn.iterator + (row * STREAMS + j) * self.hidden + column
                async_copies.copy(
                    slot + (STREAMS * band + j) * self.piece_bytes, at, 4 * self.width, l2=256
                )
        async_copies.commit()
        async_copies.wait(0)
        fn_words = [
            [
                shared_memory.load_words(slot + (STREAMS * band + j) * self.piece_bytes, self.width)
                for j in range(STREAMS)
            ]
            for band in range(self.bands)
        ]
        self.roles.wait()
        tokens = Int32(streams.shape[0])
        parity = Int32(0)
        groups = self.roles.groups(tokens)
        for group in cutlass.range(block // self.workers, groups, slices, unroll=1):
            token = group * GROUP + g
            after = self.streams(sources, cutlass.min(token, tokens - 1), column, self.width)
            if token < tokens:
                for k in range_constexpr(STREAMS):
                    place = (token * STREAMS + k) * self.hidden + column
                    global_memory.store_words(streams.iterator + place, after[k])
            square = Float32(0.0)
            for k in range_constexpr(STREAMS):
                for value in conversions.bf16_values(after[k]):
                    square = cute.math.fma(value, value, square)
            square += cute.arch.shuffle_sync_bfly(square, 1)
            square += cute.arch.shuffle_sync_bfly(square, 2)
            acc = self._multiply(self._operands(fn_words), after)
            for band in range_constexpr(self.bands):
                for c in range_constexpr(2):
                    sums[(2 * t + c) * PADDED + 8 * band + g, warp, parity] = acc[band][c]
            if t == 0:
                sums[g * PADDED + SQUARES, warp, parity] = square
            cute.arch.barrier(barrier_id=WORKER_BARRIER, number_of_threads=32 * self.warps)
            self._send(letters, sums, group, worker, parity, tokens)
            parity = 1 - parity

    def _operands(self, fn: Any) -> list[list[list[Any]]]:
        """The lane's A operands: per column and tile of 16 rows of fn, the pieces."""
        operands = []
        for i in range(self.width):
            halves = [[_split(band[h][i], band[h + 1][i]) for h in (0, 2)] for band in fn]
            if self.bands % 2:
                halves.append([[Uint32(0)] * PIECES] * 2)
            operands.append(
                [
                    [(low[0][n], high[0][n], low[1][n], high[1][n]) for n in range(PIECES)]
                    for low, high in zip(halves[::2], halves[1::2], strict=True)
                ]
            )
        return operands

    def _multiply(self, operands: Any, after: Any) -> list[list[Float32]]:
        """-> per band of eight rows of fn, the lane's sums for tokens 2t and 2t + 1."""
        acc = [[(Float32(0.0),) * 4 for _ in range(PIECES)] for _ in operands[0]]
        for i, tiles in enumerate(operands):
            select = 0x5410 if i % 2 == 0 else 0x7632
            b = tuple(
                arithmetic.byte_permute(after[h][i // 2], after[h + 1][i // 2], select)
                for h in (0, 2)
            )
            for own, pieces in zip(acc, tiles, strict=True):
                for n in range(PIECES):
                    own[n] = mma_bf16(own[n], pieces[n], b)
        sums = [[a + (b + c) for a, b, c in zip(*own, strict=True)] for own in acc]
        return [sums[band // 2][2 * (band % 2) :][:2] for band in range(self.bands)]

    @cute.jit
    def _send(
        self,
        letters: cute.Tensor,
        sums: cute.Tensor,
        group: Int32,
        worker: Int32,
        parity: Int32,
        tokens: Int32,
    ) -> None:
        """Add the warps' sums in their order: one letter for each token."""
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        for turn in range_constexpr(-(-GROUP // self.warps)):
            at = turn * self.warps + warp
            token = group * GROUP + at
            if (at < GROUP) & (token < tokens) & self._used(lane):
                total = sums[at * PADDED + lane, 0, parity]
                for other in range_constexpr(1, self.warps):
                    total += sums[at * PADDED + lane, other, parity]
                place = (token * self.workers + worker) * LETTER + lane
                mailbox.send(letters.iterator + place, total)

    def _used(self, lane: Int32) -> Any:
        """Whether word `lane` of a letter carries something."""
        return (lane < self.rows) | (lane == SQUARES)

    @cute.jit
    def _receive(self, letters: cute.Tensor, token: Int32) -> Float32:
        """The sum, in their order, of every `finish_warps`-th letter's word `lane`."""
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        box = letters.iterator + (token * self.workers + warp) * LETTER + lane
        total = Float32(0.0)
        if self._used(lane):
            stride = self.finish_warps * LETTER
            total = mailbox.receive(box, self.workers // self.finish_warps, stride)
        cute.arch.sync_warp()
        return total

    def _mix(self, totals: cute.Tensor, parity: Int32) -> Float32:
        """The lane's value of the mix."""
        lane = cute.arch.lane_idx()
        total = totals[lane, 0, parity]
        for warp in range(1, self.finish_warps):
            total += totals[lane, warp, parity]
        mean = cute.arch.shuffle_sync(total, SQUARES) * Float32(1 / (STREAMS * self.hidden))
        return total * cute.math.rsqrt(mean + Float32(self.norm_eps))

    def _affine(self, weights: Weights) -> tuple[Float32, Float32]:
        """Scale and base of the lane's value: pre, post, comb."""
        lane = cutlass.min(cute.arch.lane_idx(), self.rows - 1)
        kind = cutlass.min(lane // STREAMS, 2)
        return weights.scale[kind], weights.base[lane]

    @cute.jit
    def _collapse(
        self,
        sources: Sources,
        weights: Weights,
        x: cute.Tensor,
        letters: cute.Tensor,
        shared: Shared,
        finisher: Int32,
    ) -> None:
        """A finisher but for its last warp: x of every token that it takes."""
        copies, totals, squares = shared.copies, shared.totals, shared.squares
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        threads, thread = 32 * self.finish_warps, warp * 32 + lane
        slot = copies + thread * LANE_BYTES
        for half in range_constexpr(2 * self.chunks):
            column = 8 * (half // 2 * threads + thread) + 4 * (half % 2)
            async_copies.copy(
                slot + half * threads * LANE_BYTES,
                weights.norm.iterator + column,
                l2=256,
            )
        async_copies.commit()
        scale, base = self._affine(weights)
        self.roles.wait()
        tokens = Int32(x.shape[0])
        parity = Int32(0)
        for token in cutlass.range(finisher, tokens, MAX_FINISHERS, unroll=1):
            after = [
                self.streams(sources, token, 8 * (c * threads + thread), 8)
                for c in range(self.chunks)
            ]
            totals[lane, warp, parity] = self._receive(letters, token)
            listeners = threads if self.last else threads + 32
            cute.arch.barrier(barrier_id=FINISHER_BARRIER, number_of_threads=listeners)
            mix = self._mix(totals, parity)
            weight = sigmoid(cute.math.fma(mix, scale, base)) + Float32(self.hc_eps)
            pre = [cute.arch.shuffle_sync(weight, j) for j in range(STREAMS)]
            y = [_weighted(pre, chunk) for chunk in after]
            square = Float32(0.0)
            for chunk in y:
                for value in chunk:
                    square = cute.math.fma(value, value, square)
            squares[warp, parity] = cute.arch.warp_reduction_sum(square)
            cute.arch.barrier(barrier_id=NORM_BARRIER, number_of_threads=threads)
            total = squares[0, parity]
            for other in range_constexpr(1, self.finish_warps):
                total += squares[other, parity]
            mean = total * Float32(1 / self.hidden)
            inverse = cute.math.rsqrt(mean + Float32(self.norm_eps))
            async_copies.wait(0)
            for c in range_constexpr(self.chunks):
                norm: list[Any] = []
                for half in range_constexpr(2):
                    norm.extend(
                        shared_memory.load_words(slot + (2 * c + half) * threads * LANE_BYTES, 4)
                    )
                values = [norm[i].bitcast(Float32) * (y[c][i] * inverse) for i in range(8)]
                at = token * self.hidden + 8 * (c * threads + thread)
                global_memory.store_words(x.iterator + at, conversions.bf16_pairs(values))
            parity = 1 - parity

    @cute.jit
    def _coefficients(
        self, weights: Weights, outputs: Outputs, totals: cute.Tensor, finisher: Int32
    ) -> None:
        """post and comb of every token, by one warp beside the others."""
        lane = cute.arch.lane_idx()
        scale, base = self._affine(weights)
        self.roles.wait()
        x, post, comb = outputs.x, outputs.post, outputs.comb
        parity = Int32(0)
        for token in cutlass.range(finisher, Int32(x.shape[0]), MAX_FINISHERS, unroll=1):
            listeners = 32 * (self.finish_warps + 1)
            cute.arch.barrier(barrier_id=FINISHER_BARRIER, number_of_threads=listeners)
            value = cute.math.fma(self._mix(totals, parity), scale, base)
            if (lane >= STREAMS) & (lane < 2 * STREAMS):
                post[token, lane - STREAMS] = Float32(2.0) * sigmoid(value)
            highest = cute.arch.warp_reduction_max(value, threads_in_group=STREAMS)
            value = exp(value - highest)
            total = cute.arch.warp_reduction_sum(value, threads_in_group=STREAMS)
            value = value * cute.arch.rcp_approx(total) + Float32(self.hc_eps)
            matrix = [
                [cute.arch.shuffle_sync(value, 2 * STREAMS + STREAMS * j + k) for k in range(4)]
                for j in range(STREAMS)
            ]
            balanced = sinkhorn(matrix, self.iterations, self.hc_eps)
            if lane == 0:
                for j in range_constexpr(STREAMS):
                    at = comb.iterator + (token * STREAMS + j) * STREAMS
                    global_memory.store_words(at, [one.bitcast(Uint32) for one in balanced[j]])
            parity = 1 - parity


def _split(first: Uint32, second: Uint32) -> list[Uint32]:
    """Pairs of bfloat16 that sum to two float32 exactly, the largest first."""
    left, right = first.bitcast(Float32), second.bitcast(Float32)
    pieces = []
    for n in range(PIECES):
        pieces.append(conversions.bf16_pair(left, right))
        if n + 1 < PIECES:
            taken = conversions.bf16_values(pieces[-1:])
            left, right = left - taken[0], right - taken[1]
    return pieces


def _weighted(pre: Any, streams: Any) -> list[Float32]:
    """Σ_j pre_j X'_j of a chunk, rounded to bfloat16."""
    columns = [conversions.bf16_values(stream) for stream in streams]
    result = []
    for i in range(len(columns[0])):
        value = pre[0] * columns[0][i]
        for j in range(1, STREAMS):
            value = cute.math.fma(pre[j], columns[j][i], value)
        result.append(conversions.rounded(value))
    return result
