"""Stop strings, judged by str.find on the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4.formats.errors import RuntimeRefusal
from dsv4.runtime.text.pieces import StopStrings

LETTERS = st.text("ab", max_size=12)


@given(st.lists(LETTERS), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_text_ends_where_the_first_stop_string_begins(pieces: list[str], stop: list[str]) -> None:
    stops = StopStrings(stop)
    out = [stops.push(piece) for piece in pieces]
    said = "".join(out)
    # An answer ends with the piece that completes the first stop string.
    texts = ("".join(pieces[: count + 1]) for count in range(len(pieces)))
    cut = (text for text in texts if any(string in text for string in stop))
    whole = next(cut, "".join(pieces))
    ends = [at for string in stop if (at := whole.find(string)) >= 0]
    assert stops.found == bool(ends)
    held = whole[len(said) : min(ends, default=len(whole))]
    if not ends:
        # Nothing is held back longer than it may still begin a stop string.
        assert held == "" or any(string.startswith(held) for string in stop)
    assert said + stops.flush() == whole[: min(ends, default=len(whole))]


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RuntimeRefusal, match="a stop string is empty"):
        StopStrings(["a", ""])
