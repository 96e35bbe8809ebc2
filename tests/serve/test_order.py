"""Who reads next, how much, and that nobody waits longer than promised."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4.formats.errors import RuntimeRefusal
from dsv4.runtime.text.sampling import Sampler
from dsv4.serve.cpu_backend import CpuBackend
from dsv4.serve.engine import Options, ServeEngine
from dsv4.serve.jobs import Event, Job
from dsv4.serve.order import MOST_OVERTAKEN, SHORT, Pace, chunk_end, groups, next_prompt
from dsv4.serve.remembering import Remembering
from dsv4.serve.run import Run
from dsv4.serve.scheduler import Scheduler, Sharing
from tests.support.scripted import ScriptedModel, sums


@given(
    st.integers(0, 5000),
    st.integers(1, 9000),
    st.sampled_from([64, 100, 128, 512, 2048]),
    st.sampled_from([1, 32]),
)
def test_cuts_leave_no_rest_that_steps_would_read(
    start: int, count: int, most: int, least: int
) -> None:
    """From any start: every cut and every rest are chunks, if the whole is."""
    position, end = start, start + count
    while position < end:
        cut = chunk_end(position, end, most, 128, least)
        assert position < cut <= min(position + most, end)
        assert cut - position >= min(least, count)
        assert cut == end or end - cut >= least
        possible = range(position + least, min(position + most, end - least) + 1)
        if cut < end and any(place % 128 == 0 for place in possible):
            assert cut % 128 == 0
        position = cut


@given(st.integers(0, 100), st.integers(1, 8))
def test_groups_are_even(count: int, most: int) -> None:
    found = groups(count, most)
    sizes = [part.stop - part.start for part in found]
    assert [row for part in found for row in range(part.start, part.stop)] == list(range(count))
    assert len(found) == -(-count // most)
    assert not sizes or max(sizes) - min(sizes) <= 1


@dataclasses.dataclass(eq=False)
class OnePrompt:
    left: int
    overtaken: int = 0
    turn: int = 0


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 30_000)), max_size=60))
def test_nobody_is_overtaken_for_ever(arrivals: list[tuple[int, int]]) -> None:
    """Each chunk, a prompt reads 2,048 tokens. Between two of its own, a prompt sees at most so
    many chunks of later ones, and one of each that came before it.
    """
    coming = sorted(arrivals)
    present: list[OnePrompt] = []
    passed: dict[int, int] = {}
    now = 0
    while coming or present:
        while coming and coming[0][0] <= now:
            present.append(OnePrompt(coming.pop(0)[1]))
            passed[id(present[-1])] = 0
        now += 1
        if not present:
            continue
        chosen = next_prompt(present)
        for one in present[: present.index(chosen)]:
            passed[id(one)] += 1
            assert passed[id(one)] <= MOST_OVERTAKEN + len(present)
        passed[id(chosen)] = 0
        chosen.turn = now
        chosen.left -= min(chosen.left, 2048)
        present = [one for one in present if one.left]


def test_a_short_prompt_goes_first_and_long_ones_alternate() -> None:
    first, second = OnePrompt(30_000), OnePrompt(20_000)
    order = []
    for turn in range(1, 5):
        one = next_prompt([first, second])
        one.turn = turn
        order.append(one)
    assert order == [first, second, first, second]
    short = OnePrompt(SHORT)
    first, second = OnePrompt(30_000), OnePrompt(20_000)
    order = [next_prompt([first, second, short]) for _ in range(MOST_OVERTAKEN + 3)]
    assert order == [short] * MOST_OVERTAKEN + [first, second, short]


def test_a_size_is_chosen_by_what_it_took() -> None:
    pace = Pace(2048, 128)
    assert pace.tokens(0.2) == 128, "nothing is known"
    pace.took(1, 0.01)
    assert pace.tokens(0.2) == 128, "a few tokens tell nothing"
    pace.took(128, 0.05)
    assert pace.tokens(0.2) == 256, "one step after another"
    pace.took(256, 0.06)
    assert pace.tokens(0.2) == 512
    pace.took(400, 0.13)
    assert pace.tokens(0.2) == 512, "the next could take 0.195, and 0.18 are given"
    pace.took(2048, 0.178)
    assert pace.tokens(0.2) == 2048
    pace.took(2048, 0.25)
    assert pace.tokens(0.2) == 512
    assert pace.tokens(0.0) == 256, "which takes hardly longer than 128"


def test_chunks_grow_where_small_ones_shorten_no_pause() -> None:
    pace, read = Pace(2048, 64), []
    for _ in range(8):
        read.append(pace.tokens(0.2))
        pace.took(read[-1], 0.34 + read[-1] * 1e-5)
    assert read == [64, 128, 256, 512, 1024, 2048, 2048, 2048]


class Clock:
    """Chunks and steps take what an H200 needs, about: 65 ms and 55 us a token; 11 ms a step."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def ran(self, rows: int) -> None:
        self.now += 0.065 + 55e-6 * rows if rows > 1 else 0.011


