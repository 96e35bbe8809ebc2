"""The load of several clients: what it counts, and that a mixed-up answer is called wrong."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import dsv4
from dsv4.bench.serve import bare_step, measure
from dsv4.cli import cli
from dsv4.serve.engine_choice import Wanted, make_engine
from dsv4.serve.jobs import Engine, Event, Job, Stats, Ticket

PROMPT, ANSWER = 40, 6


@pytest.fixture(scope="module")
def engine(native_store: Path) -> Iterator[Engine]:
    made = make_engine(dsv4.open(native_store), Wanted("cpu", 4, 64, queue=64), lambda phase: None)
    yield made
    made.close(finish=False)


class MixedUp:
    """An engine whose tokens are others while several jobs run."""

    failure = None
    most_jobs = 64

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._running = 0

    @property
    def max_seq_len(self) -> int:
        """The engine's."""
        return self._engine.max_seq_len

    def stats(self) -> Stats:
        """The engine's."""
        return self._engine.stats()

    def submit_all(self, jobs: Sequence[tuple[Job, Callable[[Event], None]]]) -> list[Ticket]:
        """One after another."""
        return [self.submit(*one) for one in jobs]

    def submit(self, job: Job, deliver: Callable[[Event], None]) -> Ticket:
        """The engine's, but for the tokens."""
        with self._lock:
            self._running += 1

        def told(event: Event) -> None:
            with self._lock:
                alone = self._running == 1
                self._running -= event.finish is not None
            wrong = tuple((token + 1) % 64 for token in event.tokens)
            deliver(event if alone else dataclasses.replace(event, tokens=wrong))

        return self._engine.submit(job, told)

    def close(self, *, finish: bool) -> None:
        """The engine is another's."""


def test_every_answer_is_counted_and_compared(engine: Engine) -> None:
    lines, again = measure(engine, 512, clients=(1, 3), prompt_tokens=PROMPT, answer_tokens=ANSWER)
    assert [(line.clients, line.answers, line.right) for line in lines] == [
        (1, 2, True),
        (3, 6, True),
    ]
    for line in lines:
        assert 0 < line.first[0] <= line.first[1] < line.seconds
        assert 0 < line.gap[0] <= line.gap[1] < line.seconds
        assert line.tokens_per_second == line.answers * ANSWER / line.seconds
    assert again.right and 0 < again.cached < PROMPT
    assert again.live == PROMPT + ANSWER - 1  # the answer's last token was never fed


def test_answers_that_are_others_among_others_are_wrong(engine: Engine) -> None:
    (line,), _ = measure(
        MixedUp(engine), 512, clients=(3,), prompt_tokens=PROMPT, answer_tokens=ANSWER
    )
    assert not line.right


def test_a_bare_step_is_timed_after_its_warm_ones() -> None:
    """A clock that counts steps: what is timed is as many steps as it is divided by."""
    backend: Any = Counting()
    taken = bare_step(backend, 3, 20, clock=lambda: float(backend.steps))
    assert (taken, backend.steps, backend.read_tokens) == (1.0, 12, 60)
    assert backend.drawn == 3 + 12 and backend.synchronized == 2


class Counting:
    """A backend that only counts. room for 12 tokens after prompts of 20."""

    slots, capacity, vocab, most_rows, chunk, least_chunk, slack = 4, 32, 64, 8, 16, 1, 8
    block, block_bytes, state_bytes, layout = 128, 1, 1, b""

    def __init__(self) -> None:
        self.steps = self.read_tokens = self.drawn = self.synchronized = 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **named: None

    def read(self, slot: int, ids: list[int]) -> None:
        """A chunk."""
        assert len(ids) <= self.chunk
        self.read_tokens += len(ids)

    def forward(self, slots: list[int]) -> None:
        """A step of three."""
        assert slots == [0, 1, 2]
        self.steps += 1

    def draw(self, draws: list[object]) -> None:
        """Of a prompt, or of a step."""
        self.drawn += 1

    def synchronize(self) -> None:
        """Called where the clock is read."""
        self.synchronized += 1


def test_the_command(native_store: Path) -> None:
    sizes = ["--clients", "2", "--prompt", "20", "--answer", "4", "--device", "cpu"]
    done = CliRunner().invoke(cli, ["bench", "serve", str(native_store), *sizes, "--json"])
    assert done.exit_code == 0, done.output
    (line,) = json.loads(done.stdout)["lines"]
    assert line["answers"] == 4 and 0 < line["bare"] < line["gap"][1] * 10
