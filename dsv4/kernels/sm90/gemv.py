"""`y = x wᵀ` for 1 to 8 rows of `x`, at the speed of reading `w`.

The weight is the A operand of the tensor cores and the rows of `x` its eight columns, so that one
row costs what eight do and nothing is computed twice. A CTA owns 32 rows of `w`; its warps take
turns at steps of 128 columns, and their sums meet in shared memory in a fixed order: a row of `x`
is summed alike whatever the other rows are. Weights that meet the same `x` share one launch, one
after another along the grid. Every warp keeps a few steps on their way (see `ring`); the first are
asked for before the kernel that makes `x` has ended.
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, range_constexpr

from dsv4.kernels.sm90 import ptx, ring
from dsv4.kernels.sm90.operands import MMAS, OPERANDS, STEP

SUMS = 256  # 32 rows of the weight by 8 of x
BANDS = 4  # of 32 rows, interleaved by 8, in a tile of 128
X_PIECES = 4
MAX_STEPS = 32  # of one warp: a lane keeps the scale of each


class _Part:
    """One weight of the launch, and the CTAs that work on it."""

    def __init__(self, spec: str, first_band: int) -> None:
        self.kind, *sizes = spec.split(":")
        self.n, self.k, slabs, self.groups = (int(size) for size in sizes)
        self.operand = OPERANDS[self.kind](self.n, self.k, slabs)
        self.first_band = first_band
        self.end_band = first_band + -(-self.n // 128) * BANDS


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
        self.parts: list[_Part] = []
        for spec in weights.split("|"):
            self.parts.append(_Part(spec, self.parts[-1].end_band if self.parts else 0))
        if any(part.operand.steps > MAX_STEPS * warps for part in self.parts):
            raise ValueError(f"more than {MAX_STEPS} steps a warp")
        pieces = max(part.operand.pieces for part in self.parts)
        self.stage_bytes = (X_PIECES + pieces) * ring.PIECE_BYTES

    @cute.jit
    def __call__(self, x: cute.Tensor, operands: Any, y: Any, stream: cuda.CUstream) -> None:
        self.kernel(x, operands, y).launch(
            grid=[self.parts[-1].end_band, 1, 1],
            block=[32 * self.warps, 1, 1],
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def kernel(self, x: cute.Tensor, operands: Any, y: Any) -> None:
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
        band, _, _ = cute.arch.block_idx()
        smem = cutlass.memory.SmemAllocator()
        sums = smem.allocate_tensor(Float32, cute.make_layout((SUMS, self.warps)), 16)
        rings = smem.allocate(self.stage_bytes * self.stages * self.warps, 128)
        own_ring = rings.toint() + cute.arch.warp_idx() * (self.stage_bytes * self.stages)
        slots = own_ring + cute.arch.lane_idx() * ring.LANE_BYTES
        taken = 0
        for index in range_constexpr(len(self.parts)):
            part = self.parts[index]
            count = {"nvfp4": 3, "fp8": 2, "bf16": 1}[part.kind]
            own = operands[taken : taken + count]
            if (band >= part.first_band) & (band < part.end_band):
                self._run(part, x, own, y[index], sums, slots, band - part.first_band)
            taken += count

    @cute.jit
    def _run(
        self, part: Any, x: Any, own: Any, y: Any, sums: Any, slots: Int32, band: Int32
    ) -> None:
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        row = (band // BANDS) * 128 + (band % BANDS) * 8 + lane // 4
        count = (part.operand.steps - warp + self.warps - 1) // self.warps
        for stage in range_constexpr(self.stages - 1):
            if stage < count:
                self._copy_weight(part, own, row, warp + stage * self.warps, slots, stage)
        scale = Float32(1.0)
        if cutlass.const_expr(part.operand.step_scales):
            step = cutlass.min(warp + lane * self.warps, part.operand.steps - 1)
            scale = part.operand.step_scale(own[1].iterator, row, step)
        self._clear_x(slots)
        group = row // (part.n // part.groups)
        x_lane = x.iterator + ((lane // 4) * part.groups + group) * part.k
        present = Int32(lane // 4 < Int32(x.shape[0]))
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_wait()
        for stage in range_constexpr(self.stages - 1):
            if stage < count:
                self._copy_x(part, x_lane, present, warp + stage * self.warps, slots, stage)
            ring.commit()
        acc = cute.make_rmem_tensor(8, Float32)
        acc.fill(0.0)
        stage = Int32(0)
        for turn in cutlass.range(count, unroll=1):
            ring.wait(self.stages - 2)
            self._multiply(part, acc, slots + stage * self.stage_bytes, scale, turn)
            ahead = turn + self.stages - 1
            if ahead < count:
                free = stage - 1 if stage > 0 else stage + self.stages - 1
                self._copy_weight(part, own, row, warp + ahead * self.warps, slots, free)
                self._copy_x(part, x_lane, present, warp + ahead * self.warps, slots, free)
            ring.commit()
            stage = stage + 1 if stage < self.stages - 1 else 0
        for c in range_constexpr(8):
            sums[c * 32 + lane, warp] = acc[c]
        self._finish(part, own, y, sums, band, Int32(x.shape[0]))

    @cute.jit
    def _copy_weight(
        self, part: Any, own: Any, row: Int32, step: Int32, slots: Int32, stage: Int32
    ) -> None:
        scales = own[1].iterator if len(own) > 1 else None
        slot = slots + stage * self.stage_bytes + X_PIECES * ring.PIECE_BYTES
        t = cute.arch.lane_idx() % 4
        for address in part.operand.addresses(own[0].iterator, scales, row, step, t):
            ring.copy_weights(slot, address)
            slot += ring.PIECE_BYTES

    @cute.jit
    def _copy_x(
        self, part: Any, x_lane: Any, present: Int32, step: Int32, slots: Int32, stage: Int32
    ) -> None:
        slot, t = slots + stage * self.stage_bytes, cute.arch.lane_idx() % 4
        for piece in range_constexpr(X_PIECES):
            address = x_lane + step * STEP + part.operand.x_column(piece, t)
            ring.copy_shared(slot + piece * ring.PIECE_BYTES, address, present)

    @cute.jit
    def _clear_x(self, slots: Int32) -> None:
        """Rows of `x` that are not there stay zero."""
        for stage in range_constexpr(self.stages):
            for piece in range_constexpr(X_PIECES):
                ring.clear(slots + stage * self.stage_bytes + piece * ring.PIECE_BYTES)

    @cute.jit
    def _multiply(self, part: Any, acc: Any, slot: Int32, scale: Float32, turn: Int32) -> None:
        """128 columns into the sums: two tiles of 16 rows, eight MMAs each."""
        x, words = [], []
        for piece in range_constexpr(X_PIECES):
            x.extend(ring.read(slot + piece * ring.PIECE_BYTES))
        for piece in range_constexpr(part.operand.pieces):
            words.extend(ring.read(slot + (X_PIECES + piece) * ring.PIECE_BYTES))
        prepared = part.operand.prepare(words, cute.arch.lane_idx() % 4)
        chained = not part.operand.step_scales
        for half in range_constexpr(2):
            sums = tuple(acc[4 * half + c] if chained else Float32(0.0) for c in range(4))
            for mma in range_constexpr(MMAS):
                a = part.operand.a(words, prepared, half, mma)
                sums = ptx.mma_bf16(sums, a, part.operand.b(x, mma))
            for c in range_constexpr(4):
                if cutlass.const_expr(chained):
                    acc[4 * half + c] = sums[c]
                else:
                    acc[4 * half + c] += sums[c] * cute.arch.shuffle_sync(scale, turn)

    @cute.jit
    def _finish(self, part: Any, own: Any, y: Any, sums: Any, band: Int32, rows: Int32) -> None:
        """Sum over the warps, in their order, and write."""
        thread, _, _ = cute.arch.thread_idx()
        cute.arch.sync_threads()
        for turn in range_constexpr(-(-SUMS // (32 * self.warps))):
            item = turn * 32 * self.warps + thread
            if item < SUMS:
                # Neighbouring threads write neighbouring rows of the weight.
                g, quarter, col = item % 8, (item // 8) % 4, item // 32
                source = ((quarter // 2) * 4 + (quarter % 2) * 2 + col % 2) * 32 + g * 4 + col // 2
                total = Float32(0.0)
                for warp in range_constexpr(self.warps):
                    total += sums[source, warp]
                row = (band // BANDS) * 128 + (band % BANDS) * 8 + g + 32 * quarter
                if (col < rows) & (row < part.n):
                    if cutlass.const_expr(part.kind == "nvfp4"):
                        total *= Float32(part.operand.factor) * own[2][0]
                    y[col, row] = total.to(self.out_dtype)