def pauses(sharing: Sharing, prompts: list[int], answering: int = 2) -> tuple[float, float]:
    """Seconds: the longest that one who answers waited for a token while `prompts` were read, and
    until all of these had a token.
    """
    clock = Clock()
    model = ScriptedModel(lambda tokens: 1, ran=clock.ran)
    backend: Any = CpuBackend(model, answering + len(prompts), 40_000)
    backend.chunk, backend.least_chunk = 2048, 32
    for session in backend.sessions:
        session._most_rows = lambda chunk: 2048
    scheduler = Scheduler(backend, Remembering(backend, None), sharing, clock)
    last: dict[int, float] = {}
    longest = 0.0
    waiting = set(range(answering, answering + len(prompts)))

    def hear(number: int, event: Event) -> None:
        nonlocal longest
        if event.tokens:
            if number < answering and number in last:
                longest = max(longest, clock.now - last[number])
            last[number] = clock.now
            waiting.discard(number)

    def submit(number: int, ids: list[int], count: int) -> None:
        job = Job(ids, Sampler(), count)
        scheduler.submit(Run(job, lambda e: hear(number, e), 40_000, lambda: None))

    for number in range(answering):
        submit(number, [number], 100_000)
    for _ in range(3):
        scheduler.turn()
    start = clock.now
    for number, count in enumerate(prompts, answering):
        submit(number, [number % 64] * count, 1)
    while waiting:
        assert scheduler.turn()
    return longest, clock.now - start


def test_nobody_waits_longer_than_promised() -> None:
    """While a prompt of 32,000 tokens is read."""
    longest, took = pauses(Sharing(max_pause=0.18), [32_000])
    assert 0.1 < longest <= 0.18
    whole = 16 * (0.065 + 55e-6 * 2048)
    assert whole < took < 6 * whole, "half of the time, with chunks that are not too small"
    free, _ = pauses(Sharing(max_pause=10.0, share=0.0), [32_000])
    assert free > 0.18, "it is the promise that keeps chunks short"


def test_the_share_is_kept() -> None:
    """Of the time; a prompt is read at once when nobody answers."""
    alone = pauses(Sharing(), [16_000], answering=0)[1]
    none, half, most = (pauses(Sharing(10.0, share), [16_000])[1] for share in (0.0, 0.5, 0.75))
    assert none < 1.4 * alone
    assert 2.0 * alone < half < 2.5 * alone
    assert 4.0 * alone < most < 4.8 * alone


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    """Of three that come at once, the short one has its token before the others are read."""
    options = Options(sharing=Sharing(max_pause=0.2), prefix_bytes=0)
    clock = Clock()
    backend = CpuBackend(ScriptedModel(sums(64), ran=clock.ran), 3, 40_000)
    scheduler = Scheduler(backend, Remembering(backend, None), options.sharing, clock)
    order: list[int] = []
    for number, count in enumerate((30_000, 20_000, 100)):
        job = Job([number] * count, Sampler(), 1)
        told: Any = lambda event, number=number: order.append(number)  # noqa: E731
        scheduler.submit(Run(job, told, 40_000, lambda: None))
    while scheduler.turn():
        pass
    assert order == [2, 1, 0]


def test_time_must_be_left_for_prompts() -> None:
    backend = CpuBackend(ScriptedModel(sums(64)), 1, 100)
    with pytest.raises(RuntimeRefusal, match=r"share is 1\.0, expected 0 or more and below 1"):
        ServeEngine(backend, Options(sharing=Sharing(share=1.0)))
