"""Geometry of the report's two plots, in the units of an SVG's view box; the template draws them.

A plot is laid out for the width of a phone, so that its text stays readable there; histograms are
scaled up elsewhere, the plot over layers comes in a second, wider layout.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from dsv4.validate.provenance import role
from dsv4.validate.report import SCALE_OCTAVES

WIDTH, HEIGHT = 340.0, 210.0
WIDE = 1088.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 8.0, 12.0, 24.0
_GROUP_WIDTH = 34.0  # of the draft stages, and of the head, right of the layers
_GROUP_GAP = 8.0
_LABEL_WIDTH = 28.0
_BLOCK = re.compile(r"(layers|mtp)\.(\d+)\.")
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclasses.dataclass(frozen=True)
class Tick:
    """A label at a position along one axis."""

    at: float
    label: str


@dataclasses.dataclass(frozen=True)
class Mark:
    """The worst tensor of one role in one layer; `y` to `low` spans the others."""

    x: float
    y: float
    low: float
    series: int
    title: str


@dataclasses.dataclass(frozen=True)
class ErrorPlot:
    """Relative MSE per layer: `series` are roles, `marks` refer to them by index.

    radius: half the size of a mark.
    """

    width: float
    radius: float
    series: tuple[str, ...]
    marks: tuple[Mark, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


@dataclasses.dataclass(frozen=True)
class Bar:
    """One octave of a histogram."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Block scales of one role, by octave."""

    width: float
    role: str
    blocks: int
    bars: tuple[Bar, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def error_plot(rel_mse: Mapping[str, float], width: float = WIDTH) -> ErrorPlot:
    """Relative MSE of rounded tensors over layers, draft stages and the head.

    rel_mse: by tensor name, or by the template of a stack; at least one.
    """
    roles = sorted({str(role(name)) for name in rel_mse})
    places = sorted({_place(name) for name in rel_mse})
    xs, x_ticks, slot = _columns(places, width)
    dodge = min(slot / len(roles), 9.0)  # the roles of a layer stand beside each other
    steps, top = _steps(max(rel_mse.values()))
    cells: dict[tuple[str, tuple[int, int]], list[str]] = {}
    for name in rel_mse:
        cells.setdefault((str(role(name)), _place(name)), []).append(name)
    marks = []
    for (kind, place), names in sorted(cells.items()):
        worst = max(names, key=lambda name: rel_mse[name])
        more = f", the worst of {len(names)}" if len(names) > 1 else ""
        marks.append(
            Mark(
                xs[place] + dodge * (roles.index(kind) - (len(roles) - 1) / 2),
                _height(rel_mse[worst], top),
                _height(min(rel_mse[name] for name in names), top),
                roles.index(kind),
                f"{worst}: {rel_mse[worst]:.4g}{more}",
            )
        )
    y_ticks = tuple(Tick(_height(step, top), f"{step:.3g}") for step in steps)
    radius = min(max(dodge / 2, 2.25), 4.0)
    return ErrorPlot(width, radius, tuple(roles), tuple(marks), x_ticks, y_ticks)


def histogram(kind: str, counts: Sequence[int]) -> Histogram:
    """The share of block scales in each of `SCALE_OCTAVES`; counts: one per octave."""
    blocks = max(sum(counts), 1)
    steps, top = _steps(100 * max(counts) / blocks)
    step = (WIDTH - LEFT - RIGHT) / len(counts)
    bars, x_ticks = [], []
    for index, (octave, count) in enumerate(zip(SCALE_OCTAVES, counts, strict=True)):
        share = 100 * max(count, 0) / blocks
        y = _height(share, top)
        label = "0" if octave == "zero" else f"2{str(octave).translate(_SUPERSCRIPTS)}"
        x = LEFT + index * step
        title = f"{label}: {count} of {blocks} blocks ({share:.3g} %)"
        bars.append(Bar(x + 1.0, y, step - 2.0, HEIGHT - BOTTOM - y, title))
        if octave == "zero" or (isinstance(octave, int) and octave % 3 == 2):
            x_ticks.append(Tick(x + step / 2, label))
    y_ticks = tuple(Tick(_height(at, top), f"{at:.3g} %") for at in steps)
    return Histogram(WIDTH, kind, sum(counts), tuple(bars), tuple(x_ticks), y_ticks)


def _place(name: str) -> tuple[int, int]:
    """-> (0 layer, 1 draft stage, 2 head; number)."""
    match = _BLOCK.match(name)
    if match is None:
        return 2, 0
    return int(match[1] == "mtp"), int(match[2])


def _columns(
    places: Sequence[tuple[int, int]], width: float
) -> tuple[dict[tuple[int, int], float], tuple[Tick, ...], float]:
    """-> (x of every place, labels, width of a layer).

    Layers share what draft stages and head leave.
    """
    groups = [[place for place in places if place[0] == kind] for kind in range(3)]
    taken = [_GROUP_WIDTH + _GROUP_GAP if group else 0.0 for group in groups]
    starts = [LEFT, width - RIGHT - taken[1] - taken[2], width - RIGHT - taken[2]]
    ends = [starts[1], starts[2], width - RIGHT]
    starts = [starts[0], starts[1] + _GROUP_GAP, starts[2] + _GROUP_GAP]
    xs, ticks, slot = {}, [], _GROUP_WIDTH
    for kind, group in enumerate(groups):
        # A layer's number is its position, so that a layer that rounds nothing is a gap.
        count = max((number for _, number in group), default=-1) + 1
        step = (ends[kind] - starts[kind]) / max(count, 1)
        for place in group:
            xs[place] = starts[kind] + step * (place[1] + 0.5)
        if group:
            slot = min(slot, step)
        if kind == 0:
            skip = next(n for n in (1, 2, 5, 10, 20, 50, 1 << 30) if n * step >= _LABEL_WIDTH)
            numbers = range(0, count, skip)
            ticks += [Tick(LEFT + step * (number + 0.5), str(number)) for number in numbers]
        elif group:
            ticks.append(Tick((starts[kind] + ends[kind]) / 2, ("", "mtp", "head")[kind]))
    return xs, tuple(ticks), slot


def _steps(largest: float) -> tuple[list[float], float]:
    """-> (round numbers from 0 up, the top of an axis that holds `largest`)."""
    top = largest * 1.12 or 1.0
    power = 10.0 ** math.floor(math.log10(top))
    step = next(m * power for m in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0) if top <= 5 * m * power)
    return [step * index for index in range(int(top / step) + 1)], top


def _height(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * min(value / top, 1.0)
