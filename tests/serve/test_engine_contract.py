"""Whatever engine `make_engine` chooses: what `jobs` promises, held against the CPU's session."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dsv4
from dsv4.formats.errors import DraftRefusal, QueueFull, RuntimeRefusal
from dsv4.runtime.gpu.model import GpuModel
from dsv4.runtime.model import Model
from dsv4.runtime.text.drafting import Wish
from dsv4.runtime.text.sampling import Sampler
from dsv4.serve.engine_choice import Wanted, make_engine
from dsv4.serve.jobs import Engine, Event, Finish, Job, TokenLogprob
from dsv4.serve.steering import Without

PROMPT = [0, 5, 9, 300, 17, 4, 4, 60]
ROOM = 64


@pytest.fixture(scope="module")
def engine(native_store: Path) -> Iterator[Engine]:
    wanted = Wanted("cpu", slots=1, max_seq_len=ROOM, queue=1)
    made = make_engine(dsv4.open(native_store), wanted, lambda phase: None)
    yield made
    made.close(finish=True)


@pytest.fixture(scope="module")
def forward(native_store: Path) -> Callable[[list[int]], Tensor]:
    """ids -> logits of a fresh session."""
    model = dsv4.load(native_store)
    return lambda ids: model.session(ROOM).forward(torch.tensor(ids))


def test_counts_of_experts_are_written_once_when_it_is_closed(
    native_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, written = [], []
    right = dsv4.load

    def load(*given: object, **named: Any) -> Model | GpuModel:
        asked.append({name: named[name] for name in ("experts", "routes", "slots", "max_seq_len")})
        return right(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(dsv4, "load", load)
    monkeypatch.setattr(Model, "write_routes", lambda model, path: written.append(path))
    file = tmp_path / "routes.json"
    wanted = Wanted("cpu", slots=2, max_seq_len=ROOM, experts=1 << 30, routes=file)
    made = make_engine(dsv4.open(native_store), wanted, lambda phase: None)
    run(made, Job(PROMPT, Sampler(), 2))
    assert asked == [{"experts": 1 << 30, "routes": file, "slots": 2, "max_seq_len": ROOM}]
    assert not written
    made.close(finish=True)
    made.close(finish=False)
    assert written == [file]
    wanted = dataclasses.replace(wanted, count=False)
    make_engine(dsv4.open(native_store), wanted, lambda phase: None).close(finish=True)
    assert written == [file]


def test_draft_layers_are_loaded_where_they_are_used(
    native_store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By `auto` only if they can be used."""
    asked: list[bool] = []
    right = dsv4.load

    def load(*given: Any, drafts: bool, **named: Any) -> Model | GpuModel:
        asked.append(drafts)
        if drafts and damaged:
            raise DraftRefusal("the draft layers cannot be used: they are damaged")
        return right(*given, drafts=drafts, **named)

    monkeypatch.setattr(dsv4, "load", load)
    wishes: tuple[tuple[Wish, bool, list[bool]], ...] = (
        ("off", True, [False]),
        (0, True, [False]),
        (2, False, [True]),
        ("auto", True, [True, False]),
    )
    damaged = True
    for draft, damages, loads in wishes:
        damaged = damages
        asked.clear()
        wanted = Wanted("cpu", max_seq_len=ROOM, draft=draft, count=False)
        made = make_engine(dsv4.open(native_store), wanted, lambda phase: None)
        assert tokens(run(made, Job(PROMPT, Sampler(), 2)))
        made.close(finish=True)
        assert asked == loads
    assert "they are damaged" in caplog.text
    with pytest.raises(DraftRefusal):
        wanted = Wanted("cpu", max_seq_len=ROOM, draft=2, count=False)
        make_engine(dsv4.open(native_store), wanted, lambda phase: None)


def run(engine: Engine, job: Job) -> list[Event]:
    told: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine.submit(job, told.put)
    found = [told.get(timeout=60)]
    while found[-1].finish is None:
        found.append(told.get(timeout=60))
    return found


def tokens(events: list[Event]) -> list[int]:
    return [token for event in events for token in event.tokens]


def test_greedy_is_the_argmax_of_the_session(
    engine: Engine, forward: Callable[[list[int]], Tensor]
) -> None:
    events = run(engine, Job(PROMPT, Sampler(), 6))
    said = tokens(events)
    assert said == forward(PROMPT + said)[len(PROMPT) - 1 : -1].argmax(-1).tolist()
    assert events[-1].finish is Finish.LENGTH
    assert events[0].cached_tokens is not None
    assert {event.cached_tokens for event in events[1:]} <= {None}


