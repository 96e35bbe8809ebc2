"""Who reads next, how much, and how long others wait meanwhile: decisions without any state of a
model, so that they can be held to their promises one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol, TypeVar

SHORT = 2048  # tokens left to read: such a prompt may overtake longer ones
MOST_OVERTAKEN = 8  # times that a long prompt lets others pass before each of its own chunks

_HARDLY_LONGER = 1.6  # times the smallest chunk's time
_SAFETY = 0.9  # of the time that a chunk may take: the next one sees more tokens than the last


class Prompt(Protocol):
    """left: tokens still to be read. overtaken: since its last chunk. turn: of its last chunk, 0
    before the first one.
    """

    overtaken: int
    turn: int

    @property
    def left(self) -> int:
        """Tokens still to be read."""


AnyPrompt = TypeVar("AnyPrompt", bound=Prompt)


def next_prompt(prompts: Sequence[AnyPrompt]) -> AnyPrompt:
    """Which of `prompts`, in order of arrival, at least one, reads its next chunk.

    A short one first, but no prompt is passed more than MOST_OVERTAKEN times in a row; long ones
    alternate. Counts who was overtaken.
    """
    chosen = _chosen(prompts)
    for one in prompts:
        if one is chosen:
            break
        one.overtaken += 1
    chosen.overtaken = 0
    return chosen


def _chosen(prompts: Sequence[AnyPrompt]) -> AnyPrompt:
    for one in prompts:
        if one.overtaken >= MOST_OVERTAKEN:
            return one
    for one in prompts:
        if one.left <= SHORT:
            return one
    return min(prompts, key=lambda one: one.turn)


def chunk_end(position: int, end: int, most: int, block: int, least: int) -> int:
    """Where the next chunk of a prompt ends that is read up to `position` and is `end` long.

    At most `most` tokens, and neither they nor what is left are fewer than `least`, if that can
    be: then all cuts give the same bytes. At a multiple of `block` where possible.
    """
    if end - position <= most:
        return end
    last = min(position + most, end - least)  # what is left is enough
    aligned = last // block * block
    return aligned if aligned - position >= least else max(last, position + 1)


class Pace:
    """How many tokens a chunk may have so that it takes no longer than it may.

    most: tokens of a chunk where nobody waits. Sizes are halves of it, down to `least`. A size is
    believed to take what it took last; twice a size that was tried takes half as much again, since
    all experts are read for any number of tokens. Larger ones are not tried before it.
    """

    def __init__(self, most: int, least: int) -> None:
        self._sizes = [most]
        while self._sizes[-1] // 2 >= least:
            self._sizes.append(self._sizes[-1] // 2)
        self._sizes.reverse()
        self._seconds: dict[int, float] = {}

    def took(self, tokens: int, seconds: float) -> None:
        """A chunk of `tokens` took so long."""
        size = next((size for size in self._sizes if tokens <= size), self._sizes[-1])
        if 2 * tokens > size:
            self._seconds[size] = seconds

    def tokens(self, seconds: float) -> int:
        """The largest size that takes at most `seconds`, or hardly longer than the smallest does.

        Where the smallest takes more than that, smaller chunks shorten no pause: a chunk that
        brings experts from host memory takes as long for 64 tokens as for 2,048.
        """
        least = self._seconds.get(self._sizes[0], 0.0)
        allowed = max(_SAFETY * seconds, _HARDLY_LONGER * least)
        fitting = [size for size in self._sizes if self._expected(size) <= allowed]
        return max(fitting, default=self._sizes[0])

    @property
    def most(self) -> int:
        """The largest size."""
        return self._sizes[-1]

    def _expected(self, size: int) -> float:
        if size in self._seconds:
            return self._seconds[size]
        return 1.5 * self._seconds.get(size // 2, float("inf"))


def groups(count: int, most: int) -> list[slice]:
    """`count` rows in as few steps of up to `most` as do, of about the same size."""
    steps = -(-count // most)
    edges = [count * step // steps for step in range(steps + 1)] if steps else [0]
    return [slice(first, last) for first, last in itertools.pairwise(edges)]
