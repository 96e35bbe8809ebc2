"""What a job is told is what a session of its own says, whoever runs beside it."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.formats.errors import QueueFull, RuntimeRefusal
from dsv4.runtime.snapshots import SlotMemory
from dsv4.runtime.text.sampling import Sampler
from dsv4.serve.cpu_backend import CpuBackend
from dsv4.serve.engine import Options, ServeEngine, backend_of
from dsv4.serve.jobs import Event, Finish
from tests.serve import small
from tests.serve.faults import stale_ring_row, state_one_token_off
from tests.serve.harness import Heard, ask, job
from tests.serve.small import IDS, alone

SAMPLERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 5},
    {"temperature": 1.2, "top_p": 0.8, "seed": 6},
    {"temperature": 0.8, "top_k": 7, "top_p": 0.9, "seed": 7},
    {"temperature": 1.0, "min_p": 0.05, "presence_penalty": 1.5, "seed": 8},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.2},
]


def prompt(number: int) -> list[int]:
    """Some share a beginning, of which some end in the middle of a block."""
    shared = IDS[: (0, 20, 48, 55)[number % 4]]
    return shared + IDS[100 + 7 * number : 101 + 9 * number + number % 5]


def mismatches(sequences: int, slots: int, seed: int = 0) -> list[int]:
    """Jobs of a busy engine that were told something else than a session of their own says.

    They join one by one, some are cancelled, and more come when the first have ended.
    """
    chance = random.Random(seed)
    engine = ServeEngine(small.backend(slots), Options(queue=100))
    heard: list[tuple[int, int, Heard]] = []
    for round_ in range(2):
        for number in range(sequences):
            count = chance.randint(3, 12)
            one = job(prompt(number), count, Sampler(**SAMPLERS[(number + round_) % 6]), logprobs=2)
            heard.append((number, round_, ask(engine, one)))
            if chance.random() < 0.2:
                chance.choice(heard)[2].ticket.cancel()  # type: ignore[union-attr]
            if chance.random() < 0.3:
                heard[chance.randrange(len(heard))][2].wait()
    engine.close(finish=True)
    wrong = []
    for index, (number, round_, one_heard) in enumerate(heard):
        assert one_heard.finish in (Finish.LENGTH, Finish.CANCELLED), one_heard.events
        count = len(one_heard.tokens)
        wanted = alone(prompt(number), count, SAMPLERS[(number + round_) % 6])
        if (one_heard.tokens, one_heard.logprobs) != wanted:
            wrong.append(index)
    return wrong


@pytest.mark.parametrize(("sequences", "slots"), [(1, 1), (2, 2), (5, 3), (9, 8), (16, 16)])
def test_alone_is_as_among_others(sequences: int, slots: int) -> None:
    assert mismatches(sequences, slots) == []


@pytest.mark.long
@pytest.mark.parametrize("sequences", range(1, 17))
def test_any_number_of_sequences(sequences: int) -> None:
    for seed in range(3):
        assert mismatches(sequences, max(1, sequences - seed), seed + 10) == []


def _block_of_others(patch: pytest.MonkeyPatch) -> None:
    """The order of blocks is not looked at here: attention is over a set."""
    right = SlotMemory.load_blocks

    def wrong(self: SlotMemory, first: int, blocks: Tensor) -> None:
        right(self, first, torch.cat((blocks[1:2], blocks[1:])))

    patch.setattr(SlotMemory, "load_blocks", wrong)


def _slots_mixed_up(patch: pytest.MonkeyPatch) -> None:
    right = CpuBackend.forward

    def wrong(self: CpuBackend, slots: list[int]) -> None:
        right(self, slots)
        if len(slots) == 3:
            self._logits = self._logits.flip(0)

    patch.setattr(CpuBackend, "forward", wrong)


@pytest.mark.parametrize(
    "plant",
    [stale_ring_row, state_one_token_off, _block_of_others],
    ids=lambda plant: plant.__name__.strip("_").replace("_", " "),
)
def test_a_fault_of_what_is_remembered_is_noticed(
    monkeypatch: pytest.MonkeyPatch, plant: Any
) -> None:
    plant(monkeypatch)
    engine = ServeEngine(small.backend(1))
    ask(engine, job(IDS[:100], 1)).wait()
    ask(engine, job(IDS[200:300], 1)).wait()  # takes the slot, and writes all of it
    heard = ask(engine, job(IDS[:100], 6, logprobs=2)).wait()
    engine.close(finish=True)
    assert heard.cached == 96
    assert (heard.tokens, heard.logprobs) != alone(IDS[:100], 6, {})


def test_slots_that_are_mixed_up_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    _slots_mixed_up(monkeypatch)
    assert mismatches(6, 4)


@pytest.fixture
def engine() -> Iterator[ServeEngine]:
    one = ServeEngine(small.backend(2), Options(queue=1))
    yield one
    one.close(finish=False)


def test_a_model_of_the_cpu_is_run_there() -> None:
    """With blocks of the size of its own ratios and window."""
    backend = backend_of(small.model(), 2, 200)
    assert isinstance(backend, CpuBackend)
    assert (backend.slots, backend.capacity, backend.block) == (2, 200, 128)


def test_a_stop_id_ends_the_answer_untold(engine: ServeEngine) -> None:
    whole, _ = alone(IDS[:30], 12, {})
    stop = whole[5]
    heard = ask(engine, job(IDS[:30], 12, stop_ids=frozenset({stop}))).wait()
    assert heard.finish is Finish.STOP
    assert heard.tokens == whole[: whole.index(stop)]


def test_the_next_turn_goes_on_in_the_slot(engine: ServeEngine) -> None:
    """With the stop id, which has been computed meanwhile, or without."""
    whole, _ = alone(IDS[:30], 12, {})
    stop = whole[5]
    first = ask(engine, job(IDS[:30], 12, stop_ids=frozenset({stop}))).wait()
    following = [*IDS[:30], *first.tokens, stop, 5, 6, 7]
    second = ask(engine, job(following, 9)).wait()
    assert second.cached == 30 + len(first.tokens) + 1
    assert second.tokens == alone(following, 9, {})[0]
    other = [*IDS[:30], *first.tokens, 9, 8]
    third = ask(engine, job(other, 9)).wait()
    assert third.cached == 30 + len(first.tokens)
    assert third.tokens == alone(other, 9, {})[0]


def test_an_answer_ends_where_the_slot_does() -> None:
    engine = ServeEngine(small.backend(1, max_seq_len=40))
    heard = ask(engine, job(IDS[:33], 100)).wait()
    assert heard.finish is Finish.LENGTH
    assert heard.tokens == alone(IDS[:33], 7, {})[0]
    last = ask(engine, job(IDS[:39], 5)).wait()
    assert last.tokens == alone(IDS[:39], 1, {})[0]
    with pytest.raises(RuntimeRefusal, match="the prompt has 40 tokens, and with its answer"):
        engine.submit(job(IDS[:40], 5), print)
    engine.close(finish=True)


def test_probabilities_of_a_prompt(engine: ServeEngine) -> None:
    """Every token's but the first's, the same floats in both places, cached or not."""
    ids = IDS[:150]
    logits = small.model().session(200).forward(torch.tensor(ids)).double()
    wanted = (logits - logits.logsumexp(1, keepdim=True))[torch.arange(149), ids[1:]]
    for count in (0, 1):
        heard = ask(engine, job(ids, count, logprobs=3, prompt_logprobs=True)).wait()
        told = heard.events[0].prompt_logprobs
        assert [one.token for one in told] == ids[1:]
        assert [one.logprob for one in told] == wanted.tolist()
        for one, row in zip(told, logits, strict=False):
            assert [token for token, _ in one.top] == row.topk(3).indices.tolist()
            assert one.token not in dict(one.top) or dict(one.top)[one.token] == one.logprob
        assert heard.cached == 0 and len(heard.tokens) == count


class Alternating:
    """Even ids and odd ones in turns, until an id of the last ten."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def mask(self) -> Tensor:
        return torch.arange(small.CONFIG.vocab_size) % 2 == len(self.taken) % 2

    def took(self, token: int) -> None:
        self.taken.append(token)

    @property
    def ended(self) -> bool:
        return len(self.taken) == 7


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_constraint_is_kept(engine: ServeEngine, sampler: dict[str, Any]) -> None:
    free = ask(engine, job(IDS[:30], 12, Sampler(**sampler)))
    constraint = Alternating()
    heard = ask(engine, job(IDS[:30], 12, Sampler(**sampler), constraint=constraint)).wait()
    assert heard.tokens == constraint.taken and len(heard.tokens) == 7
    assert [token % 2 for token in heard.tokens] == [0, 1, 0, 1, 0, 1, 0]
    assert heard.finish is Finish.STOP
    assert free.wait().tokens == alone(IDS[:30], 12, sampler)[0]


