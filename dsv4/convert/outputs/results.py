"""What the units of a conversion measured: what became of every tensor.

All that is said of exactness (summary, progress, attributes, manifest) is counted from these; they
stay in the journal until the metadata is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsv4.formats.errors import StoreError
from dsv4.formats.numeric.mxfp4 import CastReport

Figures = Mapping[str, float | None]
"""Name of a figure of loss (`rel_mse`, `max_abs_error`, ...) -> its value."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one tensor.

    exact: every value is the source's, the sign of zero included. zero: the source's values are
    all zero. blocks: of 16 columns in NVFP4; of these `recoded_blocks` have other codes of equal
    values, `rounded_blocks` other values. loss: what rounding cost, of a tensor that was to be
    rounded or had to be. global_scale: of a projection in a stack.
    """

    exact: bool = True
    zero: bool = False
    blocks: int = 0
    recoded_blocks: int = 0
    rounded_blocks: int = 0
    loss: Figures | None = None
    global_scale: float | None = None

    @classmethod
    def of_cast(cls, report: CastReport, *, zero: bool, global_scale: float) -> Outcome:
        """Of a projection in NVFP4."""
        loss = {"rel_mse": report.rel_mse, "max_abs_error": report.max_abs_error}
        return cls(
            report.exact,
            zero,
            report.blocks,
            report.recoded_blocks,
            report.rounded_blocks,
            None if report.exact else loss,
            global_scale,
        )

    @property
    def rel_mse(self) -> float:
        """sum (w - q)^2 / sum w^2; 0 where nothing was rounded."""
        return (self.loss or {}).get("rel_mse") or 0.0


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Outcome)}


@dataclasses.dataclass(frozen=True)
class Result:
    """What a unit measured: one outcome for each of its inputs, in their order."""

    outcomes: tuple[Outcome, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """For the journal: what is not the default."""
        return [
            {key: value for key, value in vars(outcome).items() if value != _DEFAULTS[key]}
            for outcome in self.outcomes
        ]

    @classmethod
    def from_json(cls, raw: Any, key: str) -> Result:
        """The inverse of `to_json`. Raises StoreError, naming the unit `key`, for anything else."""
        try:
            return cls(tuple(Outcome(**outcome) for outcome in raw))
        except TypeError:
            raise StoreError(
                f"the journal has a result of {key} that this dsv4 does not understand; remove the "
                "unfinished directory and convert again"
            ) from None
