"""Text of strangers, made safe to show: on a terminal, in a page."""

from __future__ import annotations


def printable(text: str, limit: int | None = None) -> str:
    """`text` on one line: control and formatting characters are written as escapes.

    With `limit`, what is longer than that many characters ends in an ellipsis.
    """
    text = text if limit is None else text[: limit + 1]
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return shown if limit is None or len(shown) <= limit else shown[:limit] + "..."
