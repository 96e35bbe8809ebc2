"""The gate of a feed-forward layer: `silu(min(g, limit)) · clamp(u, -limit, limit)`."""

from __future__ import annotations

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from dsv4.kernels.device import vectors, words

THREADS = 256
COLUMNS = 8  # of a thread
LOG2_E = 1.4426950408889634


class Swiglu:
    """gate, up: float32 `[T, I]`; h: bfloat16 `[T, I]`. limit: 0 for none."""

    def __init__(self, inter: int, limit: float) -> None:
        if inter % COLUMNS:
            raise ValueError(f"{inter} columns are not a multiple of {COLUMNS}")
        self.limit = limit

    @cute.jit
    def __call__(
        self, gate: cute.Tensor, up: cute.Tensor, h: cute.Tensor, stream: cuda.CUstream
    ) -> None:
        groups = Int32(h.shape[0]) * (h.shape[1] // COLUMNS)
        self.kernel(gate, up, h, groups).launch(
            grid=[(groups + THREADS - 1) // THREADS, 1, 1], block=[THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, gate: cute.Tensor, up: cute.Tensor, h: cute.Tensor, groups: Int32) -> None:
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        group = block * THREADS + thread
        at = Int64(group) * COLUMNS
        there = Int32(group < groups)
        loaded = [
            vectors.load_b128_if(there, source.iterator + (at + 4 * half))
            for source in (gate, up)
            for half in range(2)
        ]
        values = [words.as_float(word) for quad in loaded for word in quad]
        result = [self._gated(values[i], values[COLUMNS + i]) for i in range(COLUMNS)]
        if group < groups:
            vectors.store_b128(h.iterator + at, words.pack_all(result))

    def _gated(self, gate: Float32, up: Float32) -> Any:
        if self.limit > 0:
            gate = cutlass.min(gate, Float32(self.limit))
            up = cutlass.max(cutlass.min(up, Float32(self.limit)), Float32(-self.limit))
        decay = cute.math.exp2(gate * Float32(-LOG2_E), fastmath=True)
        return gate * cute.arch.rcp_approx(Float32(1.0) + decay) * up
