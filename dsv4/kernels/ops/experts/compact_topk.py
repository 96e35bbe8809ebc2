"""The distinct experts that up to eight tokens chose, in shared memory.

Work is shared out by expert, not by choice: an expert that several tokens chose is read once. The
experts are in ascending order, so that a token meets its own in the same order whatever the other
tokens chose.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from dsv4.kernels.core.sizes import STEP_ROWS

_NONE = 0x7FFFFFFF


def most_choices(top_k: int) -> int:
    """Of all tokens of a step together: 64, or 128 where a token has more than eight."""
    return -(-top_k * STEP_ROWS // 64) * 64


class Chosen:
    """Of `most` choices. experts: ascending; places: of their records; count: `[1]` how many;
    entry: `[most * 8]`, for (expert, token) the place in topk_idx, or -1; weights: of the choices.
    """

    def __init__(self, smem: Any, most: int) -> None:
        def table(kind: Any, size: int) -> Any:
            return smem.allocate_tensor(kind, cute.make_layout(size), 16)

        self.experts, self.count = table(Int32, most), table(Int32, 4)
        self.places = table(Int32, most)
        self.entry = table(Int32, most * STEP_ROWS)
        self.weights = table(Float32, most)
        self.ids, self.keys = table(Int32, most), table(Int32, most)


@cute.jit
def choose(
    chosen: Any, topk_idx: cute.Tensor, topk_weights: cute.Tensor, places: cute.Tensor, threads: int
) -> None:
    """By all threads of a CTA; ends with a barrier. places: int32 `[E]`, of the experts' records;
    any other number in topk_idx chooses nothing, and neither does an expert whose place is -1.

    A place is asked for first and looked at last: the barriers between hide the trip to memory.
    """
    thread, _, _ = cute.arch.thread_idx()
    top_k = topk_idx.shape[1]
    most = most_choices(top_k)
    weights, ids, keys, entry = chosen.weights, chosen.ids, chosen.keys, chosen.entry
    firsts, first_places, total = chosen.experts, chosen.places, chosen.count
    choices = Int32(topk_idx.shape[0]) * top_k
    own, place = Int32(-1), Int32(-1)
    if thread < choices:
        own = topk_idx[thread // top_k, thread % top_k]
        if (own < 0) | (own >= Int32(places.shape[0])):
            own = Int32(-1)
        if own >= 0:
            place = places[own]
        weights[thread] = topk_weights[thread // top_k, thread % top_k]
    if thread < most:
        ids[thread] = own
    for turn in cutlass.range_constexpr(most * STEP_ROWS // threads):
        entry[turn * threads + thread] = Int32(-1)
    cute.arch.sync_threads()
    first = Int32(own >= 0)
    if thread < choices:
        for other in cutlass.range(thread, unroll=8):
            if ids[other] == own:
                first = Int32(0)
    if thread < most:
        keys[thread] = own if first != 0 else Int32(_NONE)
    cute.arch.sync_threads()
    if thread < most:
        rank, count = Int32(0), Int32(0)
        for other in cutlass.range(choices, unroll=8):
            key = keys[other]
            rank += Int32(key < own)
            count += Int32(key < _NONE)
        if (own >= 0) & (place >= 0):
            entry[rank * STEP_ROWS + thread // top_k] = thread
        if first != 0:
            firsts[rank] = own
            first_places[rank] = cutlass.max(place, 0)  # some record: nobody asks for its sums
        if thread == 0:
            total[0] = count
    cute.arch.sync_threads()
