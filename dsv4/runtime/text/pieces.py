"""Drawn token ids become what a reader sees: pieces of reasoning and of the answer.

Special tokens never come out as text: `</think>` says that the answer begins, others say nothing.
Stop strings end the answer before they begin, however many tokens spell one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Sequence

from deepseek_recipe import SpecialToken

from dsv4.formats.errors import RuntimeRefusal
from dsv4.runtime.text.tokenizer import Text

THINK_END = SpecialToken.ThinkingEnd.default_str()


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of what a model says as it comes: of its reasoning, or of the answer itself."""

    text: str
    reasoning: bool


class StopStrings:
    """Text up to the first of some strings, in pieces; holds back what may begin one of them."""

    def __init__(self, strings: Sequence[str]) -> None:
        """Raises RuntimeRefusal for an empty string, which would stop everything."""
        if "" in strings:
            raise RuntimeRefusal("a stop string is empty, expected at least one character")
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that may come out; nothing more does once a string is `found`."""
        self._held += text
        if self.found or not self._strings:
            return self._take(0 if self.found else len(self._held))
        ends = [at for string in self._strings if (at := self._held.find(string)) >= 0]
        if ends:
            self.found = True
            return self._take(min(ends))
        most = max(map(len, self._strings)) - 1
        begin = max(0, len(self._held) - most)
        while begin < len(self._held) and not self._begins_one(self._held[begin:]):
            begin += 1
        return self._take(begin)

    def flush(self) -> str:
        """What was held back and begins nothing now that no more follows."""
        return self._take(0 if self.found else len(self._held))

    def _begins_one(self, tail: str) -> bool:
        return any(string.startswith(tail) for string in self._strings)

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], "" if self.found else self._held[count:]
        return taken


class Reader:
    """Ids in, parts out, and what of them was said. One answer's.

    drawn: the ids so far. said: whether anything came out. stopped: whether a stop string did.
    """

    def __init__(self, text: Text, *, thinking: bool, stop: Sequence[str] = ()) -> None:
        """thinking: the model begins with its reasoning. Raises RuntimeRefusal for a tokenizer
        without the marks that end it, or an empty stop string.
        """
        self.drawn: list[int] = []
        self._text = text
        self._thinking = thinking  # from here on: does the model still reason?
        self._think_end = text.token_id(THINK_END) if thinking else None
        if thinking and self._think_end is None:
            raise RuntimeRefusal(
                f"the tokenizer has no token {THINK_END}, which ends reasoning; "
                "ask without thinking, or feed token ids"
            )
        self._stops = StopStrings(stop)
        self._said = {True: "", False: ""}
        self._begin = 0  # drawn[_begin:_end] are the ids of the answer as said
        self._end = 0

    @property
    def said(self) -> bool:
        """Whether anything came out yet."""
        return any(self._said.values())

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the answer."""
        return self._stops.found

    @property
    def answer(self) -> str:
        """What came out, reasoning left out."""
        return self._said[False]

    @property
    def reasoning(self) -> str:
        """The reasoning that came out."""
        return self._said[True]

    @property
    def answer_ids(self) -> tuple[int, ...] | None:
        """The ids of `answer`; None while the model still reasons."""
        return None if self._thinking else tuple(self.drawn[self._begin : self._end])

    def read(self, tokens: Generator[int, None, None]) -> Generator[Part, None, None]:
        """Turn tokens into parts until they end, or a stop string comes.

        All that is known of the answer is right at every yield. Closing this closes `tokens`.
        """
        stream = self._text.stream()
        try:
            for token in tokens:
                self.drawn.append(token)
                if self._thinking and token == self._think_end:
                    yield from self._say(stream.flush())
                    self._thinking = False
                    self._begin = self._end = len(self.drawn)
                elif token not in self._text.marks:
                    yield from self._say(stream.push(token))
                if self.stopped:
                    return
            yield from self._say(stream.flush())
            yield from self._say("", last=True)
            self._end = len(self.drawn)  # tokens without text, too
        finally:
            tokens.close()

    def _say(self, text: str, *, last: bool = False) -> Iterator[Part]:
        if not self._thinking:
            text = self._stops.push(text) + (self._stops.flush() if last else "")
        if text:
            self._said[self._thinking] += text
            self._end = len(self.drawn)
            yield Part(text, self._thinking)
