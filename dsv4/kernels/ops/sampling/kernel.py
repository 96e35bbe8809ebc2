"""A token of each row, by a cluster a row: `dsv4.kernels.reference.sampling`, bit for bit.

Each warp of the cluster owns a run of ids and keeps its logits and weights in registers. They join
their largest logit, then the sums of their weights; the warp in whose part of the running sum the
random number falls finds the token. Where not all tokens are kept, it announces the token, all sum
what ranks before it, and that decides whether it stays or a draw from those follows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint32, Uint64, range_constexpr

from dsv4.kernels.device import global_memory
from dsv4.kernels.device.arithmetic import multiply_high
from dsv4.kernels.device.cluster_words import LANES, Cluster, running_sum, warp_sum
from dsv4.kernels.ops.sampling import numbers
from dsv4.kernels.reference.sampling import INVALID_TOKEN, MAX_VOCAB

VECTOR = 4  # logits in 16 bytes
SPAN = VECTOR * LANES


class Parameters(NamedTuple):
    """How rows are drawn: of all, `[T]`, or of one."""

    temperature: Any
    top_p: Any
    top_k: Any
    allowed: Any
    seed: Any


class Warp(NamedTuple):
    """A warp's run of ids: a thread's logits and weights, registers, and its first id."""

    logits: cute.Tensor
    weights: cute.Tensor
    first: Int32


class Draw(NamedTuple):
    """Which of all random numbers a draw takes: number `counter` of its seed."""

    seed: Uint64
    counter: Uint64


class Sample:
    """logits: float32 `[T, V]`; temperature, top_p: float32 `[T]`; top_k, allowed: int32 `[T]`;
    seed: int64 `[T]`; counter: int64 `[T]` and position: int32 `[T]`, which go up by one; token:
    int32 `[T]`. ctas: of a cluster; warps: of a CTA.
    """

    def __init__(self, vocab: int, ctas: int, warps: int, pdl: bool) -> None:
        if vocab % VECTOR or vocab > MAX_VOCAB:
            raise ValueError(f"{vocab} logits a row, expected a multiple of 4 up to {MAX_VOCAB}")
        self.vocab, self.ctas, self.warps, self.pdl = vocab, ctas, warps, pdl
        self.vectors = -(-vocab // (ctas * warps * SPAN))
        self.count = self.vectors * VECTOR
        self.cluster = Cluster(ctas, warps)

    @cute.jit
    def __call__(
        self,
        logits: cute.Tensor,
        temperature: cute.Tensor,
        top_p: cute.Tensor,
        top_k: cute.Tensor,
        allowed: cute.Tensor,
        seed: cute.Tensor,
        counter: cute.Tensor,
        position: cute.Tensor,
        token: cute.Tensor,
        stream: cuda.CUstream,
    ) -> None:
        parameters = Parameters(temperature, top_p, top_k, allowed, seed)
        self.kernel(logits, parameters, counter, position, token).launch(
            grid=[self.ctas, logits.shape[0], 1],
            block=[LANES * self.warps, 1, 1],
            cluster=[self.ctas, 1, 1],
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def kernel(
        self,
        logits: cute.Tensor,
        parameters: Any,
        counter: cute.Tensor,
        position: cute.Tensor,
        token: cute.Tensor,
    ) -> None:
        rank, row, _ = cute.arch.block_idx()
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        shared = self.cluster.begin()
        self.cluster.begun()
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        own = Parameters(*(one[row] for one in parameters))
        draws, place = counter[row], position[row]
        warp = rank * self.warps + cute.arch.warp_idx()
        first = warp * (SPAN * self.vectors) + cute.arch.lane_idx() * VECTOR
        x = self._load(logits.iterator + Int64(row) * self.vocab, first, own.allowed)
        most = numbers.key_of(x[0])
        for i in range_constexpr(1, self.count):
            most = cutlass.max(most, numbers.key_of(x[i]))
        peak = self.cluster.largest(shared, cute.arch.warp_redux_sync(most, "umax"))
        chosen = Int32(INVALID_TOKEN)
        writes = (rank == 0) & (cute.arch.thread_idx()[0] == 0)
        if (peak > numbers.LOWEST_KEY) & (peak < numbers.INFINITE_KEY):
            w = self._weigh(x, numbers.number_of(peak), own.temperature)
            number = Draw(Uint64(own.seed), Uint64(draws))
            chosen, writes = self._draw(Warp(x, w, first), own, number, shared, writes)
        if writes:
            token[row] = chosen
            counter[row] = draws + 1
            position[row] = place + 1

    @cute.jit
    def _load(self, row: cute.Pointer, first: Int32, allowed: Int32) -> cute.Tensor:
        """A thread's logits; -infinity where there are none or they are not allowed."""
        x = cute.make_rmem_tensor(self.count, Float32)
        end = cutlass.min(allowed, Int32(self.vocab))
        for v in range_constexpr(self.vectors):
            at = first + v * SPAN
            words = global_memory.load_words_if(Int32(at < end), row + at)
            for e in range_constexpr(VECTOR):
                value = words[e].bitcast(Float32)
                x[v * VECTOR + e] = value if at + e < end else -Float32.inf
        return x

    @cute.jit
    def _weigh(self, x: cute.Tensor, peak: Float32, temperature: Float32) -> cute.Tensor:
        """A thread's weights. Greedy: 1 for the largest, so that the first of them is drawn."""
        w = cute.make_rmem_tensor(self.count, Uint64)
        if temperature > 0:
            factor = numbers.factor_of(temperature)
            for i in range_constexpr(self.count):
                w[i] = numbers.weight(x[i], peak, factor)
        else:
            for i in range_constexpr(self.count):
                w[i] = Uint64(1) if x[i] == peak else Uint64(0)
        return w

    @cute.jit
    def _draw(
        self, warp: Warp, row: Parameters, number: Draw, shared: Any, leader: Boolean
    ) -> tuple[Int32, Boolean]:
        """-> the token, and whether this thread is to write it.

        Rejecting, because ranks are not known: a draw from all is kept if what ranks before it
        leaves it among the kept; else the next is from those before it alone, which are fewer.
        """
        temperature, top_p, top_k = row.temperature, row.top_p, row.top_k
        own = self._sum(warp.weights)
        total, before, _ = self.cluster.share(shared, Int32(0), own, Uint32(0))
        limit = numbers.mass_limit(total, top_p)
        plain = (temperature <= 0) | ((top_p >= 1) & (top_k <= 0))
        chosen, writes = Int32(INVALID_TOKEN), leader
        attempt, undecided = Int32(0), total > 0
        while undecided:
            place = multiply_high(numbers.random_bits(number.seed, number.counter, attempt), total)
            if temperature <= 0:
                place = Uint64(0)
            owner = (place >= before) & (place - before < own)
            value = Uint32(0)
            if owner:
                chosen, value = self._find(warp, place - before)
            if plain:
                undecided = Boolean(False)
                writes = owner & (cute.arch.lane_idx() == 0)
            else:
                if owner:
                    self.cluster.announce(shared, Uint32(chosen), value)
                told, value = self.cluster.announced(shared, attempt)
                chosen = Int32(told)
                attempt += 1
                ranked = self._keep_ahead(warp, value.bitcast(Float32), chosen)
                own = self._sum(warp.weights)
                total, before, ranked = self.cluster.share(shared, attempt, own, ranked)
                undecided = (total >= limit) | ((top_k > 0) & (ranked >= Uint32(top_k)))
        return chosen, writes

    @cute.jit
    def _sum(self, w: cute.Tensor) -> Uint64:
        """The sum of this warp's weights."""
        own = Uint64(0)
        for i in range_constexpr(self.count):
            own += w[i]
        return warp_sum(own)

    @cute.jit
    def _find(self, warp: Warp, place: Uint64) -> tuple[Int32, Uint32]:
        """The id, and the bits of its logit, at `place` of this warp's running sum."""
        x, w, first = warp
        begin, chosen, value = Uint64(0), Uint32(0), Uint32(0)
        for v in range_constexpr(self.vectors):
            own = Uint64(0)
            for e in range_constexpr(VECTOR):
                own += w[v * VECTOR + e]
            through = running_sum(own)
            at = begin + through - own
            for e in range_constexpr(VECTOR):
                i = v * VECTOR + e
                if (place >= at) & (place - at < w[i]):
                    chosen, value = Uint32(first + v * SPAN + e), x[i].bitcast(Uint32)
                at += w[i]
            begin += cute.arch.shuffle_sync(through, LANES - 1)
        chosen = cute.arch.warp_redux_sync(chosen, "umax")
        return Int32(chosen), cute.arch.warp_redux_sync(value, "or")

    @cute.jit
    def _keep_ahead(self, warp: Warp, value: Float32, chosen: Int32) -> Uint32:
        """Leave the weights that rank before the chosen token; -> how many do, in this warp."""
        x, w, first = warp
        ranked = Uint32(0)
        for v in range_constexpr(self.vectors):
            for e in range_constexpr(VECTOR):
                i = v * VECTOR + e
                if (x[i] > value) | ((x[i] == value) & (first + v * SPAN + e < chosen)):
                    ranked += Uint32(1)
                else:
                    w[i] = Uint64(0)
        return cute.arch.warp_redux_sync(ranked, "add")
