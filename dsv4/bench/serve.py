"""`dsv4 bench serve`: a store's engine under the load of several clients, each with its next job.

Every client asks, reads its answer to the end, and asks again. Prompts are random ids, all of them
different, so that nothing is remembered while the clock runs. What is right: ALONE answers of a
line are the same, token by token, when they are asked again alone, with their prompts remembered;
and so is one that is asked twice in a row. A token of a client that answers among others is set
beside a step of as many rows that nobody listens to (`bare_step`): what the scheduler costs.
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
from dsv4.serve.backend import Backend, Draw
from dsv4.serve.jobs import Engine, Event, Job
from dsv4.serve.order import groups

ALONE = 4  # answers that are asked again alone
ANSWER_TIMEOUT = 600.0
WARM_STEPS, BARE_STEPS = 4, 64
FOLLOWING = 16  # tokens of a turn after an answer


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
    and between tokens. right: whether ALONE of the answers are those that are given alone. bare:
    seconds of the same steps without a server (`bare_step`), if they were measured.
    """

    clients: int
    prompt_tokens: int
    answer_tokens: int
    answers: int
    seconds: float
    first: tuple[float, float]
    gap: tuple[float, float]
    right: bool
    bare: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of all answers together."""
        return self.answers * self.answer_tokens / self.seconds


@dataclasses.dataclass(frozen=True)
class Again:
    """A prompt asked twice, and then gone on from: seconds to each first token.

    cached: tokens remembered the second time; live: of the turn after its answer, FOLLOWING tokens
    longer than both, which is `turn`.
    """

    prompt_tokens: int
    cold: float
    warm: float
    cached: int
    right: bool
    turn: float
    live: int


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
    first = next(prompts)  # programs are put together, those of a short turn too
    ask([*first, *ask(first).ids, *next(prompts)[:FOLLOWING]])
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
    turn = ask([*prompt, *warm.ids, *next(prompts)[:FOLLOWING]])
    same = cold.ids == warm.ids
    again = Again(prompt_tokens, cold.first, warm.first, warm.cached, same, turn.first, turn.cached)
    return lines, again


def room_for(prompt_tokens: int, answer_tokens: int) -> int:
    """Tokens of a slot that `measure` needs."""
    return prompt_tokens + 2 * answer_tokens + FOLLOWING


def with_bare_steps(lines: Sequence[Line], backend: Backend) -> list[Line]:
    """The lines beside the steps of `backend`, whose engine is closed."""
    found = []
    for line in lines:
        rows = min(line.clients, backend.slots)
        parts = groups(rows, backend.most_rows)
        bare = sum(bare_step(backend, part.stop - part.start, line.prompt_tokens) for part in parts)
        found.append(dataclasses.replace(line, bare=bare))
    return found


def bare_step(
    backend: Backend, rows: int, prompt_tokens: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of a step of `rows` sequences with its draw, one after another, no token read.

    They have `prompt_tokens` tokens each. Nobody else may use the backend.
    """
    prompts, slots = _prompts(backend.vocab, prompt_tokens), list(range(rows))
    draws = [Draw(Sampler()) for _ in slots]
    for slot in slots:
        ids = next(prompts)
        backend.reset(slot)
        for start in range(0, len(ids), backend.chunk):
            backend.read(slot, ids[start : start + backend.chunk])
        backend.begin(slot, draws[slot].sampler)
        backend.draw(draws[slot : slot + 1])
    room = backend.capacity - prompt_tokens
    warm = min(WARM_STEPS, room - 1)
    steps = min(BARE_STEPS, room - warm)
    begin = clock()
    for step in range(warm + steps):
        if step == warm:
            backend.synchronize()
            begin = clock()
        backend.forward(slots)
        backend.draw(draws)
    backend.synchronize()
    return (clock() - begin) / steps


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