def test_logprobs_are_of_the_raw_logits(
    engine: Engine, forward: Callable[[list[int]], Tensor]
) -> None:
    hot = Sampler(2.0, seed=4, frequency_penalty=1.5)
    events = run(engine, Job(PROMPT, hot, 5, logprobs=3, prompt_logprobs=True))
    said = tokens(events)
    expected = forward(PROMPT + said).double().log_softmax(-1)
    prompt = [one for event in events for one in event.prompt_logprobs]
    drawn = [one for event in events for one in event.logprobs]
    assert [one.token for one in prompt] == PROMPT[1:] and [one.token for one in drawn] == said

    def check(one: TokenLogprob, row: Tensor) -> None:
        assert one.logprob == pytest.approx(float(row[one.token]), abs=1e-4)
        ids = [token for token, _ in one.top]
        assert ids == row.topk(3).indices.tolist()
        assert all(value == one.logprob for token, value in one.top if token == one.token)

    for one, row in zip([*prompt, *drawn], expected, strict=False):
        check(one, row)


def test_masks_stop_ids_and_seeds(engine: Engine, forward: Callable[[list[int]], Tensor]) -> None:
    vocab = forward(PROMPT).shape[-1]
    free = tokens(run(engine, Job(PROMPT, Sampler(), 4)))
    events = run(engine, Job(PROMPT, Sampler(), 4, stop_ids=frozenset(free[2:3])))
    before = free[: free.index(free[2])]
    assert tokens(events) == before and events[-1].finish is Finish.STOP
    banned = run(engine, Job(PROMPT, Sampler(), 4, constraint=Without(vocab, never=free)))
    assert not set(tokens(banned)) & set(free)
    first, second = (tokens(run(engine, Job(PROMPT, Sampler(1.0, seed=8), 6))) for _ in range(2))
    assert first == second


def test_a_bias_is_added_to_the_logits(
    engine: Engine, forward: Callable[[list[int]], Tensor]
) -> None:
    """Likelihoods are told without it."""
    free = tokens(run(engine, Job(PROMPT, Sampler(), 6)))
    bias = {free[0]: -6.0, free[3]: 0.5, 9: 1.5}
    events = run(engine, Job(PROMPT, Sampler(bias=bias), 6, logprobs=0))
    said = tokens(events)
    logits = forward(PROMPT + said)[len(PROMPT) - 1 : -1]
    more = torch.zeros(logits.shape[-1])
    for token, value in bias.items():
        more[token] = value
    assert said == (logits + more).argmax(-1).tolist() and said != free
    raw = logits.double().log_softmax(-1)
    for event, row in zip([one for one in events if one.tokens], raw, strict=True):
        assert event.logprobs[0].logprob == pytest.approx(float(row[event.tokens[0]]), abs=1e-4)


def test_a_cancelled_job_ends_and_the_next_one_runs(engine: Engine) -> None:
    told: queue.SimpleQueue[Event] = queue.SimpleQueue()
    ticket = engine.submit(Job(PROMPT, Sampler(), ROOM - len(PROMPT)), told.put)
    ticket.cancel()
    events = [told.get(timeout=60)]
    while events[-1].finish is None:
        events.append(told.get(timeout=60))
    assert events[-1].finish is Finish.CANCELLED and len(tokens(events)) < ROOM - len(PROMPT)
    ticket.cancel()  # may be called any time
    assert run(engine, Job(PROMPT, Sampler(), 1))[-1].finish is Finish.LENGTH


def test_what_can_never_run_is_refused_and_a_queue_has_an_end(engine: Engine) -> None:
    assert engine.failure is None and engine.max_seq_len == ROOM
    for ids, count in ((PROMPT * (ROOM // len(PROMPT)), 1), ([], 1)):
        with pytest.raises(RuntimeRefusal):
            engine.submit(Job(ids, Sampler(), count), lambda event: None)
    told: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with pytest.raises(QueueFull):
        for _ in range(8):
            engine.submit(Job(PROMPT, Sampler(), 40), told.put)
    while engine.failure is None and told.get(timeout=60).finish is None:
        pass
