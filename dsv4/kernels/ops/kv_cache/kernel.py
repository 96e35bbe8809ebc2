"""What follows the projections of a layer's input, in one launch: norms, caches, compressors.

Independent jobs, one or a few CTAs for each row of the step:
    latent      norm of the low-rank query
    window      norm of the key/value vector, RoPE, its FP8 row in the window cache
    compressor  the row's place in the ring; where it completes a block, the block's entry
    indexer     the same for the indexer's keys, a warp for each row
No job waits for another. What a row writes does not depend on the rows beside it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Float64, Int32, Int64, range_constexpr

from dsv4.kernels.device import conversions, global_memory
from dsv4.kernels.ops.kv_cache import pooling, rows
from dsv4.kernels.ops.kv_cache.pooling import Compressor, Inputs, Softmax
from dsv4.kernels.ops.kv_cache.rows import CHANNELS, Turn

WARPS = 4  # of a team
TEAM = 32 * WARPS
GROUPS = 4  # teams that share the 128 slots of a block without overlap: 512 KB, 10 us on an H200


class Step(NamedTuple):
    """Of all rows: int32 `[T]` positions and slots; tables of angles."""

    position: cute.Tensor
    slot: cute.Tensor
    cos: cute.Tensor
    sin: cute.Tensor


class Latent(NamedTuple):
    """The latent query `[T, L]`, its norm `[L]`; qr: bfloat16 `[T, L]`, written."""

    source: cute.Tensor
    norm: cute.Tensor
    qr: cute.Tensor


class Window(NamedTuple):
    """The key/value vectors `[T, W]`, their norm; rows and scales of the ring, written."""

    source: cute.Tensor
    norm: cute.Tensor
    rows: cute.Tensor
    scales: cute.Tensor


class Shared(NamedTuple):
    """Shared memory of a CTA. partial: a team's sums of squares, by warp; stages: slots under way
    (an address); others: what the groups but the first pooled. The last two: of a compressor.
    """

    partial: cute.Tensor
    stages: Int32
    others: cute.Tensor | None = None


class Operands(NamedTuple):
    """What each job of a launch works on; None for jobs that it does not have."""

    latent: Latent
    window: Window
    compressor: Inputs | None = None
    indexer: Inputs | None = None

    @classmethod
    def of(cls, tensors: Any) -> Operands:
        """From the arguments of the launch, in order."""
        left, found = list(tensors), list[Any]()
        kinds: tuple[Any, ...] = (Latent, Window, Inputs, Inputs)
        for kind in kinds:
            if left:
                count = len(kind._fields)
                found.append(kind(*left[:count]))
                left = left[count:]
        return cls(*found)


@dataclasses.dataclass(eq=False, repr=False)
class Append:
    """The launch of one kind of layer.

    ratio: tokens per entry, 0 for a layer without compressor; overlap: with the indexer
    (`index_width` channels a key). inputs: dtype of the projections' results that are normed.

    position, slot: int32 `[T]`, a position below 0 for a row that is not there; cos, sin: float32
    `[P, rope / 2]`. operands: latent `[T, L]`, its norm `[L]`, qr bfloat16 `[T, L]`; kv `[T, W]`,
    its norm `[W]`, window rows uint8 `[S, ring, row]` and scales uint8 `[S, ring, 8]`; then for
    the compressor and the indexer's: kv, gate float32 `[T, C]`, ape `[ratio, C]`, norm `[width]`,
    ring_kv, ring_gate float32 `[S, ring, C]`, entries and scales uint8 `[S, capacity, ...]`.
    """

    latent: int
    width: int
    rope: int
    ratio: int
    overlap: bool
    index_width: int
    inputs: str
    eps: float
    pdl: bool

    def __post_init__(self) -> None:
        if self.width != CHANNELS * TEAM or self.latent % (CHANNELS * TEAM):
            raise ValueError(
                f"vectors of {self.width} and {self.latent}, expected multiples of 512"
            )
        if self.index_width not in (0, CHANNELS * 32) or (self.index_width > 0) != self.overlap:
            raise ValueError(
                f"indexer keys of {self.index_width}, expected 128 where blocks overlap"
            )
        self.nope, self.index_nope = self.width - self.rope, self.index_width - self.rope
        self.wide = {"float32": True, "bfloat16": False}[self.inputs]
        self.compressor = Compressor(max(self.ratio, 1), self.width, self.overlap)
        self.indexer = Compressor(max(self.ratio, 1), self.index_width, self.overlap)
        self.groups = GROUPS if self.ratio and not self.overlap else 1
        # The longest job comes first, and the indexer's, of a warp a row, fills up at the end.
        order = ["compressor"] if self.ratio else []
        order += ["latent", "window"] + (["indexer"] if self.overlap else [])
        self.jobs = {name: number for number, name in enumerate(order)}

    @cute.jit
    def __call__(
        self,
        position: cute.Tensor,
        slot: cute.Tensor,
        cos: cute.Tensor,
        sin: cute.Tensor,
        operands: Any,
        stream: cuda.CUstream,
    ) -> None:
        self.kernel(position, slot, cos, sin, operands).launch(
            grid=[position.shape[0], len(self.jobs), 1],
            block=[TEAM * self.groups, 1, 1],
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
        operands: Any,
    ) -> None:
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        smem = cutlass.memory.SmemAllocator()
        partial = smem.allocate_tensor(Float64, cute.make_layout(WARPS), 16)
        shared = Shared(partial, Int32(0))
        if cutlass.const_expr(self.ratio > 0):
            stages = smem.allocate(self.compressor.stage_bytes * TEAM * self.groups, 16)
            shape = (3, CHANNELS, max(self.groups - 1, 1), TEAM)
            strides = (TEAM, 3 * TEAM, 3 * CHANNELS * TEAM, 1)
            layout = cute.make_layout(shape, stride=strides)
            others = smem.allocate_tensor(Float32, layout, 16)
            shared = Shared(partial, stages.toint(), others)
        row, job, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        step, named = Step(position, slot, cos, sin), Operands.of(operands)
        if job == self.jobs["window"]:
            self._window(step, named.window, row, thread, partial)
        if job == self.jobs["latent"]:
            self._latent(named.latent, row, thread, partial)
        if cutlass.const_expr(self.ratio > 0):
            if job == self.jobs["compressor"]:
                self._compress(step, named.compressor, row, thread, shared)
            if cutlass.const_expr(self.overlap):
                key = row * WARPS + cute.arch.warp_idx()
                if (job == self.jobs["indexer"]) & (key < position.shape[0]):
                    self._index(step, named.indexer, key, thread, shared)

    @cute.jit
    def _wait(self, weights: Any, thread: Int32) -> None:
        """Ask for what no kernel before this one writes, then wait for what they do."""
        if cutlass.const_expr(self.pdl):
            for weight in weights:
                lines = -(-cute.size(weight) * 4 // 128)
                if thread < lines:
                    global_memory.prefetch(weight.iterator.toint() + thread.to(Int64) * 128)
            cute.arch.griddepcontrol_wait()

    @cute.jit
    def _latent(self, operands: Latent, row: Int32, thread: Int32, partial: cute.Tensor) -> None:
        source, norm, target = operands
        self._wait([norm], thread)
        if thread < TEAM:
            start = row.to(Int64) * self.latent
            values: list[Any] = []
            weights: list[Any] = []
            for part in range_constexpr(self.latent // (CHANNELS * TEAM)):
                column = (part * TEAM + thread) * CHANNELS
                values.extend(
                    global_memory.load_channels(source.iterator, start + column, self.wide)
                )
                weights.extend(global_memory.load_floats((norm.iterator + column).toint(), 4))
            squares = rows.team_sum(rows.square_sum(values), partial, WARPS)
            out = rows.normed(values, weights, squares, self.latent, self.eps)
            for part in range_constexpr(self.latent // (CHANNELS * TEAM)):
                a, b, c, d = out[CHANNELS * part : CHANNELS * (part + 1)]
                column = (part * TEAM + thread) * CHANNELS
                words = (conversions.bf16_pair(a, b), conversions.bf16_pair(c, d))
                global_memory.store_words((target.iterator + start + column).toint(), words)

    @cute.jit
    def _window(
        self, step: Step, operands: Window, row: Int32, thread: Int32, partial: cute.Tensor
    ) -> None:
        position, slot, cos, sin = step
        source, norm, window, scales = operands
        self._wait([norm], thread)
        if thread < TEAM:
            at = Int32(global_memory.load_word((position.iterator + row).toint()))
            own_slot = global_memory.load_word((slot.iterator + row).toint())
            column = thread * CHANNELS
            start = row.to(Int64) * self.width
            values = global_memory.load_channels(source.iterator, start + column, self.wide)
            weights = global_memory.load_floats((norm.iterator + column).toint(), 4)
            if at >= 0:
                turn = rows.turn_of((cos, sin), at, column, self.nope)
                squares = rows.team_sum(rows.square_sum(values), partial, WARPS)
                out = rows.normed(values, weights, squares, self.width, self.eps)
                index = own_slot.to(Int64) * window.shape[1] + at % window.shape[1]
                self._store_row(out, turn, column, window, scales, index)

    @cute.jit
    def _store_row(
        self,
        out: list[Float32],
        turn: Turn,
        column: Int32,
        entries: cute.Tensor,
        scales: cute.Tensor,
        index: Int64,
    ) -> None:
        row_bytes = self.nope + 2 * (self.width - self.nope)
        rows.store_kv_row(
            out,
            turn,
            column,
            self.nope,
            (entries.iterator + index * row_bytes).toint(),
            (scales.iterator + index * rows.KV_SCALES).toint(),
        )

    @cute.jit
    def _compress(
        self, step: Step, inputs: Inputs, row: Int32, thread: Int32, shared: Shared
    ) -> None:
        """The token into the compressor's ring, and the entry of a block that it completes.

        Weights and the first slots are asked for before the ring is written: the entry's latency
        is the longest of the launch.
        """
        position, slot, cos, sin = step
        norm, entries, scales = inputs.norm, inputs.entries, inputs.scales
        sizes, threads = self.compressor, TEAM * self.groups
        partial, stages, others = shared
        team, own = thread % TEAM, sizes.slots // self.groups
        first, column, stage = thread // TEAM * own, team * CHANNELS, stages + thread * 16
        self._wait([norm], thread)
        token = pooling.place_of(sizes, row, position, slot)
        index = token.position // sizes.ratio
        complete = token.position % sizes.ratio == sizes.ratio - 1
        complete = complete & (token.position >= 0) & (index < entries.shape[1])
        if complete:
            pooling.fetch(sizes, inputs, token, first, column, stage, threads)
        if (token.position >= 0) & (thread < TEAM):
            pooling.write_ring(sizes, inputs, token, thread, TEAM)
        if complete:
            weights = global_memory.load_floats((norm.iterator + column).toint(), 4)
            begin = index * sizes.ratio
            turn = rows.turn_of((cos, sin), begin, column, self.nope)
            state = pooling.empty()
            pooling.pool(sizes, token.position, first, stage, threads, state)
            for batch in cutlass.range(1, own // sizes.batch, unroll=1):
                at = first + batch * sizes.batch
                pooling.fetch(sizes, inputs, token, at, column, stage, threads)
                pooling.pool(sizes, token.position, at, stage, threads, state)
            if cutlass.const_expr(self.groups > 1):
                self._share(state, others, thread)
            if thread < TEAM:
                values = pooling.pooled(state)
                squares = rows.team_sum(rows.square_sum(values), partial, WARPS)
                out = rows.normed(values, weights, squares, self.width, self.eps)
                place = token.slot.to(Int64) * entries.shape[1] + index
                self._store_row(out, turn, column, entries, scales, place)

    @cute.jit
    def _share(self, state: Softmax, others: cute.Tensor, thread: Int32) -> None:
        """Bring what the groups pooled together in the first."""
        team, group = thread % TEAM, thread // TEAM
        if group > 0:
            pooling.give(state, others, group - 1, team)
        cute.arch.sync_threads()
        if group == 0:
            pooling.merge(state, others, self.groups - 1, team)

    @cute.jit
    def _index(self, step: Step, inputs: Inputs, row: Int32, thread: Int32, shared: Shared) -> None:
        """The same for the indexer's keys, a warp for each row."""
        position, slot, cos, sin = step
        norm, keys, scales = inputs.norm, inputs.entries, inputs.scales
        sizes, lane, stage = self.indexer, thread % 32, shared.stages + thread * 16
        column = lane * CHANNELS
        self._wait([norm], lane)
        token = pooling.place_of(sizes, row, position, slot)
        index = token.position // sizes.ratio
        complete = token.position % sizes.ratio == sizes.ratio - 1
        complete = complete & (token.position >= 0) & (index < keys.shape[1])
        if complete:
            pooling.fetch(sizes, inputs, token, Int32(0), column, stage, TEAM)
        if token.position >= 0:
            pooling.write_ring(sizes, inputs, token, lane, 32)
        if complete:
            weights = global_memory.load_floats((norm.iterator + column).toint(), 4)
            begin = index * sizes.ratio
            turn = rows.turn_of((cos, sin), begin, column, self.index_nope)
            state = pooling.empty()
            pooling.pool(sizes, token.position, Int32(0), stage, TEAM, state)
            values = pooling.pooled(state)
            squares = cute.arch.warp_reduction_sum(rows.square_sum(values))
            out = rows.normed(values, weights, squares, sizes.width, self.eps)
            place = token.slot.to(Int64) * keys.shape[1] + index
            rows.store_index_key(
                out,
                turn,
                column,
                sizes.width,
                self.index_nope,
                (keys.iterator + place * (sizes.width // 2)).toint(),
                (scales.iterator + place * (sizes.width // rows.INDEXER_BLOCK)).toint(),
            )
