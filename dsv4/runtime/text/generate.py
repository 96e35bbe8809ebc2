"""The decode loop: feed a prompt once, then one token at a time, until told to stop.

What the session holds afterwards, however the loop ends: the prompt, and every yielded token
except possibly the last one. A token is fed only when the one after it is wanted, so

- ended by a stop id: all yielded tokens were fed, the stop id was not;
- ended by `max_new_tokens`, or by closing the iterator: all but the last yielded token.

`session.position` tells which, so `(prompt + yielded)[: position - start]` are the ids that
were consumed, and a next turn feeds what follows them. Only an exception raised *inside*
`session.forward` leaves a session that must not be used again.

With a `Drafter`, a step runs the last token and, behind it, drafts of those that follow, and its
rows are kept. The token after the first row is drawn as always; if it is the first draft, the row
behind that one is what plain decoding would have computed next, and so on: each token is drawn with
the number, and after the tokens, that it has without drafts. The first that differs from its draft
ends the round: what was run behind it is forgotten (`rewind`), and the next step begins there.
Meanwhile, between two tokens, the session may hold more than was consumed.

So the text is the plain one wherever a row's bytes do not depend on the rows of its step. On the
GPU they do not (`GpuSession`). On the CPU sums are wide (`kernels.reference.accumulate`): of 16,800
rows of small models in steps of 2 to 8 none differed from the same row alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Collection, Generator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.runtime.text.drafting import Drafter, Drafts
from dsv4.runtime.text.sampling import INVALID_TOKEN, Sampler


class TokenSession(Protocol):
    """One sequence's timeline, as far as the decode loop needs it."""

    @property
    def position(self) -> int:
        """Tokens consumed so far."""

    @property
    def max_seq_len(self) -> int:
        """Tokens the caches can hold."""

    def forward(self, ids: Tensor, logits: Literal["all", "last"] = "all") -> Tensor:
        """Append int64 `ids` [T]; return float32 logits [T, vocab], or [1, vocab] for "last"."""

    def rewind(self, position: int) -> None:
        """Forget all tokens from `position` on. Called where tokens are drafted."""


@runtime_checkable
class DrawingSession(Protocol):
    """A session that draws where its logits are, as part of the step."""

    def append_and_draw(self, ids: Tensor, sampler: Sampler) -> Tensor:
        """Append `ids` [T]; return the id that follows, [1], which may be given back as it is.

        INVALID_TOKEN for logits that are not finite.
        """

    def append_and_draw_each(self, ids: Tensor, sampler: Sampler) -> Tensor:
        """Append `ids` [T], at most a step; return the id that follows each of them, [T].

        They are the sampler's next T draws, which it has not counted.
        """


@dataclasses.dataclass
class Timings:
    """What a generation cost, in tokens and seconds; filled in while it runs.

    `prompt_seconds` and `first_token_seconds` cover the forward pass over the prompt and the first
    draw, which a GPU does in one go. `decode_seconds` covers the `decode_steps` forward passes
    after it and the `decode_tokens` drawn from them, a last one that was a stop id included; the
    consumer's own time is in none. `drafts`: what came of drafting, where it was asked for.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prompt_seconds: float = 0.0
    first_token_seconds: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    drafts: Drafts | None = None

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt tokens per second, 0 before there were any."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first per second, 0 before there were any."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the two rates included."""
        return dataclasses.asdict(self) | {
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
            "tokens_per_second": self.tokens_per_second,
            "drafts": None if self.drafts is None else self.drafts.to_dict(),
        }


