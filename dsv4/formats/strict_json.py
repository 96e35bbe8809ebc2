"""JSON written by strangers: one meaning or none.

Python's parser takes NaN, integers of any length, and the last of two equal keys. Documents of a
checkpoint are held to what every other reader would understand the same way.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NoReturn

MAX_INTEGER_DIGITS = 20  # of an unsigned 64-bit number
MAX_KEY_SHOWN = 256


class DuplicateKeyError(ValueError):
    """A key stands twice in one object; the message is the key, quoted."""


def parse_strict(raw: bytes) -> Any:
    """The value of a UTF-8 JSON document.

    Raises ValueError when it is no JSON, nests too deeply, or holds NaN, an infinity or an integer
    beyond 64 bits; DuplicateKeyError when an object has a key twice.
    """
    try:
        return json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_parse_integer,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise ValueError("it nests too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise DuplicateKeyError(repr(twice[:MAX_KEY_SHOWN]))
    return found


def _parse_integer(text: str) -> int:
    # Bounded before conversion: Python's integers are not, and conversion is quadratic.
    if len(text) > MAX_INTEGER_DIGITS or text == "-0":
        raise ValueError(f"number {text[:MAX_INTEGER_DIGITS]!r} is no 64-bit integer")
    return int(text)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON value")
