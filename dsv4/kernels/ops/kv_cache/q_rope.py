"""Query heads: each normed without a weight, its last channels rotated, rounded to bfloat16.

A warp holds a head: four neighbouring channels a lane, in as many parts as the head needs.
"""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float64, Int32, Int64, range_constexpr

from dsv4.kernels.device import arithmetic, conversions, global_memory, rounding
from dsv4.kernels.ops.kv_cache import rows
from dsv4.kernels.ops.kv_cache.rows import CHANNELS

PART = 32 * CHANNELS  # channels of a warp's load


class QRope:
    """position: int32 `[T]`; cos, sin: float32 `[P, rope / 2]`; q: float32 or bfloat16
    `[T, H · width]`; out: bfloat16 `[T, H, width]`.

    warps: heads of a CTA.
    """

    def __init__(
        self, heads: int, width: int, rope: int, inputs: str, eps: float, warps: int, pdl: bool
    ) -> None:
        if width % PART or rope % CHANNELS or rope > PART or heads % warps:
            raise ValueError(f"{heads} heads of {width} channels, {rope} of them rotated")
        self.heads, self.width, self.nope, self.eps = heads, width, width - rope, eps
        self.wide = {"float32": True, "bfloat16": False}[inputs]
        self.warps, self.pdl = warps, pdl

    @cute.jit
    def __call__(
        self,
        position: cute.Tensor,
        cos: cute.Tensor,
        sin: cute.Tensor,
        q: cute.Tensor,
        out: cute.Tensor,
        stream: cuda.CUstream,
    ) -> None:
        self.kernel(position, cos, sin, q, out).launch(
            grid=[self.heads // self.warps, position.shape[0], 1],
            block=[32 * self.warps, 1, 1],
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def kernel(
        self,
        position: cute.Tensor,
        cos: cute.Tensor,
        sin: cute.Tensor,
        q: cute.Tensor,
        out: cute.Tensor,
    ) -> None:
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
            cute.arch.griddepcontrol_wait()
        block, row, _ = cute.arch.block_idx()
        lane = cute.arch.lane_idx()
        head = block * self.warps + cute.arch.warp_idx()
        start = (Int64(row) * self.heads + head) * self.width + lane * CHANNELS
        parts = self.width // PART
        known = global_memory.load_word((position.iterator + row).toint())
        values = []
        for part in range_constexpr(parts):
            values.append(global_memory.load_channels(q.iterator, start + part * PART, self.wide))
        at = cutlass.max(Int32(known), 0)
        column = (parts - 1) * PART + lane * CHANNELS
        turn = rows.turn_of((cos, sin), at, column, self.nope)
        squares = Float64(0.0)
        for part in range_constexpr(parts):
            squares += rows.square_sum(values[part])
        squares = cute.arch.warp_reduction_sum(squares)
        mean = squares * Float64(1.0 / self.width) + Float64(self.eps)
        inverse = rounding.inverse_root(mean)
        for part in range_constexpr(parts):
            scaled = [arithmetic.product(value, inverse) for value in values[part]]
            words = _pairs(scaled)
            if cutlass.const_expr(part == parts - 1):
                rotated = rows.rotated(conversions.to_bf16(scaled), turn)
                words = _choose(column >= self.nope, rotated, words)
            global_memory.store_words((out.iterator + start + part * PART).toint(), words)


def _pairs(values: Any) -> Any:
    a, b, c, d = values
    return conversions.bf16_pair(a, b), conversions.bf16_pair(c, d)


@cute.jit
def _choose(condition: Any, first: Any, second: Any) -> Any:
    return tuple(first[i] if condition else second[i] for i in range(2))