class Broken(Alternating):
    def took(self, token: int) -> None:
        raise ValueError("no such state")


class Silent(Alternating):
    def mask(self) -> Tensor:
        return super().mask() & (len(self.taken) < 3)


def test_what_a_constraint_raises_fails_its_job_alone(engine: ServeEngine) -> None:
    other = ask(engine, job(IDS[:30], 12))
    heard = ask(engine, job(IDS[:20], 12, constraint=Broken())).wait()
    assert heard.finish is Finish.FAILED
    assert heard.events[-1].error == "the constraint on the answer failed: no such state"
    assert other.wait().tokens == alone(IDS[:30], 12, {})[0]
    quiet = ask(engine, job(IDS[:20], 12, constraint=Silent())).wait()
    assert quiet.finish is Finish.STOP and len(quiet.tokens) == 3


def test_whoever_cannot_be_told_is_cancelled(engine: ServeEngine) -> None:
    told: list[Event] = []

    def gone(event: Event) -> None:
        told.append(event)
        raise ConnectionError("closed")

    engine.submit(job(IDS[:20], 400), gone)
    heard = ask(engine, job(IDS[:30], 12)).wait()
    assert heard.tokens == alone(IDS[:30], 12, {})[0]
    engine.close(finish=True)
    assert told[-1].finish is Finish.CANCELLED and len(told) < 5


