"""What an engine is asked for and what it tells: the seam between HTTP and the scheduler.

The faces (OpenAI, Anthropic) make a `Job` of a request and read its `Event`s; an `Engine` runs it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from dsv4.runtime.text.drafting import MOST_DRAFTS
from dsv4.runtime.text.sampling import Sampler


class Finish(enum.Enum):
    """Why a job ended."""

    STOP = "stop"  # a stop id was drawn, or its constraint has nothing left to say
    LENGTH = "length"  # max_new_tokens, or no room in the slot
    CANCELLED = "cancelled"  # `Ticket.cancel`
    FAILED = "failed"  # `Event.error` says what happened


@dataclasses.dataclass(frozen=True)
class Stats:
    """Now: slots in all; running: jobs that have a slot, of which `reading` read their prompt;
    waiting: jobs without one; kept: slots that hold an ended sequence; remembered_bytes: host
    memory that beginnings of sequences take, in `remembered_blocks`.

    Since the start: tokens of prompts, of which cached_tokens were not computed; tokens that were
    told; jobs by how they ended; steps, and their rows; seconds that jobs waited for their first
    chunk, from there to their first token, and from there to their end, summed over jobs; drafts:
    how often a sequence had some in a step, how many, and how many of these were right, in all and
    by their place.
    """

    slots: int = 0
    running: int = 0
    reading: int = 0
    waiting: int = 0
    kept: int = 0
    remembered_blocks: int = 0
    remembered_bytes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[Finish, int] = dataclasses.field(default_factory=dict)
    steps: int = 0
    rows: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    drafted: int = 0
    draft_tokens: int = 0
    right_drafts: int = 0
    right_at: tuple[int, ...] = (0,) * MOST_DRAFTS


class Constraint(Protocol):
    """Which tokens may come next, by what came before: a grammar, for example."""

    def mask(self) -> Tensor | None:
        """bool `[vocab]`, True for ids that may come next; None while every id may."""

    def took(self, token: int) -> None:
        """`token` was drawn."""

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One sequence to continue.

    ids: the prompt, at least one. max_new_tokens: most tokens of the answer. stop_ids: ids that end
    it, and are not told. logprobs: how many of the likeliest ids are told for every token, with the
    token's own; None for none at all. prompt_logprobs: the same for the tokens of the prompt.
    salt: jobs of different salts share no prefix.
    """

    ids: Sequence[int]
    sampler: Sampler
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    constraint: Constraint | None = None
    salt: bytes = b""


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithm of a token's probability by the raw logits, and the likeliest ids there."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Event:
    """What happened to a job since its last event. All fields of tokens are in order.

    cached_tokens: with the first event, tokens of the prompt that were not computed again; else
    None. prompt_logprobs: with the first event, one for each token of the prompt but the first.
    finish: with the last event. error: a sentence for whoever asked, with Finish.FAILED.
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int | None = None
    finish: Finish | None = None
    error: str | None = None


Deliver = Callable[[Event], None]


class Ticket(Protocol):
    """A job that was taken."""

    def cancel(self) -> None:
        """End it within one step; its last event says Finish.CANCELLED. May be called any time."""


class Engine(Protocol):
    """Runs jobs. Methods may be called from any thread."""

    @property
    def max_seq_len(self) -> int:
        """Most tokens of a sequence, prompt and answer together."""

    @property
    def failure(self) -> str | None:
        """Why it runs nothing any more, as a sentence; None while it works."""

    @property
    def most_jobs(self) -> int:
        """Jobs that it holds at once, those that wait included."""

    def stats(self) -> Stats:
        """What it has done and does, now."""

    def submit(self, job: Job, deliver: Deliver) -> Ticket:
        """Take a job. `deliver` is called on the engine's thread and must return at once.

        Raises RuntimeRefusal for a job that can never run (ids, room), and QueueFull when too many
        wait.
        """

    def submit_all(self, jobs: Sequence[tuple[Job, Deliver]]) -> Sequence[Ticket]:
        """Take all of them, or raise what `submit` does and take none."""

    def close(self, *, finish: bool) -> None:
        """Take no more jobs. finish: run those that were taken to their end, or cancel them."""
