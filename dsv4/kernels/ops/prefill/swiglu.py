"""The gate of a feed-forward layer: `silu(min(g, limit)) · clamp(u, -limit, limit)`."""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from dsv4.kernels.device import conversions, global_memory
from dsv4.kernels.device.elementary import swiglu

THREADS = 256
COLUMNS = 8  # of a thread


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
            global_memory.load_words_if(there, source.iterator + (at + 4 * half))
            for source in (gate, up)
            for half in range(2)
        ]
        values = [word.bitcast(Float32) for quad in loaded for word in quad]
        result = [swiglu(values[i], values[COLUMNS + i], self.limit) for i in range(COLUMNS)]
        if group < groups:
            global_memory.store_words(h.iterator + at, conversions.bf16_pairs(result))
