"""A warpgroup's product as each warp's own: `ldmatrix`, then `mma.m16n8k16`, synchronously."""

from __future__ import annotations

from typing import Any, NamedTuple

import cutlass.cute as cute
from cutlass import Int32
from cutlass.cutlass_dsl import dsl_user_op

from dsv4.kernels.device.warpgroup.inline import tied
from dsv4.kernels.device.warpgroup.layout import GROUP_BYTES, MMA_COLS, TILE_COLS, TILE_ROW_BYTES

_CHUNK = 16  # bytes of a row of an 8 x 8 matrix, which `ldmatrix` takes one address for
_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


class Tile(NamedTuple):
    """Where a tile begins, and bytes of its rows before the columns that are meant."""

    address: Int32
    before: int


class TurnedTiles(NamedTuple):
    """Where the first row begins, and bytes between tiles."""

    address: Int32
    tile_bytes: int


def tile(address: Int32) -> Tile:
    """Of a tile at this address."""
    return Tile(address, 0)


def turned_tiles(address: Int32, tile_bytes: int) -> TurnedTiles:
    """Of b `[16, n]` in rows of tiles."""
    return TurnedTiles(address, tile_bytes)


def columns(tile: Tile, step: int) -> Tile:
    """The tile's columns `16 step`…"""
    return Tile(tile.address, tile.before + step * (MMA_COLS * 2))


def rows(tiles: TurnedTiles, step: int) -> TurnedTiles:
    """The turned tiles' rows `16 step`…"""
    return TurnedTiles(tiles.address + step * (MMA_COLS * TILE_ROW_BYTES), tiles.tile_bytes)


def _swizzled(offset: Int32) -> Int32:
    """Where in a tile a chunk lies: bits 4 to 6 mixed with those of the row.

    The tile's address is added after: so few places serve all tiles.
    """
    return offset ^ ((offset >> 3) & (GROUP_BYTES - TILE_ROW_BYTES >> 3))


def multiply(acc: list[Any], a: Any, b: Any, turned: bool) -> list[Any]:
    """`acc + a · b` of the warp's 16 rows; what is returned may be read."""
    lane = cute.arch.lane_idx()
    row, second, third = lane % 8, lane // 8 % 2, lane // 16
    if isinstance(a, Tile):
        own = cute.arch.warp_idx() % 4 * 16 + second * 8 + row
        place = own * TILE_ROW_BYTES + third * _CHUNK + a.before
        left = [a.address + _swizzled(place)]
    else:
        left = list(a)
    blocks = range(-(-len(acc) // 8))  # of 16 columns of acc
    if turned:
        place = (second * 8 + row) * TILE_ROW_BYTES + third * _CHUNK
        count = TILE_COLS // 16  # in a tile
        right = [b.address + _swizzled(place + 2 * _CHUNK * i) for i in range(count)]
        places = [(i % count, i // count * b.tile_bytes) for i in blocks]
    else:
        place = (third * 8 + row) * TILE_ROW_BYTES + second * _CHUNK + b.before
        right = [b.address + _swizzled(place)]
        places = [(0, i * 16 * TILE_ROW_BYTES) for i in blocks]
    return _products(acc, left, right, places, turned)


@dsl_user_op
def _products(
    acc: list[Any],
    left: list[Any],
    right: list[Any],
    places: list[tuple[int, int]],
    turned: bool,
    *,
    loc: Any = None,
    ip: Any = None,
) -> list[Any]:
    """All products of a warp. left: four registers or an address; places: for each 16 columns of
    acc, which address of `right`, and bytes from there.
    """
    first = 2 * len(acc)  # the tied inputs come between
    a = [f"${first + i}" for i in range(len(left))]
    text = "{ .reg .b32 a0, a1, a2, a3, b0, b1, b2, b3; "
    if len(left) == 1:
        text += f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{a0, a1, a2, a3}}, [{a[0]}]; "
        a = ["a0", "a1", "a2", "a3"]
    for block, (index, offset) in enumerate(places):
        halves = min(2, len(acc) // 4 - 2 * block)
        b = [f"b{i}" for i in range(2 * halves)]
        text += (
            f"ldmatrix.sync.aligned.m8n8.x{len(b)}{'.trans' if turned else ''}.shared.b16 "
            f"{{{', '.join(b)}}}, [${first + len(left) + index}+{offset}]; "
        )
        for half in range(halves):
            at = 4 * (2 * block + half)
            sums = "{" + ", ".join(f"${at + i}" for i in range(4)) + "}"
            pair = "{" + ", ".join(b[2 * half : 2 * half + 2]) + "}"
            text += f"{_MMA} {sums}, {{{', '.join(a)}}}, {pair}, {sums}; "
    return tied(acc, [*left, *right], text + "}", ["r"] * (len(left) + len(right)), loc, ip)


def fence() -> None:
    """Nothing to order."""


def commit() -> None:
    """Nothing is under way."""


def wait(pending: int) -> None:
    """What was multiplied has been read, by all lanes."""
    cute.arch.sync_warp()


def wait_for(acc: list[Any]) -> list[Any]:
    """The same; -> the sums."""
    cute.arch.sync_warp()
    return acc
