"""The decode loop: feed a prompt once, then one token at a time, until told to stop.

What the session holds afterwards, however the loop ends: the prompt, and every yielded token
except possibly the last one. A token is fed only when the one after it is wanted, so

- ended by a stop id: all yielded tokens were fed, the stop id was not;
- ended by `max_new_tokens`, or by closing the iterator: all but the last yielded token.

`session.position` tells which, so `(prompt + yielded)[: position - start]` are the ids that
were consumed, and a next turn feeds what follows them. Only an exception raised *inside*
`session.forward` leaves a session that must not be used again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Generator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
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


@runtime_checkable
class DrawingSession(Protocol):
    """A session that draws where its logits are, as part of the step."""

    def append_and_draw(self, ids: Tensor, sampler: Sampler) -> Tensor:
        """Append `ids` [T]; return the id that follows, [1], which may be given back as it is.

        INVALID_TOKEN for logits that are not finite.
        """


@dataclasses.dataclass
class Timings:
    """What a generation cost, in tokens and seconds; filled in while it runs.

    `prompt_seconds` and `first_token_seconds` cover the forward pass over the prompt and the first
    draw, which a GPU does in one go. `decode_seconds` covers the `decode_steps` forward passes of
    one token after it, a last one that drew a stop id included; the consumer's own time is in none.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prompt_seconds: float = 0.0
    first_token_seconds: float = 0.0
    decode_steps: int = 0
    decode_seconds: float = 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt tokens per second, 0 before there were any."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decode steps per second, 0 before there were any."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, the two rates included."""
        return dataclasses.asdict(self) | {
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
            "tokens_per_second": self.tokens_per_second,
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
) -> Generator[int, None, None]:
    """Append `prompt_ids` to the session and yield up to `max_new_tokens` ids as they come.

    Ends before yielding an id of `stop_ids`. `timings`, when given, is filled in as it goes.
    history: what the session holds already, for penalties on tokens that were there before.
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
    sampler.begin([*history, *prompt])
    return _decode(
        session, prompt, max_new_tokens, sampler, frozenset(stop_ids), timings or Timings()
    )


def _decode(
    session: TokenSession,
    prompt: list[int],
    max_new_tokens: int,
    sampler: Sampler,
    stop_ids: frozenset[int],
    timings: Timings,
) -> Generator[int, None, None]:
    timings.prompt_tokens = len(prompt)
    begin = time.perf_counter()
    drawn, token = _draw(session, torch.tensor(prompt, dtype=torch.int64), sampler)
    timings.prompt_seconds = timings.first_token_seconds = time.perf_counter() - begin
    while token not in stop_ids:
        timings.generated_tokens += 1
        sampler.took(token)
        yield token
        if timings.generated_tokens == max_new_tokens:
            return
        begin = time.perf_counter()
        drawn, token = _draw(session, drawn, sampler)
        timings.decode_seconds += time.perf_counter() - begin
        timings.decode_steps += 1


def _draw(session: TokenSession, ids: Tensor, sampler: Sampler) -> tuple[Tensor, int]:
    """Feed `ids`; -> (the next id where the logits are, ready to be fed; the same as a number)."""
    if isinstance(session, DrawingSession):
        drawn = session.append_and_draw(ids, sampler)
    else:
        drawn = sampler(session.forward(ids, logits="last")[-1:])
    token = int(drawn)
    if token == INVALID_TOKEN:
        raise RuntimeRefusal(
            "the model's logits hold NaN or infinity, expected finite numbers; "
            "`dsv4 validate` tells whether the packed checkpoint is damaged"
        )
    return drawn, token