def generate(
    session: TokenSession,
    prompt_ids: Sequence[int] | Tensor,
    max_new_tokens: int,
    sampler: Sampler,
    stop_ids: Collection[int] = (),
    timings: Timings | None = None,
    *,
    history: Sequence[int] = (),
    drafter: Drafter | None = None,
) -> Generator[int, None, None]:
    """Append `prompt_ids` to the session and yield up to `max_new_tokens` ids as they come.

    Ends before yielding an id of `stop_ids`. `timings`, when given, is filled in as it goes.
    history: what the session holds already, for penalties on tokens that were there before, and
    for drafts. drafter: has several tokens run at once; the text stays the same.
    Closing the iterator ends the generation; see the module's text for what is then held.

    Raises RuntimeRefusal at the call, before anything is fed, for an empty prompt,
    `max_new_tokens` below 1, or more tokens than the session has room for; and during the
    iteration when the logits are not finite.
    """
    prompt = [int(token) for token in prompt_ids]
    if not prompt:
        raise RuntimeRefusal("the prompt is empty, expected at least one token")
    if max_new_tokens < 1:
        raise RuntimeRefusal(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    room = session.max_seq_len - session.position
    if len(prompt) + max_new_tokens > room:
        raise RuntimeRefusal(
            f"{len(prompt)} prompt tokens and {max_new_tokens} new ones exceed the {room} that "
            f"the session has left of {session.max_seq_len}; ask for fewer, or open the session "
            "with a larger max_seq_len"
        )
    before = [*history, *prompt]
    sampler.begin(before)
    ends, told = frozenset(stop_ids), timings or Timings()
    lookahead = Lookahead(session, sampler, drafter, before, ends, told)
    return _decode(lookahead, prompt, max_new_tokens, sampler, ends, told)


def _decode(
    lookahead: Lookahead,
    prompt: list[int],
    max_new_tokens: int,
    sampler: Sampler,
    stop_ids: frozenset[int],
    timings: Timings,
) -> Generator[int, None, None]:
    timings.prompt_tokens = len(prompt)
    try:
        token = lookahead.read(prompt)
        while token not in stop_ids:
            timings.generated_tokens += 1
            sampler.took(token)
            yield token
            if timings.generated_tokens == max_new_tokens:
                return
            token = lookahead.next(token, max_new_tokens - timings.generated_tokens)
    finally:
        lookahead.settle()


class Lookahead:
    """Draws the tokens of one answer, though a step may have run several of them.

    before: all ids before the answer. stop_ids: what no draft reaches. timings: filled in.
    """

    def __init__(
        self,
        session: TokenSession,
        sampler: Sampler,
        drafter: Drafter | None,
        before: list[int],
        stop_ids: frozenset[int],
        timings: Timings,
    ) -> None:
        self._session, self._sampler, self._drafter = session, sampler, drafter
        self._ids, self._stop_ids, self._timings = before, stop_ids, timings
        self._drawing: DrawingSession | None = None
        if isinstance(session, DrawingSession):
            self._drawing = session
        self._drawn: Tensor | None = None  # the last token, where it may be fed as it is
        self._drafts: deque[int] = deque()  # that were run, and may still turn out right
        self._rows: deque[int | Tensor] = deque()  # what was drawn of each, or its logits [1, V]
        self._proposed = self._accepted = 0
        self._seconds = 0.0  # of this round
        self._stepped = False  # whether there is one
        self._consumed = 0
        self._running = False

    def read(self, prompt: list[int]) -> int:
        """Append the prompt; -> the first token. Raises RuntimeRefusal as `next`."""
        if self._drafter is not None:
            self._drafter.begin()
            self._timings.drafts = self._drafter.drafts
        begin = time.perf_counter()
        token = self._append(torch.tensor(prompt, dtype=torch.int64))
        self._consumed = self._session.position
        seconds = time.perf_counter() - begin
        self._timings.prompt_seconds = self._timings.first_token_seconds = seconds
        return _valid(token)

    def next(self, token: int, wanted: int) -> int:
        """The id after `token`, the last one that was drawn. wanted: how many are, with this one.

        Raises RuntimeRefusal for logits that are not finite.
        """
        begin = time.perf_counter()
        if self._drafter is not None:
            self._ids.append(token)
        if self._drafts and self._drafts[0] == token:
            self._drafts.popleft()
            self._accepted += 1
            self._consumed += 1
            following = self._draw()
        else:
            self._end_round()
            following = self._step(token, wanted)
            self._timings.decode_steps += 1
        seconds = time.perf_counter() - begin
        self._seconds += seconds
        self._timings.decode_seconds += seconds
        self._timings.decode_tokens += 1
        return _valid(following)

    def settle(self) -> None:
        """No more is wanted: forget what was run beyond, unless a step was cut short."""
        if not self._running:
            self._end_round()

    def _step(self, token: int, wanted: int) -> int:
        """Run `token` and drafts; -> what follows it."""
        drafts: list[int] = []
        if self._drafter is not None:
            proposed = self._drafter.propose(self._ids, wanted - 1)
            drafts = list(itertools.takewhile(lambda one: one not in self._stop_ids, proposed))
        self._proposed, self._stepped = len(drafts), True
        if drafts:
            following = self._run(torch.tensor([token, *drafts], dtype=torch.int64))
            self._drafts.extend(drafts)
        elif self._drawn is not None:
            following = self._append(self._drawn)
        else:
            following = self._append(torch.tensor([token], dtype=torch.int64))
        self._consumed += 1
        return following

    def _append(self, ids: Tensor) -> int:
        """Run `ids`; -> what follows the last of them."""
        self._running = True
        if self._drawing is not None:
            self._drawn = self._drawing.append_and_draw(ids, self._sampler)
        else:
            self._drawn = self._sampler(self._session.forward(ids, logits="last")[-1:])
        token = int(self._drawn)
        self._running = False
        return token

    def _run(self, ids: Tensor) -> int:
        """Run `ids` in one step and keep its rows; -> what follows the first of them."""
        self._running, self._drawn = True, None
        if self._drawing is not None and self._sampler.host_reason() is None:
            self._rows.extend(self._drawing.append_and_draw_each(ids, self._sampler).tolist())
        else:
            self._rows.extend(torch.split(self._session.forward(ids).cpu(), 1))
        self._running = False
        return self._draw()

    def _draw(self) -> int:
        """What follows the next row."""
        row = self._rows.popleft()
        if isinstance(row, Tensor):
            return int(self._sampler(row))
        self._sampler.drawn += 1
        return row

    def _end_round(self) -> None:
        """Forget what was run and not consumed, and tell the drafter what came of the round."""
        if self._session.position > self._consumed:
            self._session.rewind(self._consumed)
        if self._drafter is not None and self._stepped:
            self._drafter.ran(self._proposed, self._accepted, self._seconds)
        self._drafts.clear()
        self._rows.clear()
        self._proposed = self._accepted = 0
        self._seconds, self._stepped = 0.0, False


def _valid(token: int) -> int:
    if token == INVALID_TOKEN:
        raise RuntimeRefusal(
            "the model's logits hold NaN or infinity, expected finite numbers; "
            "`dsv4 validate` tells whether the packed checkpoint is damaged"
        )
    return token
