"""Tokens to the residual streams: a row of the embedding table, four times."""

from __future__ import annotations

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, range_constexpr

from dsv4.kernels.sm90 import transfer

THREADS = 128
VECTOR = 8  # bfloat16 in 16 bytes
_INFINITIES = 0x7F807F80


class Embed:
    """token: int32 `[T]`; table: bfloat16 `[V, D]`; streams: bfloat16 `[T, copies, D]`.

    A token outside [0, V) gives infinity.
    """

    def __init__(self, vocab: int, hidden: int, copies: int, pdl: bool) -> None:
        if hidden % VECTOR:
            raise ValueError(f"{hidden} columns, expected a multiple of {VECTOR}")
        self.vocab, self.hidden, self.copies, self.pdl = vocab, hidden, copies, pdl

    @cute.jit
    def __call__(
        self, token: cute.Tensor, table: cute.Tensor, streams: cute.Tensor, stream: cuda.CUstream
    ) -> None:
        self.kernel(token, table, streams).launch(
            grid=[-(-self.hidden // (THREADS * VECTOR)), token.shape[0], 1],
            block=[THREADS, 1, 1],
            stream=stream,
            use_pdl=self.pdl,
        )

    @cute.kernel
    def kernel(self, token: cute.Tensor, table: cute.Tensor, streams: cute.Tensor) -> None:
        if cutlass.const_expr(self.pdl):
            cute.arch.griddepcontrol_launch_dependents()
            cute.arch.griddepcontrol_wait()
        part, row, _ = cute.arch.block_idx()
        thread, _, _ = cute.arch.thread_idx()
        column = (part * THREADS + thread) * VECTOR
        if column < self.hidden:
            one = token[row]
            present = (one >= 0) & (one < self.vocab)
            source = table.iterator + Int64(one) * self.hidden + column
            words = transfer.load_b128_if(Int32(present), source)
            words = [word if present else Uint32(_INFINITIES) for word in words]
            for copy in range_constexpr(self.copies):
                place = (Int64(row) * self.copies + copy) * self.hidden + column
                transfer.store_b128(streams.iterator + place, words)
