"""The simplest engine: one session, one job at a time, in the order in which they came."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from dsv4.formats.errors import Dsv4Error, QueueFull, RuntimeRefusal
from dsv4.runtime.text.sampling import INVALID_TOKEN
from dsv4.serve.jobs import Event, Finish, Job, TokenLogprob


class EngineSession(Protocol):
    """What the engine needs of a session."""

    max_seq_len: int

    def reset(self) -> None:
        """Empty it."""

    def forward(self, ids: Tensor, logits: Literal["all", "last"] = "all") -> Tensor:
        """Append int64 `[T]` -> float32 `[T or 1, vocab]`."""


class _Ticket:
    def __init__(self, job: Job, deliver: Callable[[Event], None]) -> None:
        self.job, self.deliver = job, deliver
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()


class OneAtATime:
    """An `Engine` over one session, on a thread of its own. waiting: most jobs that wait."""

    def __init__(self, session: EngineSession, waiting: int) -> None:
        self._session, self._waiting = session, waiting
        self._queue: queue.SimpleQueue[_Ticket | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: set[_Ticket] = set()
        self._closed = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def max_seq_len(self) -> int:
        """As in `Engine`."""
        return self._session.max_seq_len

    @property
    def failure(self) -> str | None:
        """As in `Engine`."""
        return self._failure

    def submit(self, job: Job, deliver: Callable[[Event], None]) -> _Ticket:
        """As in `Engine`."""
        if not job.ids or len(job.ids) + job.max_new_tokens > self.max_seq_len:
            raise RuntimeRefusal(
                f"the prompt has {len(job.ids)} tokens and the answer up to {job.max_new_tokens}, "
                f"expected from 1 up and {self.max_seq_len} together at most"
            )
        ticket = _Ticket(job, deliver)
        with self._lock:
            if self._closed:
                raise QueueFull("the engine is ending and takes no more jobs")
            if len(self._open) > self._waiting:
                raise QueueFull(f"{self._waiting} requests wait already; try again later")
            self._open.add(ticket)
        self._queue.put(ticket)
        return ticket

    def close(self, *, finish: bool) -> None:
        """As in `Engine`."""
        with self._lock:
            self._closed = True
            if not finish:
                for ticket in self._open:
                    ticket.cancel()
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (ticket := self._queue.get()) is not None:
            try:
                for event in self._events(ticket):
                    if event.finish is not None:
                        with self._lock:
                            self._open.discard(ticket)
                    ticket.deliver(event)
            except Exception as error:
                own = isinstance(error, Dsv4Error)
                sentence = str(error) if own else f"{type(error).__name__} while computing"
                with self._lock:
                    self._open.discard(ticket)
                ticket.deliver(Event(finish=Finish.FAILED, error=sentence))

    def _events(self, ticket: _Ticket) -> Iterator[Event]:
        job, constraint = ticket.job, ticket.job.constraint
        if ticket.cancelled.is_set():
            yield Event(finish=Finish.CANCELLED)
            return
        self._session.reset()
        ids = torch.tensor(job.ids, dtype=torch.int64)
        logits = self._session.forward(ids, "all" if job.prompt_logprobs else "last")
        prompt: tuple[TokenLogprob, ...] = ()
        if job.prompt_logprobs:
            prompt = logprobs_of(logits[:-1], job.ids[1:], job.logprobs or 0)
        yield Event(cached_tokens=0, prompt_logprobs=prompt)
        job.sampler.begin(job.ids)
        for count in range(1, job.max_new_tokens + 1):
            mask = None if constraint is None else constraint.mask()
            row = logits[-1:]
            allowed = row if mask is None else row.masked_fill(~mask.to(row.device), -torch.inf)
            token = int(job.sampler(allowed))
            if token == INVALID_TOKEN:
                raise RuntimeRefusal("the model's logits hold NaN or infinity")
            if token in job.stop_ids:
                yield Event(finish=Finish.STOP)
                return
            job.sampler.took(token)
            if constraint is not None:
                constraint.took(token)
            told = () if job.logprobs is None else logprobs_of(row, [token], job.logprobs)
            ended = constraint is not None and constraint.ended
            last = Finish.STOP if ended else Finish.LENGTH if count == job.max_new_tokens else None
            last = Finish.CANCELLED if last is None and ticket.cancelled.is_set() else last
            yield Event((token,), told, finish=last)
            if last is not None:
                return
            logits = self._session.forward(torch.tensor([token]), "last")


def logprobs_of(logits: Tensor, tokens: Sequence[int], top: int) -> tuple[TokenLogprob, ...]:
    """Of `tokens[i]` by row `i` of float `[T, vocab]`, with the `top` likeliest ids there."""
    values = logits.double().log_softmax(-1).float()
    likeliest = values.topk(min(top, values.shape[-1]), dim=-1) if top else None
    return tuple(
        TokenLogprob(
            token,
            float(values[row, token]),
            ()
            if likeliest is None
            else tuple(
                zip(likeliest.indices[row].tolist(), likeliest.values[row].tolist(), strict=True)
            ),
        )
        for row, token in enumerate(tokens)
    )
