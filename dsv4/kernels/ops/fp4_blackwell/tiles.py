"""Where things lie: rows of groups in tiles of 128, scale tiles, steps along K-slabs.

Arithmetic alone, so that kernels trace these functions with their integers and tests run them with
Python's. Scale tiles are 32x4x4: 128 rows x 4 blocks in 512 bytes, `formats/numeric/layouts.py`.

Tokens sorted by group (expert) lie densely, group g in rows `[offsets[g], offsets[g + 1])`. Their
scales do not: each group begins a new row tile, so that a tile belongs to one group. `before[g]`
row tiles come before group g's; empty groups have none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

TILE_ROWS = 128
TILE_COLUMNS = 64  # 4 blocks of 16
TILE_BYTES = 512


def row_tiles(rows: Any) -> Any:
    """Tiles that `rows` rows take."""
    return (rows + (TILE_ROWS - 1)) // TILE_ROWS


def most_row_tiles(rows: int, groups: int) -> int:
    """The most row tiles that `rows` rows can take when `groups` groups share them."""
    first = min(rows, groups)
    return first + (rows - first) // TILE_ROWS


def scale_offset(row_tile: Any, col_tile: Any, col_tiles: Any) -> Any:
    """The byte that a scale tile begins at; tiles go along K first."""
    return (row_tile * col_tiles + col_tile) * TILE_BYTES


def scale_in_tile(row: Any, block: Any) -> Any:
    """The byte of a tile that row 0..127, block 0..3 of it have."""
    return (row % 32) * 16 + (row // 32) * 4 + block


def last_not_above(count: int, wanted: Any, value: Callable[[Any], Any], integer: Any) -> Any:
    """The last i below `count` with `value(i) <= wanted`; values ascend, `value(0) <= wanted`.

    integer: makes a truth value a number (`int`, or a kernel's integer type).
    """
    found, step = integer(0), 1 << max(count - 1, 1).bit_length() - 1
    while step:
        probe = found + step
        inside = integer(probe < count)
        found = found + step * (inside * integer(value(probe * inside) <= wanted))
        step //= 2
    return found


def slab_step(step: Any, per_slab: int) -> tuple[Any, Any]:
    """(slab, step of it) of a step along K; every slab has `per_slab` steps."""
    return step // per_slab, step % per_slab


def step_columns(slab_columns: int) -> int:
    """Columns of one step: the most of 256, 128 and 64 that divide a slab."""
    return next(size for size in (256, 128, 64) if slab_columns % size == 0)


def output_tile(tile: Any, tiles_m: Any) -> tuple[Any, Any]:
    """(row tile, column tile) of a product's tile: row tiles first, they share the weight."""
    return tile % tiles_m, tile // tiles_m


def group_tile(tile: Any, before: Any, tiles_m: Any, tiles_n: int) -> tuple[Any, Any]:
    """(row tile of the group, column tile): as `output_tile` within a group's run of tiles.

    before: row tiles of the groups before; tiles_m: row tiles of this group, at least 1.
    """
    return output_tile(tile - before * tiles_n, tiles_m)


def interleaved(column: Any, run: int) -> tuple[Any, Any]:
    """(projection, its row) that a column of a `w13` product is: runs of gate, then of up."""
    return column // run % 2, column // (2 * run) * run + column % run
