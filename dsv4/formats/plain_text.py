"""Text for people: that of strangers made safe to show on a terminal or in a page, and sizes."""

from __future__ import annotations


def size_text(count: float) -> str:
    """Bytes for people: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def printable(text: str, limit: int | None = None) -> str:
    """`text` on one line: control and formatting characters are written as escapes.

    With `limit`, what is longer than that many characters ends in an ellipsis.
    """
    text = text if limit is None else text[: limit + 1]
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return shown if limit is None or len(shown) <= limit else shown[:limit] + "..."
