"""`y = x wᵀ` for 1 to 8 rows of `x`, at the speed of reading `w`.

The weight is the A operand of the tensor cores and the rows of `x` its eight columns, so that one
row costs what eight do and nothing is computed twice. A CTA owns 32 rows of `w`; its warps take
turns at steps of 128 columns, and their sums meet in shared memory in a fixed order: a row of `x`
is summed alike whatever the other rows are. Weights that meet the same `x` share one launch, one
after another along the grid, and those that differ in their rows alone share its code: the
instruction cache is small (64 to 22 KB for the seven that read a CSA layer's input). Every warp
keeps a few steps on their way (see `async_copies`); the first are asked for before the kernel that
makes `x` has ended.

Many small CTAs hide more than a few that stay for several bands of 32 rows with their rings running
ahead: lm_head took 87 us for 102 to 111 on an H200.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, range_constexpr

from dsv4.kernels.core.sizes import SCALE_TILE_ROWS
from dsv4.kernels.device import async_copies, shared_memory
from dsv4.kernels.device.async_copies import LANE_BYTES, PIECE_BYTES
from dsv4.kernels.device.mma import mma_bf16
from dsv4.kernels.device.weight_operands import (
    BAND_SUMS,
    MMAS,
    OPERANDS,
    STEP,
    TILE_BANDS,
    Operand,
    WeightTensors,
    first_row,
    sum_place,
    sum_row,
)

X_PIECES = 4
MAX_STEPS = 32  # of one warp: a lane keeps the scale of each


class _Part(NamedTuple):
    """One weight of the launch: its number, its rows, the CTAs that read it."""

    number: int
    n: int
    first_cta: int
    end_cta: int


class _Alike:
    """Weights that differ in nothing but their rows: CTAs that work on them run the same code."""

    def __init__(self, kind: str, k: int, slabs: int, groups: int) -> None:
        self.kind, self.k, self.slabs, self.groups = kind, k, slabs, groups
        self.steps = k // STEP
        self.parts: list[_Part] = []

    @property
    def ctas(self) -> tuple[int, int]:
        """The first that works on them, and the one behind the last."""
        return self.parts[0].first_cta, self.parts[-1].end_cta

    def format(self, n: Any) -> Operand:
        """How one of `n` rows is read."""
        whole = all(part.n % SCALE_TILE_ROWS == 0 for part in self.parts)
        return OPERANDS[self.kind](n, self.k, self.slabs, whole)


class _Chosen(NamedTuple):
    """What a CTA works on: pointers to codes, scales and y, rows of the weight, its own 32."""

    format: Operand
    codes: cute.Pointer
    scales: cute.Pointer
    y: cute.Pointer
    n: Int32
    band: Int32


class Gemv:
    """Weights of fixed shapes against the same activations.

    weights: "kind:N:K:slabs:groups", separated by "|". x: bfloat16 `[M, G, K]`, M from 1 to 8;
    operands: per weight codes, scales (not for "bf16"), global scale (only "nvfp4"); y: per weight
    float32 or bfloat16 `[M, N]`. With G > 1, rows `[g N/G, (g+1) N/G)` meet `x[:, g]`.
    warps: of a CTA; stages: steps that a warp has in its ring, one of them in use.
    """

    def __init__(self, weights: str, out: str, warps: int, stages: int, pdl: bool) -> None:
        self.out_dtype = {"float32": Float32, "bfloat16": BFloat16}[out]
        self.warps, self.stages, self.pdl = warps, stages, pdl
        specs = weights.split("|")
        self.counts = [OPERANDS[spec.partition(":")[0]].tensors for spec in specs]
        self.alike = self._sorted(specs)
        if any(one.steps > MAX_STEPS * warps for one in self.alike):
            raise ValueError(f"more than {MAX_STEPS} steps a warp")
        pieces = max(OPERANDS[one.kind].pieces for one in self.alike)
        self.stage_bytes = (X_PIECES + pieces) * PIECE_BYTES

    def _sorted(self, specs: list[str]) -> list[_Alike]:
        """Weights by what they have in common, and their CTAs in this order.

        NVFP4 has a global scale besides, and slabs and groups are of a weight's rows: these stand
        alone.
        """
        kinds: dict[Any, list[tuple[int, int]]] = {}
        for number, spec in enumerate(specs):
            kind, *sizes = spec.split(":")
            n, k, slabs, groups = (int(size) for size in sizes)
            alone = number if slabs * groups > 1 or kind == "nvfp4" else -1
            kinds.setdefault((kind, k, slabs, groups, alone), []).append((number, n))
        found, cta = [], 0
        for (*common, _), weights in kinds.items():
            one = _Alike(*common)
            for number, n in weights:
                end = cta + -(-n // SCALE_TILE_ROWS) * TILE_BANDS
                one.parts.append(_Part(number, n, cta, end))
                cta = end
            found.append(one)
        self.ctas = cta
        return found

    @cute.jit
    def __call__(self, x: cute.Tensor, operands: Any, y: Any, stream: cuda.CUstream) -> None:
        self.kernel(x, operands, y).launch(
            grid=[self.ctas, 1, 1], block=[32 * self.warps, 1, 1], stream=stream, use_pdl=self.pdl
        )

    @cute.kernel
    def kernel(self, x: cute.Tensor, operands: Any, y: Any) -> None:
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        cta, _, _ = cute.arch.block_idx()
        smem = cutlass.memory.SmemAllocator()
        sums = smem.allocate_tensor(Float32, cute.make_layout((BAND_SUMS, self.warps)), 16)
        rings = smem.allocate(self.stage_bytes * self.stages * self.warps, 128)
        own_ring = rings.toint() + cute.arch.warp_idx() * (self.stage_bytes * self.stages)
        slots = own_ring + cute.arch.lane_idx() * LANE_BYTES
        weights = self._named(operands)
        for index in range_constexpr(len(self.alike)):
            alike = self.alike[index]
            if (cta >= alike.ctas[0]) & (cta < alike.ctas[1]):
                own = self._choose(alike, weights, y, cta)
                factor = weights[alike.parts[0].number].global_scale
                self._run(alike, x, own, factor, sums, slots)

    def _named(self, operands: Any) -> list[WeightTensors]:
        """The launch's operands by weight, in the order of `weights`."""
        left = list(operands)
        found = []
        for count in self.counts:
            found.append(WeightTensors(*left[:count]))
            left = left[count:]
        return found

    @cute.jit
    def _choose(self, alike: _Alike, weights: list[WeightTensors], y: Any, cta: Int32) -> _Chosen:
        """The weight that a CTA works on.

        Addresses are chosen among, not code: a branch for each weight would be a copy of the code.
        """
        first = alike.parts[0]
        n, first_cta, tensors = first.n, Int32(first.first_cta), weights[first.number]
        scaled = tensors.scales is not None
        codes, out = tensors.codes.iterator.toint(), y[first.number].iterator.toint()
        scales = tensors.scales.iterator.toint() if scaled else Int64(0)
        for index in range_constexpr(1, len(alike.parts)):
            part = alike.parts[index]
            here = cta >= part.first_cta
            codes = weights[part.number].codes.iterator.toint() if here else codes
            if cutlass.const_expr(scaled):
                scales = weights[part.number].scales.iterator.toint() if here else scales
            out = y[part.number].iterator.toint() if here else out
            n = Int32(part.n) if here else Int32(n)
            first_cta = Int32(part.first_cta) if here else first_cta
        space = cute.AddressSpace.gmem
        codes = cute.make_ptr(tensors.codes.element_type, codes, space, assumed_align=16)
        scales = cute.make_ptr(Uint8, scales, space)
        out = cute.make_ptr(self.out_dtype, out, space, assumed_align=16)
        own = alike.format(n)
        return _Chosen(own, codes, scales, out, n, cta - first_cta)

    @cute.jit
    def _run(
        self,
        alike: _Alike,
        x: cute.Tensor,
        own: _Chosen,
        factor: Any,
        sums: cute.Tensor,
        slots: Int32,
    ) -> None:
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        row = first_row(own.band) + lane // 4
        count = (alike.steps - warp + self.warps - 1) // self.warps
        for stage in range_constexpr(self.stages - 1):
            if stage < count:
                self._copy_weight(own, row, warp + stage * self.warps, slots, stage)
        scale = Float32(1.0)
        if cutlass.const_expr(own.format.step_scales):
            step = cutlass.min(warp + lane * self.warps, alike.steps - 1)
            scale = own.format.step_scale(own.scales, row, step)
        self._clear_x(slots)
        group = row // (own.n // alike.groups) if alike.groups > 1 else 0
        x_lane = x.iterator + ((lane // 4) * alike.groups + group) * alike.k
        present = Int32(lane // 4 < Int32(x.shape[0]))
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        for stage in range_constexpr(self.stages - 1):
            if stage < count:
                self._copy_x(own, x_lane, present, warp + stage * self.warps, slots, stage)
            async_copies.commit()
        acc = cute.make_rmem_tensor(8, Float32)
        acc.fill(0.0)
        stage = Int32(0)
        for turn in cutlass.range(count, unroll=1):
            async_copies.wait(self.stages - 2)
            self._multiply(own.format, acc, slots + stage * self.stage_bytes, scale, turn)
            ahead = turn + self.stages - 1
            if ahead < count:
                free = stage - 1 if stage > 0 else stage + self.stages - 1
                self._copy_weight(own, row, warp + ahead * self.warps, slots, free)
                self._copy_x(own, x_lane, present, warp + ahead * self.warps, slots, free)
            async_copies.commit()
            stage = stage + 1 if stage < self.stages - 1 else 0
        for c in range_constexpr(8):
            sums[c * 32 + lane, warp] = acc[c]
        self._finish(own, factor, sums, Int32(x.shape[0]))

    @cute.jit
    def _copy_weight(
        self, own: _Chosen, row: Int32, step: Int32, slots: Int32, stage: Int32
    ) -> None:
        slot = slots + stage * self.stage_bytes + X_PIECES * PIECE_BYTES
        t = cute.arch.lane_idx() % 4
        for address in own.format.addresses(own.codes, own.scales, row, step, t):
            async_copies.copy(slot, address, l2=256)
            slot += PIECE_BYTES

    @cute.jit
    def _copy_x(
        self,
        own: _Chosen,
        x_lane: cute.Pointer,
        present: Int32,
        step: Int32,
        slots: Int32,
        stage: Int32,
    ) -> None:
        slot, t = slots + stage * self.stage_bytes, cute.arch.lane_idx() % 4
        for piece in range_constexpr(X_PIECES):
            address = x_lane + step * STEP + own.format.x_column(piece, t)
            async_copies.copy_for_all(slot + piece * PIECE_BYTES, address, present)

    @cute.jit
    def _clear_x(self, slots: Int32) -> None:
        """Rows of `x` that are not there stay zero."""
        for stage in range_constexpr(self.stages):
            for piece in range_constexpr(X_PIECES):
                shared_memory.clear(slots + stage * self.stage_bytes + piece * PIECE_BYTES)

    @cute.jit
    def _multiply(
        self, own: Operand, acc: cute.Tensor, slot: Int32, scale: Float32, turn: Int32
    ) -> None:
        """128 columns into the sums: two tiles of 16 rows, eight MMAs each."""
        x: list[Any] = []
        words: list[Any] = []
        for piece in range_constexpr(X_PIECES):
            x.extend(shared_memory.load_words(slot + piece * PIECE_BYTES, 4))
        for piece in range_constexpr(own.pieces):
            words.extend(shared_memory.load_words(slot + (X_PIECES + piece) * PIECE_BYTES, 4))
        prepared = own.prepare(words, cute.arch.lane_idx() % 4)
        chained = not own.step_scales
        for half in range_constexpr(2):
            sums = tuple(acc[4 * half + c] if chained else Float32(0.0) for c in range(4))
            for mma in range_constexpr(MMAS):
                a = own.a(words, prepared, half, mma)
                sums = mma_bf16(sums, a, own.b(x, mma))
            for c in range_constexpr(4):
                if cutlass.const_expr(chained):
                    acc[4 * half + c] = sums[c]
                else:
                    acc[4 * half + c] += sums[c] * cute.arch.shuffle_sync(scale, turn)

    @cute.jit
    def _finish(self, own: _Chosen, factor: Any, sums: cute.Tensor, rows: Int32) -> None:
        """Sum over the warps, in their order, and write."""
        thread, _, _ = cute.arch.thread_idx()
        cute.arch.sync_threads()
        for turn in range_constexpr(-(-BAND_SUMS // (32 * self.warps))):
            item = turn * 32 * self.warps + thread
            if item < BAND_SUMS:
                place, column = sum_place(item)
                total = Float32(0.0)
                for warp in range_constexpr(self.warps):
                    total += sums[place, warp]
                row = sum_row(own.band, item)
                if (column < rows) & (row < own.n):
                    if cutlass.const_expr(factor is not None):
                        total *= Float32(own.format.factor) * factor[0]
                    (own.y + (column * own.n + row)).store(total.to(self.out_dtype))
