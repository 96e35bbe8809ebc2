"""How far a conversion is: a bar on a terminal, plain lines elsewhere, or events for programs."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from dsv4.convert.counter import Event

Show = Callable[["Event"], None]

SECONDS_BETWEEN_EVENTS = 0.5
_LAYER = re.compile(r"(?:(layers)|(mtp))/(\d+)/")


@contextlib.contextmanager
def conversion_progress(console: Console, *, as_json: bool = False) -> Iterator[Show]:
    """-> what to call with every event. Events for programs are one JSON object a line."""
    if as_json:
        yield _Events(console)
    elif not console.is_terminal:
        yield _Lines(console)
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[facts]}"),
        )
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task("reading", total=None, facts="")
            clock = _Clock()

            def update(event: Event) -> None:
                bar.update(
                    task,
                    completed=event.done_bytes,
                    total=event.total_bytes,
                    description=layer_of(event.unit),
                    facts=_facts(event, clock.rate(event)),
                )

            yield update


def layer_of(unit: str) -> str:
    """`layers/7/ffn/experts/w13#12` -> `layer 7`."""
    if (match := _LAYER.match(unit)) is None:
        return unit.partition("/")[0]
    return f"{'layer' if match[1] else 'draft layer'} {match[3]}"


class _Clock:
    """Rates and times of one run; what an earlier run did does not count."""

    def __init__(self) -> None:
        self._begin = time.monotonic()

    def rate(self, event: Event) -> float:
        """Source bytes a second so far."""
        elapsed = max(time.monotonic() - self._begin, 1e-9)
        return (event.done_bytes - event.resumed_bytes) / elapsed

    def seconds_left(self, event: Event) -> float:
        """At this rate."""
        return (event.total_bytes - event.done_bytes) / max(self.rate(event), 1.0)


class _Lines:
    """A line for every tenth."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._clock = _Clock()
        self._shown = -1

    def __call__(self, event: Event) -> None:
        tenth = 10 * event.done_bytes // max(event.total_bytes, 1)
        if tenth > self._shown:
            self._shown = tenth
            left = self._clock.seconds_left(event)
            facts = _facts(event, self._clock.rate(event))
            line = f"{10 * tenth:3d} %  {facts}  {left:.0f} s left  {layer_of(event.unit)}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Events:
    """A JSON object a line, at most two a second and always the last."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._clock = _Clock()
        self._last = -SECONDS_BETWEEN_EVENTS

    def __call__(self, event: Event) -> None:
        now = time.monotonic()
        if event.done_bytes < event.total_bytes and now - self._last < SECONDS_BETWEEN_EVENTS:
            return
        self._last = now
        document: dict[str, Any] = {
            "event": "progress",
            "layer": layer_of(event.unit),
            "unit": event.unit,
            "done_bytes": event.done_bytes,
            "total_bytes": event.total_bytes,
            "done_tensors": event.done_tensors,
            "total_tensors": event.total_tensors,
            "inexact_tensors": event.inexact_tensors,
            "resumed_bytes": event.resumed_bytes,
            "bytes_per_second": round(self._clock.rate(event)),
            "copy_bytes_per_second": event.copy_rate and round(event.copy_rate),
            "seconds_left": round(self._clock.seconds_left(event), 1),
        }
        self._console.file.write(json.dumps(document) + "\n")
        self._console.file.flush()


def _facts(event: Event, rate: float) -> str:
    """Bytes, tensors and rate, beside what this machine copies."""
    facts = (
        f"{decimal(event.done_bytes)} of {decimal(event.total_bytes)}  "
        f"{event.done_tensors} of {event.total_tensors} tensors  {decimal(int(rate))}/s"
    )
    if event.inexact_tensors:
        facts += f"  {event.inexact_tensors} not exact"
    if event.copy_rate:
        share = 100 * rate / event.copy_rate
        facts += f" ({share:.0f} % of a copy at {decimal(int(event.copy_rate))}/s)"
    return facts
