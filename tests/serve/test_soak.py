"""Many jobs on a scripted model: nothing is left behind, and everybody gets his own answer."""

from __future__ import annotations

import gc
import random
import resource
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from dsv4.formats.errors import QueueFull
from dsv4.runtime.text.sampling import Sampler
from dsv4.serve import drafts
from dsv4.serve.cpu_backend import CpuBackend
from dsv4.serve.engine import Options, ServeEngine
from dsv4.serve.jobs import Event, Finish, Job
from dsv4.serve.prefix_cache import PrefixCache
from tests.serve.harness import Heard, ask, job
from tests.serve.test_drafts import Scripted
from tests.support.scripted import ScriptedModel, following, sums

VOCAB = 64
SCRIPT = sums(VOCAB)


def answer(ids: Sequence[int], count: int) -> list[int]:
    tokens = list(ids)
    for _ in range(count):
        tokens.append(SCRIPT(tokens))
    return tokens[len(ids) :]


class Leaving(Heard):
    """Is gone with its second token: nothing can be told to it any more."""

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if len(self.tokens) > 1:
            raise ConnectionError("closed")


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def soak(jobs: int) -> None:
    """Random lengths; one in five is cancelled, some before they begin; one in ten cannot be told
    any more. Two drafts a step where rows are left, three of four of them right.
    """
    chance = random.Random(1)
    engine = ServeEngine(CpuBackend(ScriptedModel(SCRIPT), 8, 512), Options(queue=8, draft=2))
    finished: Counter[Finish | None] = Counter()
    refused = 0
    sizes: list[int] = []
    memory: list[int] = []
    going: list[tuple[Job, Heard]] = []
    for number in range(jobs):
        ids = [chance.randrange(VOCAB) for _ in range(chance.randint(1, 60))]
        one = job(ids, chance.randint(1, 12))
        heard = Leaving() if chance.random() < 0.1 else Heard()
        while True:
            try:
                heard.ticket = engine.submit(one, heard)
                going.append((one, heard))
                break
            except QueueFull:
                refused += 1
                going[0][1].wait()
                _take(going, finished)
        if chance.random() < 0.2:
            chance.choice(going)[1].ticket.cancel()  # type: ignore[union-attr]
        _take(going, finished)
        if number in (jobs // 2, jobs - 1):
            for _, waiting in going:
                waiting.wait()
            _take(going, finished)
            gc.collect()
            memory.append(resident())
            sizes.append(len(gc.get_objects()))
    found = engine.stats()
    engine.close(finish=True)
    assert finished[Finish.LENGTH] + finished[Finish.CANCELLED] == jobs
    assert finished[Finish.CANCELLED] > jobs / 10 and refused
    assert found.drafted > jobs / 4 and found.draft_tokens > found.right_drafts > jobs / 4
    assert (found.running, found.waiting, found.reading) == (0, 0, 0)
    assert found.finished[Finish.CANCELLED] == finished[Finish.CANCELLED]
    assert sizes[1] < sizes[0] + jobs // 8, "objects: half of the jobs left none"
    assert memory[1] < memory[0] + 200 * jobs + (8 << 20), "bytes: neither"


def _take(going: list[tuple[Job, Heard]], finished: Counter[Finish | None]) -> None:
    """Judge those that have ended."""
    for one, heard in [pair for pair in going if pair[1].done.is_set()]:
        wanted = answer(one.ids, len(heard.tokens))
        assert heard.tokens == wanted
        assert heard.finish is Finish.CANCELLED or len(heard.tokens) == one.max_new_tokens
        finished[heard.finish] += 1
        going.remove((one, heard))


@pytest.fixture
def _by_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixCache, "find", lambda *_: None)  # a script has no state to go on from
    proposer = Scripted(SCRIPT)
    monkeypatch.setattr(drafts, "PromptLookup", lambda: proposer)


@pytest.mark.usefixtures("_by_the_script")
def test_a_thousand_jobs() -> None:
    soak(1000)


@pytest.mark.long
@pytest.mark.usefixtures("_by_the_script")
def test_ten_thousand_jobs() -> None:
    soak(10_000)


def test_one_who_is_cancelled_ends_within_a_step() -> None:
    """By who listens, while it is told its third token."""
    engine = ServeEngine(CpuBackend(ScriptedModel(SCRIPT), 1, 512))
    heard = Heard()

    def listen(event: Event) -> None:
        heard(event)
        if len(heard.tokens) == 3 and event.finish is None:
            heard.ticket.cancel()  # type: ignore[union-attr]

    late = Heard()
    heard.ticket = engine.submit(job([5] * 20, 400), listen)
    late.ticket = engine.submit(job([6], 4), late)
    assert heard.wait().finish is Finish.CANCELLED
    assert heard.tokens == answer([5] * 20, 3)
    assert late.wait().tokens == answer([6], 4)
    engine.close(finish=True)


def test_one_who_waits_can_be_cancelled() -> None:
    engine = ServeEngine(CpuBackend(ScriptedModel(SCRIPT), 1, 4096))
    first, second = (ask(engine, job([number], 4000)) for number in (1, 2))
    second.ticket.cancel()  # type: ignore[union-attr]
    assert second.wait().events == [Event(cached_tokens=0, finish=Finish.CANCELLED)]
    assert not first.done.is_set()
    engine.close(finish=False)


def test_a_script_is_followed() -> None:
    """And logits that are not finite are nobody's but the job's."""
    model = ScriptedModel(following([3, 1, 4, 1, 5], after=9, otherwise=-1))
    engine = ServeEngine(CpuBackend(model, 2, 512))
    heard = ask(engine, job([2, 9], 5, Sampler(0.01, seed=1)))
    ended = ask(engine, job([7, 9], 10, stop_ids=frozenset({5})))
    broken = ask(engine, job([8, 9], 10))
    assert heard.wait().tokens == [3, 1, 4, 1, 5]
    assert ended.wait().tokens == [3, 1, 4, 1] and ended.finish is Finish.STOP
    assert broken.wait().tokens == [3, 1, 4, 1, 5] and broken.finish is Finish.FAILED
    assert "NaN or infinity" in str(broken.events[-1].error)
    again = ask(engine, job([8, 9], 5)).wait()
    assert again.tokens == [3, 1, 4, 1, 5] and again.cached == 0
    engine.close(finish=True)
