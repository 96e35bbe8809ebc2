"""`acc + a · b` of a warpgroup: a `[64, 16]`, b `[16, n]` bfloat16, acc `[64, n]` float32.

a comes from registers, as of `mma.m16n8k16`, warp `w` of the warpgroup having rows `16w`…, or from
a tile in shared memory (layout.py); b from a tile of n rows, 16 columns of them, or, turned, from
16 rows of tiles of 64 columns that lie one after another. acc is in registers as of
`mma.m16n8k16`, n / 8 times.

Hopper multiplies by `wgmma`, asynchronously (wgmma.py). Other architectures have no such
instruction: there each warp multiplies its own rows at once, by `mma` (mma_sync.py), and the waits
only make the warp's lanes meet. What a tile is called by differs; it is made and moved there.
"""

from __future__ import annotations

from typing import Any, Protocol

from cutlass import Int32


class Products(Protocol):
    """What wgmma.py and mma_sync.py both offer."""

    def tile(self, address: Int32) -> Any:
        """A tile at this address of shared memory."""

    def turned_tiles(self, address: Int32, tile_bytes: int) -> Any:
        """b `[16, n]`: rows of tiles that lie `tile_bytes` apart, each of 64 columns."""

    def columns(self, tile: Any, step: int) -> Any:
        """The tile's columns `16 step`…"""

    def rows(self, tiles: Any, step: int) -> Any:
        """The turned tiles' rows `16 step`…"""

    def multiply(self, acc: list[Any], a: Any, b: Any, turned: bool = False) -> list[Any]:
        """Issue `acc + a · b`. a: four registers, or a tile; acc: n / 2 Float32.

        turned: b is of `turned_tiles`. What is returned must not be read, nor `a` be changed,
        before the product was waited for.
        """

    def fence(self) -> None:
        """Before the first product after registers were written."""

    def commit(self) -> None:
        """The products issued since the last commit are one group."""

    def wait(self, pending: int) -> None:
        """Until at most `pending` of the latest groups are not done."""

    def wait_for(self, acc: list[Any]) -> list[Any]:
        """Until all is done; -> the sums, which may be read."""
