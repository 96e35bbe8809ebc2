"""How far a long pass is: a bar on a terminal, plain lines elsewhere, or events for programs.

What matters stands first and is never cut: where, percent, time left. The bar and the other facts
take the room that is left, the last ones going first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from dsv4.formats.plain_text import duration, size

if TYPE_CHECKING:
    from dsv4.convert.counter import Event
    from dsv4.sharing.transfer import Moved
    from dsv4.validate.watch import Step

SECONDS_BETWEEN_EVENTS = 0.5
SECONDS_BETWEEN_LINES = 10.0
SECONDS_FOR_A_RATE = 2.0  # before that, a time left would be a guess
LEAST_BAR, LARGEST_BAR = 8, 40
_LAYER = re.compile(r"(?:(layers)|(mtp))/(\d+)/")


@dataclasses.dataclass(frozen=True)
class Stand:
    """How far it is. skipped: of the bytes done, those of an earlier run. facts: said last."""

    where: str
    done: int
    total: int
    skipped: int = 0
    facts: tuple[str, ...] = ()


class Clock:
    """Rates and times of one run; what an earlier run did does not count."""

    def __init__(self) -> None:
        self._begin = time.monotonic()

    def rate(self, stand: Stand) -> float | None:
        """Bytes a second so far; None while nothing has been measured."""
        elapsed = time.monotonic() - self._begin
        moved = stand.done - stand.skipped
        return moved / elapsed if moved > 0 and elapsed >= SECONDS_FOR_A_RATE else None

    def seconds_left(self, stand: Stand) -> float | None:
        """At this rate; None while there is none."""
        rate = self.rate(stand)
        return None if rate is None else (stand.total - stand.done) / rate


def told(stand: Stand, clock: Clock) -> list[str]:
    """Percent and time left, then what may be dropped where there is no room."""
    rate, left = clock.rate(stand), clock.seconds_left(stand)
    percent = f"{100 * stand.done // max(stand.total, 1):3d} %"
    first = percent if not left else f"{percent}  {duration(left)} left"
    more = [f"{size(stand.done)} of {size(stand.total)}"]
    more += [] if rate is None else [f"{size(rate)}/s"]
    return [first, *more, *stand.facts]


class Bar:
    """One line of a terminal, as wide as that is; asked again several times a second."""

    def __init__(self, stand: Stand) -> None:
        self.stand = stand
        self.clock = Clock()

    def line(self, width: int) -> Table:
        """The line for so many columns."""
        facts = told(self.stand, self.clock)
        where = self.stand.where[: max(width - len(facts[0]) - LEAST_BAR - 4, 8)]
        while len(facts) > 1 and self._bar(width, where, facts) < LEAST_BAR:
            facts.pop()
        room = max(min(self._bar(width, where, facts), LARGEST_BAR), 1)
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_row(
            where,
            ProgressBar(total=max(self.stand.total, 1), completed=self.stand.done, width=room),
            "  ".join(facts),
        )
        for column in line.columns:
            column.no_wrap = True
        return line

    @staticmethod
    def _bar(width: int, where: str, facts: list[str]) -> int:
        return width - len(where) - len("  ".join(facts)) - 5


class Lines:
    """A line for every tenth, and one at least every ten seconds in which something moved."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._clock = Clock()
        self._lock = threading.Lock()
        self._tenth, self._said = -1, 0.0

    def __call__(self, stand: Stand) -> None:
        tenth, now = 10 * stand.done // max(stand.total, 1), time.monotonic()
        with self._lock:
            if tenth <= self._tenth and now - self._said < SECONDS_BETWEEN_LINES:
                return
            self._tenth, self._said = max(tenth, self._tenth), now
            self._console.print("  ".join([*told(stand, self._clock), stand.where]))


