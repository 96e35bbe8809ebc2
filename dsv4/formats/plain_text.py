"""Text for people: of strangers, made safe to show on a terminal or in a page; counts and lists."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 3  # of many names, those that a sentence lists


def printable(text: str, limit: int | None = None) -> str:
    """`text` on one line: control and formatting characters are written as escapes.

    With `limit`, what is longer than that many characters ends in an ellipsis.
    """
    text = text if limit is None else text[: limit + 1]
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return shown if limit is None or len(shown) <= limit else shown[:limit] + "..."


def first(names: Sequence[str]) -> str:
    """The first few of some names."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def counted(number: int, one: str, many: str | None = None) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{number} {one if number == 1 else many or one + 's'}"
