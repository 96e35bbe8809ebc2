"""`y = x wᵀ` for many rows of `x`: a packed or plain weight, multiplied in bfloat16."""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, range_constexpr

from dsv4.kernels.core.sizes import MULTIPROCESSORS
from dsv4.kernels.device.weight_operands import WeightTensors
from dsv4.kernels.ops.prefill.mainloop import PRODUCERS, STAGING_BYTES, Mainloop
from dsv4.kernels.ops.prefill.weight_fragments import RUN


class Gemm(Mainloop):
    """One shape of weight, a persistent grid of `ctas`.

    x: bfloat16 `[M, G, K]`, arranged if the weight's format asks for it (weight_fragments.py);
    operands: `WeightTensors` of the kind; out: float32 or bfloat16 `[M, N]`.
    With G > 1, rows `[g N/G, (g+1) N/G)` of the weight meet `x[:, g]`.
    """

    def __init__(
        self,
        kind: str,
        n: int,
        k: int,
        *,
        slabs: int = 1,
        groups: int = 1,
        out: str = "bfloat16",
        warpgroups: int = 2,
        m_each: int = 1,
        n_tile: int = 256,
        runs: int = 1,
        stages: int = 4,
        unroll: int = 1,
        ctas: int = MULTIPROCESSORS,
        arch: str,
    ) -> None:
        super().__init__(
            kind,
            n,
            k,
            slabs,
            warpgroups=warpgroups,
            m_each=m_each,
            n_tile=n_tile,
            runs=runs,
            stages=stages,
            unroll=unroll,
            arch=arch,
        )
        self.groups, self.rounded, self.ctas = groups, out == "bfloat16", ctas
        self.staging = warpgroups * STAGING_BYTES if self.rounded else 16

    @cute.jit
    def __call__(
        self, x: cute.Tensor, operands: Any, out: cute.Tensor, stream: cuda.CUstream
    ) -> None:
        rows = x.shape[0]
        tokens = self.tokens.source(x, rows, self.groups * self.k)
        codes = WeightTensors(*operands).codes
        weight = self.codes.source(codes, self.weight.slabs * self.n, self.weight.pitch)
        self.kernel(*tokens, *weight, operands, out).launch(
            grid=[self.ctas, 1, 1],
            block=[self.threads, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        tokens_atom: cute.CopyAtom,
        tokens: cute.Tensor,
        codes_atom: cute.CopyAtom,
        codes: cute.Tensor,
        operands: Any,
        out: cute.Tensor,
    ) -> None:
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        rows = Int32(out.shape[0])
        tiles = (rows + self.n_tile - 1) // self.n_tile
        ring, barriers, staging = self.allocate(self.staging)
        cute.arch.sync_threads()
        done, scales, tensors = Int32(0), Int64(0), WeightTensors(*operands)
        if cutlass.const_expr(tensors.scales is not None):
            scales = tensors.scales.iterator.toint()
        if thread < PRODUCERS:
            cute.arch.setmaxregister_decrease(self.producer_registers)
            if thread < 32:
                weight = ((codes_atom, codes), scales)
                for item in cutlass.range(block, tiles * self.m_tiles, self.ctas, unroll=1):
                    row, token = item // tiles * self.rows, item % tiles * self.n_tile
                    run = row // (self.n // self.groups) * (self.k // RUN)
                    source = ((tokens_atom, tokens), token, run)
                    done = self.produce(ring, barriers, weight, (Int32(0), row), source, done)
        else:
            cute.arch.setmaxregister_increase(self.consumer_registers)
            acc = cute.make_rmem_tensor(self.m_each * self.sums, Float32)
            factor = Float32(self.weight.factor)
            if cutlass.const_expr(tensors.global_scale is not None):
                factor *= tensors.global_scale[0]
            for item in cutlass.range(block, tiles * self.m_tiles, self.ctas, unroll=1):
                row, token = item // tiles * self.rows, item % tiles * self.n_tile
                self.consume(acc, ring, barriers, scales, row, done, self.n_tile)
                done += self.steps
                if cutlass.const_expr(self.rounded):
                    self._write_bf16(acc, staging, factor, out, row, token, rows)
                else:
                    self._write_f32(acc, factor, out, row, token, rows)

    @cute.jit
    def _write_bf16(
        self, acc: Any, staging: Any, factor: Any, out: Any, row: Any, token: Any, rows: Any
    ) -> None:
        thread, _, _ = cute.arch.thread_idx()
        group = thread // 128 - 1
        places = cute.make_rmem_tensor(self.own_rows, Int32)
        for i in range_constexpr(self.own_rows):
            at = token + thread % 128 // 8 + 16 * i
            here = Int32(at < rows)
            places[i] = at * here + here - 1
        own = staging + group * STAGING_BYTES
        for m in range_constexpr(self.m_each):
            column = row + (group * self.m_each + m) * 64
            first = out.iterator.toint() + Int64(column * 2)
            self.write_bf16(acc, m, own, factor, first, places)

    @cute.jit
    def _write_f32(self, acc: Any, factor: Any, out: Any, row: Any, token: Any, rows: Any) -> None:
        lane = cute.arch.lane_idx()
        own_row = row + self.first_row() + lane // 4
        own_token = token + lane % 4 * 2
        for m in range_constexpr(self.m_each):
            for eight in range_constexpr(self.n_tile // 8):
                for second in range_constexpr(2):
                    at = own_token + eight * 8 + second
                    place = m * self.sums + eight * 4 + second
                    if at < rows:
                        out[at, own_row + 64 * m] = acc[place] * factor
                        out[at, own_row + 64 * m + 8] = acc[place + 2] * factor
