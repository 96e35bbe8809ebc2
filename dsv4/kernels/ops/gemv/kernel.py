"""`y = x wᵀ` for 1 to 8 rows of `x`, at the speed of reading `w`.

The weight is the A operand of the tensor cores and the rows of `x` its eight columns, so that one
row costs what eight do and nothing is computed twice. A CTA owns 32 rows of `w`; its warps take
turns at steps of 128 columns, and their sums meet in shared memory in a fixed order: a row of `x`
is summed alike whatever the other rows are. Weights that meet the same `x` share one launch, one
after another along the grid, and those that differ in their rows alone share its code: the
instruction cache is small. Every warp keeps a few steps on their way (see `ring`); the first are
asked for before the kernel that makes `x` has ended.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, range_constexpr

from dsv4.kernels.device import ptx, ring
from dsv4.kernels.device.weight_operands import MMAS, OPERANDS, STEP

SUMS = 256  # 32 rows of the weight by 8 of x
TILE_ROWS = 128
BANDS = 4  # of 32 rows, interleaved by 8, in a tile
X_PIECES = 4
MAX_STEPS = 32  # of one warp: a lane keeps the scale of each


class _Part(NamedTuple):
    """One weight of the launch: its number, its rows, its first operand, the CTAs that read it."""

    number: int
    n: int
    operand: int
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

    def format(self, n: Any) -> Any:
        """How one of `n` rows is read."""
        whole = all(part.n % TILE_ROWS == 0 for part in self.parts)
        return OPERANDS[self.kind](n, self.k, self.slabs, whole)


class _Chosen(NamedTuple):
    """What a CTA works on: pointers to codes, scales and y, rows of the weight, its own 32."""

    format: Any
    codes: Any
    scales: Any
    y: Any
    n: Any
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
        self.alike = self._sorted(weights.split("|"))
        if any(one.steps > MAX_STEPS * warps for one in self.alike):
            raise ValueError(f"more than {MAX_STEPS} steps a warp")
        pieces = max(OPERANDS[one.kind].pieces for one in self.alike)
        self.stage_bytes = (X_PIECES + pieces) * ring.PIECE_BYTES

    def _sorted(self, specs: list[str]) -> list[_Alike]:
        """Weights by what they have in common, and their CTAs in this order.

        NVFP4 has a global scale besides, and slabs and groups are of a weight's rows: these stand
        alone.
        """
        kinds: dict[Any, list[tuple[int, int, int]]] = {}
        taken = 0
        for number, spec in enumerate(specs):
            kind, *sizes = spec.split(":")
            n, k, slabs, groups = (int(size) for size in sizes)
            alone = number if slabs * groups > 1 or kind == "nvfp4" else -1
            kinds.setdefault((kind, k, slabs, groups, alone), []).append((number, n, taken))
            taken += {"nvfp4": 3, "fp8": 2, "bf16": 1}[kind]
        found, cta = [], 0
        for (*common, _), weights in kinds.items():
            one = _Alike(*common)
            for number, n, operand in weights:
                end = cta + -(-n // TILE_ROWS) * BANDS
                one.parts.append(_Part(number, n, operand, cta, end))
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
        sums = smem.allocate_tensor(Float32, cute.make_layout((SUMS, self.warps)), 16)
        rings = smem.allocate(self.stage_bytes * self.stages * self.warps, 128)
        own_ring = rings.toint() + cute.arch.warp_idx() * (self.stage_bytes * self.stages)
        slots = own_ring + cute.arch.lane_idx() * ring.LANE_BYTES
        for index in range_constexpr(len(self.alike)):
            alike = self.alike[index]
            if (cta >= alike.ctas[0]) & (cta < alike.ctas[1]):
                own = self._choose(alike, operands, y, cta)
                factor = None
                if cutlass.const_expr(alike.kind == "nvfp4"):
                    factor = operands[alike.parts[0].operand + 2]
                self._run(alike, x, own, factor, sums, slots)

    @cute.jit
    def _choose(self, alike: Any, operands: Any, y: Any, cta: Int32) -> Any:
        """The weight that a CTA works on."""
        first = alike.parts[0]
        at, n, first_cta = first.operand, first.n, Int32(first.first_cta)
        scaled = alike.kind != "bf16"
        codes, out = operands[at].iterator.toint(), y[first.number].iterator.toint()
        scales = operands[at + 1].iterator.toint() if scaled else Int64(0)
        for index in range_constexpr(1, len(alike.parts)):
            part = alike.parts[index]
            here = cta >= part.first_cta
            codes = operands[part.operand].iterator.toint() if here else codes
            if cutlass.const_expr(scaled):
                scales = operands[part.operand + 1].iterator.toint() if here else scales
            out = y[part.number].iterator.toint() if here else out
            n = Int32(part.n) if here else Int32(n)
            first_cta = Int32(part.first_cta) if here else first_cta
        space = cute.AddressSpace.gmem
        codes = cute.make_ptr(operands[at].element_type, codes, space, assumed_align=16)
        scales = cute.make_ptr(Uint8, scales, space)
        out = cute.make_ptr(self.out_dtype, out, space, assumed_align=16)
        own = alike.format(n)
        return _Chosen(own, codes, scales, out, n, cta - first_cta)

    @cute.jit
    def _run(self, alike: Any, x: Any, own: Any, factor: Any, sums: Any, slots: Int32) -> None:
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        row = (own.band // BANDS) * TILE_ROWS + (own.band % BANDS) * 8 + lane // 4
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
            ring.commit()
        acc = cute.make_rmem_tensor(8, Float32)
        acc.fill(0.0)
        stage = Int32(0)
        for turn in cutlass.range(count, unroll=1):
            ring.wait(self.stages - 2)
            self._multiply(own.format, acc, slots + stage * self.stage_bytes, scale, turn)
            ahead = turn + self.stages - 1
            if ahead < count:
                free = stage - 1 if stage > 0 else stage + self.stages - 1
                self._copy_weight(own, row, warp + ahead * self.warps, slots, free)
                self._copy_x(own, x_lane, present, warp + ahead * self.warps, slots, free)
            ring.commit()
            stage = stage + 1 if stage < self.stages - 1 else 0
        for c in range_constexpr(8):
            sums[c * 32 + lane, warp] = acc[c]
        self._finish(own, factor, sums, Int32(x.shape[0]))

    @cute.jit
    def _copy_weight(self, own: Any, row: Int32, step: Int32, slots: Int32, stage: Int32) -> None:
        slot = slots + stage * self.stage_bytes + X_PIECES * ring.PIECE_BYTES
        t = cute.arch.lane_idx() % 4
        for address in own.format.addresses(own.codes, own.scales, row, step, t):
            ring.copy_weights(slot, address)
            slot += ring.PIECE_BYTES

    @cute.jit
    def _copy_x(
        self, own: Any, x_lane: Any, present: Int32, step: Int32, slots: Int32, stage: Int32
    ) -> None:
        slot, t = slots + stage * self.stage_bytes, cute.arch.lane_idx() % 4
        for piece in range_constexpr(X_PIECES):
            address = x_lane + step * STEP + own.format.x_column(piece, t)
            ring.copy_shared(slot + piece * ring.PIECE_BYTES, address, present)

    @cute.jit
    def _clear_x(self, slots: Int32) -> None:
        """Rows of `x` that are not there stay zero."""
        for stage in range_constexpr(self.stages):
            for piece in range_constexpr(X_PIECES):
                ring.clear(slots + stage * self.stage_bytes + piece * ring.PIECE_BYTES)

    @cute.jit
    def _multiply(self, own: Any, acc: Any, slot: Int32, scale: Float32, turn: Int32) -> None:
        """128 columns into the sums: two tiles of 16 rows, eight MMAs each."""
        x, words = [], []
        for piece in range_constexpr(X_PIECES):
            x.extend(ring.read(slot + piece * ring.PIECE_BYTES))
        for piece in range_constexpr(own.pieces):
            words.extend(ring.read(slot + (X_PIECES + piece) * ring.PIECE_BYTES))
        prepared = own.prepare(words, cute.arch.lane_idx() % 4)
        chained = not own.step_scales
        for half in range_constexpr(2):
            sums = tuple(acc[4 * half + c] if chained else Float32(0.0) for c in range(4))
            for mma in range_constexpr(MMAS):
                a = own.a(words, prepared, half, mma)
                sums = ptx.mma_bf16(sums, a, own.b(x, mma))
            for c in range_constexpr(4):
                if cutlass.const_expr(chained):
                    acc[4 * half + c] = sums[c]
                else:
                    acc[4 * half + c] += sums[c] * cute.arch.shuffle_sync(scale, turn)

    @cute.jit
    def _finish(self, own: Any, factor: Any, sums: Any, rows: Int32) -> None:
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
                row = (own.band // BANDS) * TILE_ROWS + (own.band % BANDS) * 8 + g + 32 * quarter
                if (col < rows) & (row < own.n):
                    if cutlass.const_expr(factor is not None):
                        total *= Float32(own.format.factor) * factor[0]
                    (own.y + (col * own.n + row)).store(total.to(self.out_dtype))
