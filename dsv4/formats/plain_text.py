"""Text for people: a stranger's made safe to show; sizes, times, lists, orders, each one way."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

SHOWN = 3  # of many names, those that a sentence lists


def natural_key(path: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key of a tensor's name or a node's path that puts layer 2 before layer 10."""
    return tuple(map(_natural_part, re.split(r"[/.]", path)))


@functools.lru_cache(maxsize=4096)  # a model's names are made of a few hundred words and numbers
def _natural_part(part: str) -> tuple[int, int | str]:
    return (0, int(part)) if part.isdigit() else (1, part)


def printable(text: str, limit: int | None = None) -> str:
    """`text` on one line: control and formatting characters are written as escapes.

    With `limit`, what is longer than that many characters ends in an ellipsis.
    """
    text = text if limit is None else text[: limit + 1]
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return shown if limit is None or len(shown) <= limit else shown[:limit] + "..."


def size(nbytes: float) -> str:
    """Bytes for people, in powers of 1000: 12 B, 1.5 MB, 167.6 GB."""
    count = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.95:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def memory_size(nbytes: float) -> str:
    """Bytes in powers of 1024, as `--memory` takes them: 900.0 KiB, 1.5 GiB."""
    count = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1023.95:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def counted(number: int, one: str, many: str = "") -> str:
    """A count and its noun: 1 finding, 2 findings; `many` where an s does not make the plural."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def duration(seconds: float) -> str:
    """A time for people: 0.4 s, 12 s, 3 min 05 s, 2 h 07 min, 3 days 4 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} days {whole % 86400 // 3600} h"


def first(names: Sequence[str]) -> str:
    """The first few of some names."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
