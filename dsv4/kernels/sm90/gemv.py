"""`y = x wᵀ` for 1 to 8 rows of `x`, at the speed of reading `w`.

The weight is the A operand of the tensor cores and the rows of `x` its eight columns, so that one
row costs what eight do and nothing is computed twice. A CTA owns `32 * row_warps` rows of `w`; its
warps along K take every `k_warps`-th step of 128 columns, and their sums meet in shared memory in
a fixed order. A row of `x` is summed alike whatever the other rows are.
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, range_constexpr

from dsv4.kernels.sm90 import ptx
from dsv4.kernels.sm90.operands import MMAS, OPERANDS, STEP

MAX_ROWS = 8


class Gemv:
    """One shape of weight.

    x: bfloat16 `[M, G, K]`, M from 1 to 8; codes, scales, global_scales: the operand as it lies in
    the store; out: float32 or bfloat16 `[M, N]`. With G > 1, rows `[g N/G, (g+1) N/G)` of the
    weight meet `x[:, g]`.
    """

    def __init__(
        self,
        kind: str,
        n: int,
        k: int,
        *,
        slabs: int = 1,
        groups: int = 1,
        out: str = "float32",
        row_warps: int = 1,
        k_warps: int = 8,
        unroll: int = 4,
    ) -> None:
        self.operand: Any = OPERANDS[kind](n, k, slabs)
        self.n, self.k, self.slabs, self.groups = n, k, slabs, groups
        self.out_dtype = {"float32": Float32, "bfloat16": BFloat16}[out]
        self.row_warps, self.k_warps = row_warps, k_warps
        self.steps = slabs * (k // slabs // STEP)
        self.unroll = min(unroll, -(-self.steps // k_warps))
        self.batches = -(-self.steps // (k_warps * self.unroll))
        self.ragged = self.steps % (k_warps * self.unroll) != 0

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        codes: cute.Tensor,
        scales: cute.Tensor,
        global_scales: cute.Tensor,
        out: cute.Tensor,
        stream: cuda.CUstream,
    ) -> None:
        tiles = -(-self.n // 128) * (4 // self.row_warps)
        self.kernel(x, codes, scales, global_scales, out).launch(
            grid=[tiles, 1, 1],
            block=[32 * self.row_warps * self.k_warps, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        codes: cute.Tensor,
        scales: cute.Tensor,
        global_scales: cute.Tensor,
        out: cute.Tensor,
    ) -> None:
        lane = cute.arch.lane_idx()
        warp = cute.arch.warp_idx()
        g, t = lane // 4, lane % 4
        per_tile = 4 // self.row_warps
        block, _, _ = cute.arch.block_idx()
        band = (block % per_tile) * self.row_warps + warp % self.row_warps
        first_k = warp // self.row_warps
        row = (block // per_tile) * 128 + band * 8 + g

        rows = Int32(x.shape[0])
        group = row // (self.n // self.groups)
        x_lane = x.iterator + (g * self.groups + group) * self.k + t * 32
        present = Int32(g < rows)

        acc = cute.make_rmem_tensor(8, Float32)
        acc.fill(0.0)
        for batch in cutlass.range(self.batches, unroll=1):
            loaded, acts, places = [], [], []
            for u in range_constexpr(self.unroll):
                step = (batch * self.unroll + u) * self.k_warps + first_k
                live = present
                if cutlass.const_expr(self.ragged):
                    live = present * Int32(step < self.steps)
                    step = cutlass.min(step, self.steps - 1)
                per_slab = self.steps // self.slabs
                slab, col = step // per_slab, (step % per_slab) * STEP
                places.append((slab, col))
                loaded.append(self.operand.load(codes.iterator, scales.iterator, row, slab, col, t))
                words = []
                for part in range_constexpr(4):
                    words.extend(ptx.load_b128_if(live, x_lane + step * STEP + 8 * part))
                acts.append(words)
            for u in range_constexpr(self.unroll):
                self._multiply(acc, loaded[u], acts[u], scales.iterator, row, places[u], t)
        self._finish(acc, global_scales, out, rows, block, warp, lane)

    @cute.jit
    def _multiply(
        self, acc: Any, words: Any, x: Any, scales: Any, row: Any, place: Any, t: Any
    ) -> None:
        """One step of 128 columns into the sums: two tiles of 16 rows, eight MMAs each."""
        prepared = self.operand.prepare(words, t)
        for tile in range_constexpr(2):
            sums = tuple(acc[4 * tile + c] for c in range(4))
            if cutlass.const_expr(self.operand.step_scales):
                sums = tuple(Float32(0.0) for _ in range(4))
            for mma in range_constexpr(MMAS):
                a = self.operand.a(words, prepared, tile, mma)
                sums = ptx.mma_bf16(sums, a, self.operand.b(x, mma))
            for c in range_constexpr(4):
                if cutlass.const_expr(self.operand.step_scales):
                    scale = self.operand.step_scale(scales, row, place[0], place[1])
                    acc[4 * tile + c] += sums[c] * scale
                else:
                    acc[4 * tile + c] = sums[c]

    @cute.jit
    def _finish(
        self, acc: Any, global_scales: Any, out: Any, rows: Any, block: Any, warp: Any, lane: Any
    ) -> None:
        """Sum over the warps along K, in their order, and write."""
        smem = cutlass.memory.SmemAllocator()
        shape = (256, self.row_warps, self.k_warps)
        sums = smem.allocate_tensor(Float32, cute.make_layout(shape), 16)
        band, part = warp % self.row_warps, warp // self.row_warps
        for c in range_constexpr(8):
            sums[c * 32 + lane, band, part] = acc[c]
        cute.arch.sync_threads()
        threads = 32 * self.row_warps * self.k_warps
        thread = warp * 32 + lane
        for turn in range_constexpr(-(-256 * self.row_warps // threads)):
            item = turn * threads + thread
            if item < 256 * self.row_warps:
                # Neighbouring threads write neighbouring rows.
                g, c2, col, own = item % 8, (item // 8) % 4, (item // 32) % 8, item // 256
                source = ((c2 // 2) * 4 + (c2 % 2) * 2 + col % 2) * 32 + g * 4 + col // 2
                total = Float32(0.0)
                for part_index in range_constexpr(self.k_warps):
                    total += sums[source, own, part_index]
                per_tile = 4 // self.row_warps
                row = (block // per_tile) * 128 + (block % per_tile) * self.row_warps * 8
                row += own * 8 + g + 32 * c2
                if (col < rows) & (row < self.n):
                    value = total * Float32(self.operand.factor) * global_scales[0]
                    out[col, row] = value.to(self.out_dtype)
