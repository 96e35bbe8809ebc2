"""`dsv4 bench serve`: a store's engine under the load of several clients, each with its next job.

Every client asks, reads its answer to the end, and asks again. Prompts are random ids, all of them
different, so that nothing is remembered while the clock runs. What is right: ALONE answers of a
line are the same, token by token, when they are asked again alone, with their prompts remembered;
and so is one that is asked twice in a row.
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from dsv4.runtime.text.sampling import Sampler
from dsv4.serve.jobs import Engine, Event, Job

ALONE = 4  # answers that are asked again alone
ANSWER_TIMEOUT = 600.0


@dataclasses.dataclass(frozen=True)
class Answer:
    """One job: its ids, seconds to the first of them, seconds between events, cached tokens."""

    ids: tuple[int, ...]
    first: float
    gaps: tuple[float, ...]
    cached: int


@dataclasses.dataclass(frozen=True)
class Line:
    """clients: jobs at a time. first, gap: median and 99th of 100 of the seconds to the first token
    and between tokens. right: whether ALONE of the answers are those that are given alone.
    """

    clients: int
    prompt_tokens: int
    answer_tokens: int
    answers: int
    seconds: float
    first: tuple[float, float]
    gap: tuple[float, float]
    right: bool

    @property
    def tokens_per_second(self) -> float:
        """Of all answers together."""
        return self.answers * self.answer_tokens / self.seconds


@dataclasses.dataclass(frozen=True)
class Again:
    """A prompt asked twice: seconds to the first token, and the second time's cached tokens."""

    prompt_tokens: int
    cold: float
    warm: float
    cached: int
    right: bool


def measure(
    engine: Engine,
    vocab: int,
    *,
    clients: Sequence[int],
    prompt_tokens: int,
    answer_tokens: int,
    rounds: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[list[Line], Again]:
    """A line for each number of clients; `rounds` answers each."""
    prompts = _prompts(vocab, prompt_tokens)
    ask = _asker(engine, answer_tokens, clock)
    ask(next(prompts))  # programs are put together
    lines = []
    for count in clients:
        given = [next(prompts) for _ in range(count * rounds)]
        begin = clock()
        answers = _together(ask, given, count)
        seconds = clock() - begin
        few = range(min(ALONE, len(given)))
        right = all(ask(given[one]).ids == answers[one].ids for one in few)
        right = right and all(len(one.ids) == answer_tokens for one in answers)
        firsts = [one.first for one in answers]
        gaps = [gap for one in answers for gap in one.gaps]
        sizes = count, prompt_tokens, answer_tokens, len(answers)
        lines.append(Line(*sizes, seconds, _spread(firsts), _spread(gaps), right))
    prompt = next(prompts)
    cold, warm = ask(prompt), ask(prompt)
    again = Again(prompt_tokens, cold.first, warm.first, warm.cached, cold.ids == warm.ids)
    return lines, again


def _prompts(vocab: int, tokens: int) -> Iterator[list[int]]:
    for seed in itertools.count():
        made = torch.Generator().manual_seed(seed)
        yield torch.randint(vocab, (tokens,), generator=made).tolist()


def _asker(
    engine: Engine, answer_tokens: int, clock: Callable[[], float]
) -> Callable[[list[int]], Answer]:
    def ask(ids: list[int]) -> Answer:
        told: queue.SimpleQueue[tuple[float, Event]] = queue.SimpleQueue()
        begin = clock()
        engine.submit(Job(ids, Sampler(), answer_tokens), lambda e: told.put((clock(), e)))
        said: list[int] = []
        at: list[float] = []
        cached = 0
        while True:
            moment, event = told.get(timeout=ANSWER_TIMEOUT)
            if event.error is not None:
                raise RuntimeError(event.error)
            cached = max(cached, event.cached_tokens or 0)
            if event.tokens:
                said += event.tokens
                at.append(moment)
            if event.finish is not None:
                gaps = tuple(after - before for before, after in itertools.pairwise(at))
                return Answer(tuple(said), at[0] - begin, gaps, cached)

    return ask


def _together(
    ask: Callable[[list[int]], Answer], given: Sequence[list[int]], clients: int
) -> list[Answer]:
    """Answers to all of `given`, so many at a time."""
    answers: dict[int, Answer] = {}
    faults: list[BaseException] = []
    left = iter(range(len(given)))
    lock = threading.Lock()

    def client() -> None:
        try:
            while True:
                with lock:
                    number = next(left, None)
                if number is None or faults:
                    return
                answers[number] = ask(given[number])
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
    return [answers[number] for number in range(len(given))]


def _spread(seconds: Sequence[float]) -> tuple[float, float]:
    """Median, and the 99th of 100."""
    ordered = sorted(seconds)
    if not ordered:
        return 0.0, 0.0
    return statistics.median(ordered), ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