@contextlib.contextmanager
def showing(console: Console) -> Iterator[Callable[[Stand], None]]:
    """-> what to call with every stand, from any thread."""
    if not console.is_terminal:
        yield Lines(console)
        return
    bar = Bar(Stand("reading", 0, 1))

    def update(stand: Stand) -> None:
        bar.stand = stand

    with Live(
        get_renderable=lambda: bar.line(console.width),
        console=console,
        transient=True,
        refresh_per_second=5,
    ):
        yield update


@contextlib.contextmanager
def conversion_progress(
    console: Console, *, as_json: bool = False
) -> Iterator[Callable[[Event], None]]:
    """-> what to call with every event. Events for programs are one JSON object a line."""
    if as_json:
        yield _Events(console)
        return
    with showing(console) as show:
        yield lambda event: show(_stand(event))


@contextlib.contextmanager
def checking_progress(
    console: Console, *, as_json: bool = False
) -> Iterator[Callable[[Step], None] | None]:
    """-> what a validation or a repair tells its steps; nothing where a program reads along."""
    if as_json:
        yield None
        return
    with showing(console) as show:
        yield lambda step: show(Stand(step.what, step.done_bytes, step.total_bytes))


@contextlib.contextmanager
def transfer_progress(
    console: Console, *, as_json: bool = False
) -> Iterator[Callable[[Moved], None]]:
    """-> what to call with every piece that was moved. Events are one JSON object a line."""
    if as_json:
        yield _MovedEvents(console)
        return
    with showing(console) as show:
        yield lambda moved: show(_moved_stand(moved))


def _moved_stand(moved: Moved) -> Stand:
    where = layer_of(moved.file)
    return Stand(where, moved.done_bytes, moved.total_bytes, moved.resumed_bytes)


def layer_of(unit: str) -> str:
    """`layers/7/ffn/experts/w13#12` -> `layer 7`."""
    if (match := _LAYER.match(unit)) is None:
        return unit.partition("/")[0]
    return f"{'layer' if match[1] else 'draft layer'} {match[3]}"


def _stand(event: Event) -> Stand:
    facts = [f"{event.done_tensors:,} of {event.total_tensors:,} tensors"]
    if event.inexact_tensors:
        facts.append(f"{event.inexact_tensors:,} not exact")
    if event.copy_rate:
        facts.append(f"(a plain copy: {size(event.copy_rate)}/s)")
    return Stand(
        layer_of(event.unit),
        event.done_bytes,
        event.total_bytes,
        event.resumed_bytes,
        tuple(facts),
    )


class _EventLines:
    """A JSON object a line, at most two a second and always the last."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._clock = Clock()
        self._last = -SECONDS_BETWEEN_EVENTS

    def say(self, stand: Stand, **facts: Any) -> None:
        """A stand, with facts of its kind."""
        now = time.monotonic()
        if stand.done < stand.total and now - self._last < SECONDS_BETWEEN_EVENTS:
            return
        self._last = now
        rate, left = self._clock.rate(stand), self._clock.seconds_left(stand)
        document: dict[str, Any] = {
            "event": "progress",
            "layer": stand.where,
            "done_bytes": stand.done,
            "total_bytes": stand.total,
            "resumed_bytes": stand.skipped,
            **facts,
            "bytes_per_second": None if rate is None else round(rate),
            "seconds_left": None if left is None else round(left, 1),
        }
        self._console.file.write(json.dumps(document) + "\n")
        self._console.file.flush()


class _Events(_EventLines):
    """Of a conversion."""

    def __call__(self, event: Event) -> None:
        self.say(
            _stand(event),
            unit=event.unit,
            done_tensors=event.done_tensors,
            total_tensors=event.total_tensors,
            inexact_tensors=event.inexact_tensors,
            copy_bytes_per_second=event.copy_rate and round(event.copy_rate),
        )


class _MovedEvents(_EventLines):
    """Of a pull or a push."""

    def __call__(self, moved: Moved) -> None:
        self.say(_moved_stand(moved), file=moved.file)
