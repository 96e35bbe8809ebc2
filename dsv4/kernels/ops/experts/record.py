"""An expert's bytes in one piece: codes and scales of w13, then those of w2, as in the store.

Wherever a record lies, its kernels read it in the same way: they find it by a table of places. So
it can be moved between memories in one copy, and what is computed does not depend on its place.
Global scales, 12 bytes an expert, are not part of it.
"""

from __future__ import annotations

from typing import NamedTuple

from dsv4.kernels.core.sizes import SCALE_TILE_COLUMNS

W2_SLABS = 8


class Record(NamedTuple):
    """Of an expert of w13 `[2 inter, hidden]` and w2 `[hidden, inter]`; all sizes in bytes."""

    hidden: int
    inter: int

    @property
    def codes13(self) -> int:
        """E2M1, two in a byte; they come first."""
        return self.inter * self.hidden

    @property
    def scales13(self) -> int:
        """E4M3, one for 16 columns."""
        return self.codes13 // 8

    @property
    def codes2(self) -> int:
        """See codes13."""
        return self.inter * self.hidden // 2

    @property
    def scales2(self) -> int:
        """See scales13."""
        return self.codes2 // 8

    @property
    def scales13_at(self) -> int:
        """Where these begin."""
        return self.codes13

    @property
    def codes2_at(self) -> int:
        """Where these begin."""
        return self.codes13 + self.scales13

    @property
    def scales2_at(self) -> int:
        """Where these begin."""
        return self.codes2_at + self.codes2

    @property
    def nbytes(self) -> int:
        """Of all of it."""
        return self.scales2_at + self.scales2

    @property
    def row13(self) -> int:
        """Codes of a row of w13."""
        return self.hidden // 2

    @property
    def row2(self) -> int:
        """Codes of a row of w2 in one of its slabs."""
        return self.inter // W2_SLABS // 2

    @property
    def whole(self) -> bool:
        """Whether the record is whole rows of both matrices, and whole tiles of scales."""
        columns = W2_SLABS * SCALE_TILE_COLUMNS
        return not self.hidden % 128 and not self.inter % columns
