"""The rows that a token attends to: how they are cut into parts, and how they are fetched.

They are counted with the compressed entries first and the window after them. A CTA takes whole
tiles of rows; what a part holds depends on the token's own numbers alone.
"""

from __future__ import annotations

from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, range_constexpr

from dsv4.kernels.device import mbarriers, ring, shared_memory

ROW_BYTES = 576
SCALE_BYTES = 8
WARPS = 8  # of a CTA
WARP_ROWS = 8  # that a warp asks for
TILE = WARPS * WARP_ROWS  # rows that are fetched at once


class Rows:
    """mode: "none", "all" or "list"; splits: the most parts.

    Tiles lie in shared memory as `[row][576]` and `[row][8]`; `live` has a bit per row.
    """

    def __init__(self, mode: str, window: int, ratio: int, topk: int, splits: int) -> None:
        self.mode, self.window, self.ratio, self.topk = mode, window, ratio, topk
        self.splits = splits

    def count(self, place: Int32) -> tuple[Any, Any]:
        """Entries and window rows that the token at `place` may see; of a list all places."""
        seen = cutlass.min(place + 1, self.window)
        if self.mode == "all":
            return (place + 1) // self.ratio, seen
        return Int32(self.topk if self.mode == "list" else 0), seen

    def share(self, blocks: Any, seen: Any) -> Any:
        """Rows of a part. A list's parts are the same at any position."""
        rows = blocks + (self.window if self.mode == "list" else seen)
        tiles = (rows + TILE - 1) // TILE
        return (tiles + self.splits - 1) // self.splits * TILE

    def _own(self) -> Any:
        """The row of a tile whose place this thread works out."""
        return cute.arch.warp_idx() * WARP_ROWS + cute.arch.lane_idx() % WARP_ROWS

    def listed(self, caches: Any, token: Any, first: Any) -> Any:
        """The listed entry of this thread's row of a tile; asked for early."""
        if self.mode != "list":
            return Int32(0)
        at = token * self.topk + cutlass.min(first + self._own(), self.topk - 1)
        return shared_memory.load_global_word(caches[4].iterator.toint() + Int64(at) * 4)

    @cute.jit
    def _row(self, find: Any, listed: Any, j: Int32) -> tuple[Int64, Int64]:
        """Where the j-th row lies: row and scales; 0 for none."""
        caches, sequence, oldest, blocks, last, _ = find
        ring_size = Int32(caches[0].shape[1])
        place = oldest + (j - blocks)
        place = place - ring_size if place >= ring_size else place
        row = Int64(sequence * ring_size + place)
        live = j < last
        kv, scales = caches[0].iterator.toint(), caches[1].iterator.toint()
        if cutlass.const_expr(self.mode != "none"):
            old = j < blocks
            block = j
            if cutlass.const_expr(self.mode == "list"):
                block = listed
                live = live & ((j >= blocks) | (listed >= 0))
            capacity = Int64(caches[2].shape[1])
            row = Int64(sequence) * capacity + block if old else row
            kv = caches[2].iterator.toint() if old else kv
            scales = caches[3].iterator.toint() if old else scales
        kv, scales = kv + row * ROW_BYTES, scales + row * SCALE_BYTES
        return (kv if live else Int64(0)), (scales if live else Int64(0))

    @cute.jit
    def fetch(self, find: Any, listed: Any, first: Int32, at: Any) -> None:
        """Ask for the rows `first ...` of a tile; zeros where there is none.

        find: (caches, sequence, oldest, blocks, last, place). at: addresses of the rows, the
        scales, the live bits and the barrier, which expects all threads.
        """
        rows, scales, live, barrier = at
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        kv, scale = self._row(find, listed, first + self._own())
        low, high = Int32(kv), Int32(kv >> 32)
        rows += warp * (WARP_ROWS * ROW_BYTES)
        for row in range_constexpr(WARP_ROWS):
            here = _join(cute.arch.shuffle_sync(low, row), cute.arch.shuffle_sync(high, row))
            slot = rows + row * ROW_BYTES + lane * 16
            ring.copy_or_zero(slot, here + lane * 16, 16, Int32(here != 0))
        # A row is 36 pieces: the last four of each.
        row = lane // 4
        here = _join(cute.arch.shuffle_sync(low, row), cute.arch.shuffle_sync(high, row))
        rest = 512 + (lane % 4) * 16
        ring.copy_or_zero(rows + row * ROW_BYTES + rest, here + rest, 16, Int32(here != 0))
        mask = cute.arch.vote_ballot_sync(kv != 0)
        if lane < WARP_ROWS:
            slot = scales + (warp * WARP_ROWS + lane) * SCALE_BYTES
            ring.copy_or_zero(slot, scale, 8, Int32(scale != 0))
        if lane == 0:
            shared_memory.store_byte(live + warp, mask)
        mbarriers.arrive_after_copies(barrier)


def _join(low: Any, high: Any) -> Any:
    """The two halves of an address."""
    return (Int64(high) << 32) | Int64(Uint32(low))
