"""Jobs in an engine, and what is told of them."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

from dsv4.runtime.text.sampling import Sampler
from dsv4.serve.jobs import Engine, Event, Finish, Job, Ticket, TokenLogprob


@dataclasses.dataclass(eq=False)
class Heard:
    """Everything that a job was told."""

    ticket: Ticket | None = None
    events: list[Event] = dataclasses.field(default_factory=list)
    done: threading.Event = dataclasses.field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        assert not self.done.is_set(), "an event after the last one"
        self.events.append(event)
        if event.finish is not None:
            self.done.set()

    def wait(self) -> Heard:
        """Until it has ended."""
        assert self.done.wait(60), "the job does not end"
        return self

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events for token in event.tokens]

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [one for event in self.events for one in event.logprobs]

    @property
    def finish(self) -> Finish | None:
        return self.events[-1].finish

    @property
    def cached(self) -> int:
        (first, *others) = [event.cached_tokens for event in self.events]
        assert first is not None and not [one for one in others if one is not None]
        return first


def job(ids: Sequence[int], count: int = 8, sampler: Sampler | None = None, **more: Any) -> Job:
    return Job(ids, sampler or Sampler(), count, **more)


def ask(engine: Engine, one: Job) -> Heard:
    heard = Heard()
    heard.ticket = engine.submit(one, heard)
    return heard
