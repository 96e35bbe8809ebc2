"""The rows that a token attends to: how they are cut into parts, and how they are fetched.

They are counted with the compressed entries first and the window after them. A CTA takes whole
tiles of rows; what a part holds depends on the token's own numbers alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, range_constexpr

from dsv4.kernels.device import async_copies, global_memory, mbarriers, shared_memory
from dsv4.kernels.device.global_memory import Load

ROW_BYTES = 576
SCALE_BYTES = 8
WARPS = 8  # of a CTA
WARP_ROWS = 8  # that a warp asks for
TILE = WARPS * WARP_ROWS  # rows that are fetched at once


class Caches(NamedTuple):
    """Tensors: the window's rows and scales; those of the compressed blocks where there are any;
    listed: int32 `[T, topk]`, numbers of blocks, in mode "list".
    """

    window: Any
    window_scales: Any
    blocks: Any = None
    block_scales: Any = None
    listed: Any = None


class Query(NamedTuple):
    """A token: its slot of the caches, its position, where its oldest window row lies in the ring.

    blocks: entries that it may see. last: the end of this part of the rows.
    """

    caches: Caches
    slot: Any
    position: Any
    oldest: Any
    blocks: Any
    last: Any


class Stage(NamedTuple):
    """Addresses of a tile's rows, scales and live bits, and of its barrier."""

    rows: Any
    scales: Any
    live: Any
    barrier: Any


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

    def listed(self, caches: Caches, token: Any, first: Any) -> Any:
        """The listed entry of this thread's row of a tile; asked for early."""
        if self.mode != "list":
            return Int32(0)
        at = token * self.topk + cutlass.min(first + self._own(), self.topk - 1)
        return Int32(
            global_memory.load_word(caches.listed.iterator.toint() + Int64(at) * 4, Load.PLAIN)
        )

    @cute.jit
    def _row(self, query: Query, listed: Any, j: Int32) -> tuple[Int64, Int64]:
        """Where the j-th row lies: row and scales; 0 for none."""
        caches, blocks = query.caches, query.blocks
        ring_size = Int32(caches.window.shape[1])
        place = query.oldest + (j - blocks)
        place = place - ring_size if place >= ring_size else place
        row = Int64(query.slot * ring_size + place)
        live = j < query.last
        kv, scales = caches.window.iterator.toint(), caches.window_scales.iterator.toint()
        if cutlass.const_expr(self.mode != "none"):
            old = j < blocks
            block = j
            if cutlass.const_expr(self.mode == "list"):
                block = listed
                live = live & ((j >= blocks) | (listed >= 0))
            capacity = Int64(caches.blocks.shape[1])
            row = Int64(query.slot) * capacity + block if old else row
            kv = caches.blocks.iterator.toint() if old else kv
            scales = caches.block_scales.iterator.toint() if old else scales
        kv, scales = kv + row * ROW_BYTES, scales + row * SCALE_BYTES
        return (kv if live else Int64(0)), (scales if live else Int64(0))

    @cute.jit
    def fetch(self, query: Query, listed: Any, first: Int32, stage: Stage) -> None:
        """Ask for the rows `first ...` of a tile; zeros where there is none.

        The stage's barrier expects all threads.
        """
        rows, scales, live, barrier = stage
        lane, warp = cute.arch.lane_idx(), cute.arch.warp_idx()
        kv, scale = self._row(query, listed, first + self._own())
        low, high = Int32(kv), Int32(kv >> 32)
        rows += warp * (WARP_ROWS * ROW_BYTES)
        for row in range_constexpr(WARP_ROWS):
            here = _join(cute.arch.shuffle_sync(low, row), cute.arch.shuffle_sync(high, row))
            slot = rows + row * ROW_BYTES + lane * 16
            async_copies.copy_or_zero(slot, here + lane * 16, Int32(here != 0))
        # A row is 36 pieces: the last four of each.
        row = lane // 4
        here = _join(cute.arch.shuffle_sync(low, row), cute.arch.shuffle_sync(high, row))
        rest = 512 + (lane % 4) * 16
        async_copies.copy_or_zero(rows + row * ROW_BYTES + rest, here + rest, Int32(here != 0))
        mask = cute.arch.vote_ballot_sync(kv != 0)
        if lane < WARP_ROWS:
            slot = scales + (warp * WARP_ROWS + lane) * SCALE_BYTES
            async_copies.copy_or_zero(slot, scale, Int32(scale != 0), 8)
        if lane == 0:
            shared_memory.store_byte(live + warp, mask)
        mbarriers.arrive_after_copies(barrier)


def _join(low: Any, high: Any) -> Any:
    """The two halves of an address."""
    return (Int64(high) << 32) | Int64(Uint32(low))
