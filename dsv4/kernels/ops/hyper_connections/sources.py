"""A token's residual streams after the last sublayer: what hyper-connections call post.

    X'_k = post_k u + Σ_j comb[j,k] X_j,     u = bfloat16(Σ parts)

or, before the first layer, the token's embedding in every stream.
"""

from __future__ import annotations

from typing import Any

import cutlass
from cutlass import Float32, Int32, cute

from dsv4.kernels.device import words

STREAMS = 4


class Streams:
    """Where they come from.

    sources: ids int64 or int32 `[T]` and embed bfloat16 `[V, D]` (first), else streams bfloat16
    `[T, 4, D]`, post float32 `[T, 4]`, comb float32 `[T, 4, 4]` and the parts of u, 1 or 2 of
    u_type `[T, D]`.
    """

    def __init__(self, hidden: int, first: bool, u_type: str, u_parts: int) -> None:
        self.hidden, self.first = hidden, first
        self.u_type, self.u_parts = u_type, u_parts

    def __call__(self, sources: Any, token: Int32, column: Int32, count: int) -> list[Any]:
        """X' of `count` (2, 4 or 8) columns from `column`: per stream, `count / 2` words."""
        if self.first:
            return [self._embedding(sources, token, column, count)] * STREAMS
        streams, post, comb, *parts = sources
        at = token * STREAMS
        raw = [_load(streams, (at + j) * self.hidden + column, count) for j in range(STREAMS)]
        terms = [_load(part, token * self.hidden + column, count) for part in parts]
        spread = _load(post, at, STREAMS)
        mixing = [_load(comb, (at + j) * STREAMS, STREAMS) for j in range(STREAMS)]
        u = terms[0]
        if self.u_parts > 1:
            u = [a + b for a, b in zip(*terms, strict=True)]
        if self.u_parts > 1 or self.u_type == "float32":
            u = [words.rounded(value) for value in u]
        after = []
        for k in range(STREAMS):
            values = [spread[k] * value for value in u]
            for j in range(STREAMS):
                values = [cute.math.fma(mixing[j][k], raw[j][i], values[i]) for i in range(count)]
            after.append(words.pack_all(values))
        return after

    def _embedding(self, sources: Any, token: Int32, column: Int32, count: int) -> Any:
        """An id out of range reads the nearest row there is."""
        ids, embed = sources
        row = cutlass.min(cutlass.max(Int32(ids[token]), 0), Int32(embed.shape[0]) - 1)
        return words.load(embed.iterator + row * self.hidden + column, count // 2)


def _load(tensor: Any, at: Int32, count: int) -> list[Float32]:
    """`count` neighbouring numbers of a float32 or bfloat16 tensor."""
    if tensor.element_type is not Float32:
        return words.unpack(words.load(tensor.iterator + at, count // 2))
    found: list[Any] = []
    for first in range(0, count, 4):
        found.extend(words.load(tensor.iterator + at + first, min(count - first, 4)))
    return [words.as_float(word) for word in found]
