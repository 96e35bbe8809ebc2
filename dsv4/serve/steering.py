"""What the next token may be, by where an answer is: reasoning, free text, a grammar.

A grammar begins after the reasoning. A tool call that begins in free text is held to the tools'
grammar from its mark on, so that no call can be drawn whose arguments are not JSON, and the answer
ends where its block does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from dsv4.runtime.text.tokenizer import Text
from dsv4.serve.grammars import Grammar, Matcher
from dsv4.serve.jobs import Constraint
from dsv4.serve.knobs import Knobs


@dataclasses.dataclass(frozen=True)
class Course:
    """Where an answer may go. thinking: it begins inside the reasoning, which `think_end` ends.

    body: the grammar of the answer, None for free text. calls: the grammar of tool calls that begin
    in free text, after their mark `dsml`. budget: most tokens of the reasoning.
    """

    vocab: int
    thinking: bool
    think_end: int | None = None
    body: Grammar | None = None
    calls: Grammar | None = None
    dsml: int | None = None
    budget: int | None = None

    @property
    def free(self) -> bool:
        """Whether it forbids nothing."""
        return self.body is None and self.calls is None and self.budget is None

    def steer(self, text: Text) -> Steering:
        """A `Constraint` for one answer."""
        return Steering(self, lambda token: text.decode([token], show_special=True).endswith("<"))


class Steering:
    """A `Constraint`: one answer on its course. opens: whether a token's text ends with `<`."""

    def __init__(self, course: Course, opens: Callable[[int], bool]) -> None:
        self._course, self._opens = course, opens
        self._thinking, self._thought = course.thinking, 0
        self._last: int | None = None
        self._matcher: Matcher | None = None
        if not course.thinking:
            self._begin_body()

    def mask(self) -> Tensor | None:
        """bool `[vocab]`, or None."""
        course = self._course
        if self._thinking:
            if course.budget is not None and self._thought >= course.budget:
                only = torch.zeros(course.vocab, dtype=torch.bool)
                only[course.think_end] = True
                return only
            return None
        return None if self._matcher is None else self._matcher.mask()

    def took(self, token: int) -> None:
        """One more token of the answer."""
        course, last, self._last = self._course, self._last, token
        if self._matcher is not None:
            self._matcher.took(token)
        elif course.calls is not None and token == course.dsml and self._is_open(last):
            # A call inside the reasoning ends it: models leave `</think>` out.
            self._thinking, self._matcher = False, course.calls.matcher()
        elif self._thinking and token == course.think_end:
            self._thinking = False
            self._begin_body()
        elif self._thinking:
            self._thought += 1

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher is not None and self._matcher.ended

    def _is_open(self, last: int | None) -> bool:
        return last is not None and self._opens(last)

    def _begin_body(self) -> None:
        if self._course.body is not None:
            self._matcher = self._course.body.matcher()


class Without:
    """A `Constraint`: some ids never, others not before so many tokens, and what `inner` says."""

    def __init__(
        self,
        vocab: int,
        *,
        never: Collection[int] = (),
        late: Collection[int] = (),
        least: int = 0,
        inner: Constraint | None = None,
    ) -> None:
        self._never, self._both = _allowed(vocab, never), _allowed(vocab, [*never, *late])
        self._least, self._taken, self._inner = least, 0, inner

    def mask(self) -> Tensor | None:
        """bool `[vocab]`. What `inner` leaves comes first: it is never emptied."""
        own = self._both if self._taken < self._least else self._never
        inner = None if self._inner is None else self._inner.mask()
        if inner is None:
            return own
        both = inner & own
        return both if bool(both.any()) else inner

    def took(self, token: int) -> None:
        """One more token."""
        self._taken += 1
        if self._inner is not None:
            self._inner.took(token)

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return self._inner is not None and self._inner.ended


def constraint_of(
    course: Course, knobs: Knobs, text: Text, stop_ids: Collection[int]
) -> Constraint | None:
    """For one answer; None where every token may always come."""
    steering = None if course.free else course.steer(text)
    if not knobs.banned and not knobs.min_tokens:
        return steering
    return Without(
        course.vocab, never=knobs.banned, late=stop_ids, least=knobs.min_tokens, inner=steering
    )


def _allowed(vocab: int, without: Collection[int]) -> Tensor:
    mask = torch.ones(vocab, dtype=torch.bool)
    mask[[token for token in without if token < vocab]] = False
    return mask
