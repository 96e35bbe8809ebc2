"""How far a conversion is: units as they finish, counted and shown."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping

from dsv4.convert.exactness import inexact, refuse_inexact
from dsv4.convert.outputs.base import Unit
from dsv4.convert.outputs.results import Result
from dsv4.convert.plan import Plan

Progress = Callable[["Event"], None]


@dataclasses.dataclass(frozen=True)
class Event:
    """One finished unit, and how much of the source's bytes and tensors is done.

    Of done_tensors, inexact_tensors were to be carried and could not be.
    """

    unit: str
    done_bytes: int
    total_bytes: int
    done_tensors: int
    total_tensors: int
    resumed_bytes: int  # of done_bytes, what an earlier run did
    copy_rate: float | None  # bytes a second this machine writes there; None when not measured
    inexact_tensors: int = 0


class Counter:
    """Counts finished units, in bytes and tensors.

    strict: whether a unit that rounded what it was to carry raises ExactnessError. What an earlier
    run finished counts as well: consent is asked of the command that finishes the store.
    """

    def __init__(
        self,
        plan: Plan,
        finished: Mapping[str, Result],
        progress: Progress | None,
        rate: float | None,
        *,
        strict: bool,
    ) -> None:
        self._lock = threading.Lock()
        self._progress = progress
        self._rate = rate
        self._strict = strict
        self._total = plan.source_bytes, sum(len(unit.inputs) for unit in plan.units)
        self._bytes = self._tensors = self._inexact = 0
        for unit in plan.units:
            if unit.key in finished:
                self._count(unit, finished[unit.key])
        self._resumed = self._bytes

    def _count(self, unit: Unit, result: Result) -> None:
        if self._strict:
            refuse_inexact(unit, result)
        self._bytes += unit.input_bytes
        self._tensors += len(unit.inputs)
        self._inexact += sum(1 for _ in inexact(unit, result))

    def add(self, unit: Unit, result: Result) -> None:
        """One more unit is finished."""
        with self._lock:
            self._count(unit, result)
            if self._progress is not None:
                total_bytes, total_tensors = self._total
                self._progress(
                    Event(
                        unit.key,
                        self._bytes,
                        total_bytes,
                        self._tensors,
                        total_tensors,
                        self._resumed,
                        self._rate,
                        self._inexact,
                    )
                )
