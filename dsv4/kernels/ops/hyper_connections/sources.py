"""A token's residual streams after the last sublayer: what hyper-connections call post.

    X'_k = post_k u + Σ_j comb[j,k] X_j,     u = bfloat16(Σ parts)

or, before the first layer, the token's embedding in every stream.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
from cutlass import Float32, Int32, cute

from dsv4.kernels.device import conversions, global_memory
from dsv4.kernels.device.global_memory import Load

STREAMS = 4


class Embedding(NamedTuple):
    """Before the first layer: ids int32 `[T]`, and embed bfloat16 `[V, D]`."""

    ids: cute.Tensor
    embed: cute.Tensor


class Sublayer(NamedTuple):
    """After a sublayer: streams bfloat16 `[T, 4, D]`, post float32 `[T, 4]`, comb float32
    `[T, 4, 4]`, and the parts of u, `[T, D]`.
    """

    streams: cute.Tensor
    post: cute.Tensor
    comb: cute.Tensor
    parts: tuple[cute.Tensor, ...]


Sources = Embedding | Sublayer


class Streams:
    """How they are made. first: from embeddings. u has 1 or 2 parts (u_parts), of u_type."""

    def __init__(self, hidden: int, first: bool, u_type: str, u_parts: int) -> None:
        self.hidden, self.first = hidden, first
        self.u_type, self.u_parts = u_type, u_parts

    def named(self, sources: Any) -> Sources:
        """The sources of a launch, which come in this order."""
        if self.first:
            return Embedding(*sources)
        streams, post, comb, *parts = sources
        return Sublayer(streams, post, comb, tuple(parts))

    def __call__(self, sources: Sources, token: Int32, column: Int32, count: int) -> list[Any]:
        """X' of `count` (2, 4 or 8) columns from `column`: per stream, `count / 2` words."""
        if isinstance(sources, Embedding):
            return [self._embedding(sources, token, column, count)] * STREAMS
        streams, post, comb, parts = sources
        at = token * STREAMS
        raw = [_load(streams, (at + j) * self.hidden + column, count) for j in range(STREAMS)]
        terms = [_load(part, token * self.hidden + column, count) for part in parts]
        spread = _load(post, at, STREAMS)
        mixing = [_load(comb, (at + j) * STREAMS, STREAMS) for j in range(STREAMS)]
        u = terms[0]
        if self.u_parts > 1:
            u = [a + b for a, b in zip(*terms, strict=True)]
        if self.u_parts > 1 or self.u_type == "float32":
            u = [conversions.rounded(value) for value in u]
        after = []
        for k in range(STREAMS):
            values = [spread[k] * value for value in u]
            for j in range(STREAMS):
                values = [cute.math.fma(mixing[j][k], raw[j][i], values[i]) for i in range(count)]
            after.append(conversions.bf16_pairs(values))
        return after

    def _embedding(self, sources: Embedding, token: Int32, column: Int32, count: int) -> Any:
        """An id out of range reads the nearest row there is."""
        ids, embed = sources
        row = cutlass.min(cutlass.max(Int32(ids[token]), 0), Int32(embed.shape[0]) - 1)
        return global_memory.load_words(
            embed.iterator + row * self.hidden + column, count // 2, Load.PAST_L1
        )


def _load(tensor: cute.Tensor, at: Int32, count: int) -> list[Float32]:
    """`count` neighbouring numbers of a float32 or bfloat16 tensor."""
    if tensor.element_type is not Float32:
        return conversions.bf16_values(
            global_memory.load_words(tensor.iterator + at, count // 2, Load.PAST_L1)
        )
    found: list[Any] = []
    for first in range(0, count, 4):
        found.extend(
            global_memory.load_words(
                tensor.iterator + at + first, min(count - first, 4), Load.PAST_L1
            )
        )
    return [word.bitcast(Float32) for word in found]
