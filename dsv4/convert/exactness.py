"""Exactness, counted from what the units measured: what is the source's, what was rounded, what
was to be carried and could not be.

NVFP4 holds an MXFP4 tensor exactly as long as its block scales span at most 17 octaves. What lies
below that of a wider one is rounded at the optimum, which recipe `native` refuses unless it is
told to accept it; whatever the recipe, the store names such tensors, and `dsv4 validate` fails on
them unless the store says that they were accepted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsv4.convert.outputs.base import Unit, is_weight
from dsv4.convert.outputs.results import Outcome, Result
from dsv4.convert.plan import Plan
from dsv4.formats.errors import ExactnessError
from dsv4.formats.model.recipes import Recipe
from dsv4.formats.numeric.mxfp4 import MAX_OCTAVES
from dsv4.formats.plain_text import SHOWN, counted, first


@dataclasses.dataclass(frozen=True)
class Inexact:
    """A tensor that was to be carried, and of which NVFP4 cannot hold every block."""

    name: str
    blocks: int
    rounded_blocks: int
    rel_mse: float
    max_abs_error: float

    @classmethod
    def of(cls, name: str, outcome: Outcome) -> Inexact:
        """Of an outcome that is not exact."""
        worst = (outcome.loss or {}).get("max_abs_error") or 0.0
        return cls(name, outcome.blocks, outcome.rounded_blocks, outcome.rel_mse, worst)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.rounded_blocks} of {self.blocks} blocks, largest error "
            f"{self.max_abs_error:.3g}"
        )


@dataclasses.dataclass
class Tally:
    """Outcomes added up. rounded: names of all whose values are not the source's, those that were
    to be carried (`inexact`) among them. zero: weights that are zero throughout.
    """

    exact: int = 0
    rounded: list[str] = dataclasses.field(default_factory=list)
    inexact: list[Inexact] = dataclasses.field(default_factory=list)
    zero: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, plan: Plan, results: Mapping[str, Result]) -> Tally:
        """Of a whole conversion, in the plan's order."""
        tally = cls()
        for unit in plan.units:
            tally.add(unit, results[unit.key])
        return tally

    def add(self, unit: Unit, result: Result) -> None:
        """Count what one unit measured."""
        for tensor, outcome in zip(unit.inputs, result.outcomes, strict=True):
            if outcome.exact:
                self.exact += 1
            else:
                self.rounded.append(tensor.name)
            if outcome.zero and is_weight(tensor.name):
                self.zero.append(tensor.name)
        self.inexact += inexact(unit, result)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "exact_tensors": self.exact,
            "rounded_tensors": self.rounded,
            "inexact_tensors": [dataclasses.asdict(tensor) for tensor in self.inexact],
            "zero_tensors": self.zero,
        }

    def notices(self, *, accepted: bool) -> tuple[str, ...]:
        """What is worth a sentence to whoever converts."""
        return (*inexact_notices(self.inexact, accepted=accepted), *zero_notices(self.zero))


def inexact(unit: Unit, result: Result) -> Iterator[Inexact]:
    """What the unit was to carry and did not."""
    for tensor, outcome in zip(unit.inputs, result.outcomes, strict=True):
        if not outcome.exact and not unit.output.rounds(tensor):
            yield Inexact.of(tensor.name, outcome)


def refuse_inexact(unit: Unit, result: Result) -> None:
    """Raise ExactnessError, naming the tensor, if any value is not the source's."""
    for tensor in inexact(unit, result):
        raise ExactnessError(
            f"{tensor.name} cannot be carried exactly: its block scales span more than "
            f"{MAX_OCTAVES} octaves, so {tensor.rounded_blocks} of {tensor.blocks} blocks would be "
            f"rounded, with a largest error of {tensor.max_abs_error:.3g}, and recipe native is "
            "exact; give --accept-rounding to have such blocks rounded (what is finished is kept), "
            "or choose another source"
        )
    for entry, outcome in zip(unit.inputs, result.outcomes, strict=True):
        if not outcome.exact:
            error = (outcome.loss or {}).get("max_abs_error") or 0.0
            raise ExactnessError(
                f"{entry.name} cannot be carried exactly: it is {entry.encoding}, its kernel takes "
                f"BF16, and the nearest BF16 values are up to {error:.3g} away, and recipe native "
                "is exact; give --accept-rounding to have it rounded (finished work is kept), or "
                "choose another source"
            )


def inexact_notices(
    found: Sequence[Inexact], *, accepted: bool = False, recipe: Recipe | None = None
) -> Iterator[str]:
    """Names the first few tensors that NVFP4 does not hold, and says what follows.

    recipe: of a conversion that is only planned.
    """
    if not found:
        return
    named = "; ".join(map(str, found[:SHOWN])) + ("; ..." if len(found) > SHOWN else "")
    if accepted:
        follows = "the store records that this was accepted"
    elif recipe is not None and recipe.exact:
        follows = f"recipe {recipe.name} refuses that, unless --accept-rounding is given"
    else:
        follows = "`dsv4 validate` fails on it, unless it is converted with --accept-rounding"
    yield (
        f"{counted(len(found), 'tensor')} that should be carried exactly cannot be, because NVFP4 "
        f"holds block scales of {MAX_OCTAVES} octaves at most, and what lies below is rounded "
        f"({named}); {follows}"
    )


def zero_notices(names: list[str]) -> Iterator[str]:
    """Names the first few weights that are zero throughout."""
    if names:
        yield (
            f"{counted(len(names), 'weight is', 'weights are')} zero throughout ({first(names)}); "
            "that is so where an expert was never used, or where a download was cut short"
        )