def test_more_than_may_wait_are_refused(engine: ServeEngine) -> None:
    jobs = [ask(engine, job(IDS[:20], 400)) for _ in range(3)]
    with pytest.raises(QueueFull, match="1 jobs wait for one of 2 slots"):
        engine.submit(job(IDS[:20]), print)
    for one in jobs:
        one.ticket.cancel()  # type: ignore[union-attr]
    assert [one.wait().finish for one in jobs] == [Finish.CANCELLED] * 3
    assert ask(engine, job(IDS[:20])).wait().finish is Finish.LENGTH


def test_several_are_taken_together_or_not_at_all(engine: ServeEngine) -> None:
    """Two slots and one who waits: of four none runs, of three all; nor where one can never run."""
    heard = [Heard() for _ in range(4)]
    good = [(job(IDS[:20], 400), one) for one in heard]
    with pytest.raises(QueueFull, match="0 jobs run or wait, and 4 more at once are too many: 3"):
        engine.submit_all(good)
    with pytest.raises(RuntimeRefusal, match="the prompt is empty"):
        engine.submit_all([*good[:2], (job([]), heard[2])])
    assert engine.stats().running == engine.stats().waiting == 0
    tickets = engine.submit_all(good[:3])
    with pytest.raises(QueueFull, match="3 jobs run or wait, and 2 more"):
        engine.submit_all(good[:2])
    for ticket in tickets:
        ticket.cancel()
    assert [one.wait().finish for one in heard[:3]] == [Finish.CANCELLED] * 3
    assert heard[3].events == []


@pytest.mark.parametrize(
    ("ids", "count", "message"),
    [
        ([], 3, "the prompt is empty"),
        ([1, 99], 3, "token id 99 is not in the vocabulary of 99 ids"),
        ([1, -1], 3, "token id -1 is not"),
        ([1], -1, "max_new_tokens is -1"),
    ],
)
def test_what_can_never_run_is_refused(
    engine: ServeEngine, ids: list[int], count: int, message: str
) -> None:
    with pytest.raises(RuntimeRefusal, match=message):
        engine.submit(job(ids, count), print)
    with pytest.raises(RuntimeRefusal, match="logprobs is -1"):
        engine.submit(job([1], 1, logprobs=-1), print)
    assert engine.stats().waiting == 0


def test_closing_finishes_what_was_taken() -> None:
    engine = ServeEngine(small.backend(2))
    heard = [ask(engine, job(IDS[:20], 12)) for _ in range(4)]
    engine.close(finish=True)
    assert [one.finish for one in heard] == [Finish.LENGTH] * 4
    with pytest.raises(RuntimeRefusal, match="takes no more jobs"):
        engine.submit(job([1]), print)


def test_closing_at_once_cancels() -> None:
    engine = ServeEngine(small.backend(2))
    heard = [ask(engine, job(IDS[:20], 400)) for _ in range(4)]
    closing = threading.Thread(target=lambda: engine.close(finish=True))
    closing.start()
    engine.close(finish=False)
    closing.join(30)
    assert [one.finish for one in heard] == [Finish.CANCELLED] * 4


def test_a_failure_ends_everything_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = small.backend(2)
    engine = ServeEngine(backend)
    calls = iter(range(100))
    right = backend.forward

    def broken(slots: list[int]) -> None:
        if next(calls) == 4:
            raise RuntimeError("an illegal memory access was encountered")
        right(slots)

    monkeypatch.setattr(backend, "forward", broken)
    heard = [ask(engine, job(IDS[:20], 30)) for _ in range(5)]
    said = "the engine ended because of RuntimeError: an illegal memory access was encountered"
    for one in heard:
        assert one.wait().finish is Finish.FAILED
        assert one.events[-1].error == f"{said}; start the server again"
    assert engine.failure == f"{said}; start the server again"
    with pytest.raises(RuntimeRefusal, match=said):
        engine.submit(job([1]), print)
    found = engine.stats()
    assert (found.running, found.waiting) == (0, 0)
    engine.close(finish=True)
