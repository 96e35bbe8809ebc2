"""Which group (expert) a row tile belongs to, from offsets that only the device knows.

See `dsv4.kernels.ops.fp4_blackwell.tiles` for how sorted rows lie in tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, range_constexpr

from dsv4.kernels.ops.fp4_blackwell.tiles import TILE_ROWS, last_not_above, row_tiles


class RowTile(NamedTuple):
    """Rows `[first, end)` of a group that begin a tile; `end` may be beyond it."""

    group: Any
    first: Any
    end: Any


@cute.jit
def count_tiles(offsets: cute.Tensor, before: cute.Tensor, groups: cutlass.Constexpr[int]) -> None:
    """Fill `before` `[groups + 1]` (shared memory): row tiles before each group, and of all.

    Run by one warp; others have to wait for it.
    """
    lane = cute.arch.lane_idx()
    turns = -(-groups // 32)
    counts = []
    for turn in range_constexpr(turns):
        group = turn * 32 + lane
        count = Int32(0)
        if group < groups:
            count = row_tiles(offsets[group + 1] - offsets[group])
        counts.append(count)
    total = Int32(0)
    for turn in range_constexpr(turns):
        group = turn * 32 + lane
        through = counts[turn]
        for power in range_constexpr(5):
            lower = cute.arch.shuffle_sync_up(through, 1 << power)
            if lane >= (1 << power):
                through += lower
        if group < groups:
            before[group] = total + through - counts[turn]
        total += cute.arch.shuffle_sync(through, 31)
    if lane == 0:
        before[groups] = total


def group_of(tile: Any, before: Any, groups: int) -> Any:
    """The group of a row tile below `before[groups]`."""
    return last_not_above(groups, tile, lambda group: before[group], Int32)


def rows_of(tile: Any, offsets: Any, before: Any, groups: int) -> RowTile:
    """The rows of a row tile below `before[groups]`."""
    group = group_of(tile, before, groups)
    first = offsets[group] + (tile - before[group]) * TILE_ROWS
    return RowTile(group, first, offsets[group + 1])
