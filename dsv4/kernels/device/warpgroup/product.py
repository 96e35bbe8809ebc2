"""`acc + a · b` of a warpgroup: a `[64, 16]`, b `[16, n]` bfloat16, acc `[64, n]` float32.

a comes from registers, as of `mma.m16n8k16`, warp `w` of the warpgroup having rows `16w`…, or from
a tile in shared memory (layout.py); b from a tile of n rows, 16 columns of them, or, turned, from
16 rows of tiles of 64 columns that lie one after another. acc is in registers as of
`mma.m16n8k16`, n / 8 times.

Hopper multiplies by `wgmma`, asynchronously (wgmma.py). Other architectures have no such
instruction: there each warp multiplies its own rows at once, by `mma` (mma_sync.py), and the waits
only make the warp's lanes meet. What a tile is called by differs; it is made and moved here.
"""

from __future__ import annotations

from typing import Any

from cutlass import Int32
from cutlass.base_dsl import Arch, BaseDSL

from dsv4.kernels.device.warpgroup import mma_sync, wgmma


def _form() -> Any:
    """Of the architecture that is compiled for."""
    return mma_sync if BaseDSL._get_dsl().get_arch_enum() >= Arch.sm_100 else wgmma


def tile(address: Int32) -> Any:
    """A tile at this address of shared memory."""
    return _form().tile(address)


def turned_tiles(address: Int32, tile_bytes: int) -> Any:
    """b `[16, n]`: rows of tiles that lie `tile_bytes` apart, each of 64 columns."""
    return _form().turned_tiles(address, tile_bytes)


def columns(tile: Any, step: int) -> Any:
    """The tile's columns `16 step`…"""
    return _form().columns(tile, step)


def rows(tiles: Any, step: int) -> Any:
    """The turned tiles' rows `16 step`…"""
    return _form().rows(tiles, step)


def multiply(acc: list[Any], a: Any, b: Any, turned: bool = False) -> list[Any]:
    """Issue `acc + a · b`. a: four registers, or a tile; acc: n / 2 Float32.

    turned: b is of `turned_tiles`. What is returned must not be read, nor `a` be changed, before
    the product was waited for.
    """
    return list(_form().multiply(acc, a, b, turned))


def fence() -> None:
    """Before the first product after registers were written."""
    _form().fence()


def commit() -> None:
    """The products issued since the last commit are one group."""
    _form().commit()


def wait(pending: int) -> None:
    """Until at most `pending` of the latest groups are not done."""
    _form().wait(pending)


def wait_for(acc: list[Any]) -> list[Any]:
    """Until all is done; -> the sums, which may be read."""
    return list(_form().wait_for(acc))
