"""The GPU's backend on emulated kernels: the same promises as the CPU's, against its sessions."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.bench.random_weights import RandomWeights
from dsv4.formats.errors import RuntimeRefusal
from dsv4.runtime.gpu.batch import Batch
from dsv4.runtime.text.generate import generate
from dsv4.runtime.text.sampling import Sampler
from dsv4.serve.engine import Options, ServeEngine, backend_of
from dsv4.serve.gpu_backend import GpuBackend
from dsv4.serve.jobs import Finish
from dsv4.serve.remembering import MemoryOptions
from dsv4.serve.scheduler import Sharing
from tests.runtime.gpu.test_rewind import FEW, Quick
from tests.runtime.gpu.test_session import CPU, HostModel
from tests.serve.faults import stale_ring_row, state_one_token_off
from tests.serve.harness import Heard, ask, job

CONFIG = dataclasses.replace(FEW, vocab_size=128)
CAPACITY = 128
CHUNK = 64
BLOCK = 16
IDS = torch.randint(0, 128, (300,), generator=torch.Generator().manual_seed(5)).tolist()
PROMPTS = [IDS[:9], IDS[:36], IDS[:70], [*IDS[:36], *IDS[120:150]], IDS[200:233]]
SAMPLERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 5},
    {"temperature": 1.0, "min_p": 0.05, "seed": 8},
    {"temperature": 1.2, "top_p": 0.8, "seed": 6},
    {"repetition_penalty": 1.3},
]
COUNT = 4


pytestmark = pytest.mark.usefixtures("no_graphs")


@pytest.fixture(scope="module")
def model() -> HostModel:
    return HostModel(RandomWeights(CONFIG, CPU), Quick(CONFIG), CPU)


@pytest.fixture(scope="module")
def alone(model: HostModel) -> list[list[int]]:
    """What sessions of their own say, which read a prompt as one chunk."""
    return [
        list(generate(model.session(CAPACITY, chunk=128), ids, COUNT, Sampler(**sampler)))
        for ids, sampler in zip(PROMPTS, SAMPLERS, strict=True)
    ]


def serving(model: HostModel, slots: int, **memory: Any) -> ServeEngine:
    backend = GpuBackend(model.engine(CAPACITY, slots=slots, chunk=CHUNK), block=BLOCK)
    # No time is left to answers alone: rows come and go while others read.
    options = Options(queue=100, memory=MemoryOptions(**memory), sharing=Sharing(share=0.0))
    return ServeEngine(backend, options)


def all_of(engine: ServeEngine, **more: Any) -> list[Heard]:
    return [
        ask(engine, job(ids, COUNT, Sampler(**sampler), **more))
        for ids, sampler in zip(PROMPTS, SAMPLERS, strict=True)
    ]


def test_rows_of_a_step_are_alone(model: HostModel, alone: list[list[int]]) -> None:
    engine = serving(model, 3)
    heard = all_of(engine)
    heard[2].wait()
    again = ask(engine, job(PROMPTS[3], COUNT, Sampler(**SAMPLERS[3])))
    engine.close(finish=True)
    assert [one.tokens for one in heard] == alone
    assert again.tokens == alone[3]


def test_more_slots_than_rows(
    model: HostModel, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups take turns, whose rows come and go."""
    steps: list[set[int]] = []
    right = Batch.forward

    def seen(self: Batch, slots: list[int]) -> Tensor:
        steps.append(set(slots))
        return right(self, slots)

    monkeypatch.setattr(Batch, "forward", seen)
    wanted = list(generate(model.session(CAPACITY, chunk=128), PROMPTS[0], 12, Sampler()))
    engine = serving(model, 10)
    heard = [ask(engine, job(PROMPTS[0], 12)) for _ in range(9)]
    last = ask(engine, job(PROMPTS[1], COUNT, Sampler(**SAMPLERS[1])))
    engine.close(finish=True)
    assert [one.tokens for one in heard] == [wanted] * 9
    assert last.tokens == alone[1]
    assert any(
        len(one) > 3 and len(other) > 3 and one.isdisjoint(other)
        for one, other in itertools.pairwise(steps)
    )


def test_what_is_remembered_gives_the_bytes_of_a_cold_run(model: HostModel) -> None:
    """With 32 tokens behind what is known, and more; in memory alone, and where a slot has them."""
    engine, cold = serving(model, 1), serving(model, 1)
    cold._scheduler.remembering.cache = None
    ask(engine, job(IDS[:100], 1)).wait()
    wanted: dict[int, Heard] = {}
    for count, slot_has_them, cached in (
        (80, False, 0),  # it leaves a state
        (80, False, 48),
        (79, False, 0),
        (79, False, 32),
        (79, True, 79 - 32),
        (99, True, 99 - 32),
    ):
        if not slot_has_them:
            ask(engine, job([1, 2], 1)).wait()
        if count not in wanted:
            ask(cold, job([1, 2], 1)).wait()
            wanted[count] = ask(cold, job(IDS[:count], 2, logprobs=5)).wait()
            assert wanted[count].cached == 0
        found = ask(engine, job(IDS[:count], 2, logprobs=5)).wait()
        assert found.cached == cached
        told = wanted[count]
        assert (found.tokens, found.logprobs) == (told.tokens, told.logprobs), count
    engine.close(finish=True)
    cold.close(finish=True)


def test_probabilities_of_a_prompt(model: HostModel) -> None:
    """In a chunk and in steps: those of a session's logits."""
    engine = serving(model, 2)
    for ids in (IDS[:70], IDS[:13]):
        heard = ask(engine, job(ids, 2, logprobs=1, prompt_logprobs=True)).wait()
        logits = model.session(CAPACITY, chunk=128).forward(torch.tensor(ids)).double()
        wanted = logits - logits.logsumexp(1, keepdim=True)
        told = [one.logprob for one in heard.events[0].prompt_logprobs]
        assert told == wanted[torch.arange(len(ids) - 1), ids[1:]].tolist()
        assert heard.logprobs[0].logprob == float(wanted[-1, heard.tokens[0]])
    engine.close(finish=True)


class Odd:
    """Odd ids alone."""

    ended = False

    def mask(self) -> Tensor:
        return torch.arange(CONFIG.vocab_size) % 2 == 1

    def took(self, token: int) -> None:
        assert token % 2


@pytest.mark.parametrize("number", [1, 2])
def test_a_constraint_is_kept(model: HostModel, alone: list[list[int]], number: int) -> None:
    """Drawn on the device or on the host, told with the probability before the mask."""
    engine = serving(model, 2)
    other = ask(engine, job(PROMPTS[1], COUNT, Sampler(**SAMPLERS[1])))
    sampler = Sampler(**SAMPLERS[number])
    heard = ask(engine, job(PROMPTS[0], COUNT, sampler, constraint=Odd(), logprobs=128)).wait()
    assert len(heard.tokens) == COUNT and all(token % 2 for token in heard.tokens)
    for one in heard.logprobs:
        assert dict(one.top)[one.token] == one.logprob
        assert abs(sum(torch.tensor([value for _, value in one.top]).exp()) - 1) < 1e-5
    assert other.wait().tokens == alone[1]
    engine.close(finish=True)


def test_logits_that_are_not_finite_fail_their_job_alone(
    model: HostModel, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serving(model, 2)
    right = Batch.forward

    def broken(self: Batch, slots: list[int]) -> Tensor:
        logits = right(self, slots)
        if len(slots) == 2:
            logits[slots.index(1)] = torch.nan
        return logits

    monkeypatch.setattr(Batch, "forward", broken)
    good = ask(engine, job(PROMPTS[1], COUNT, Sampler(**SAMPLERS[1])))
    bad = ask(engine, job(PROMPTS[0], 50))
    assert bad.wait().finish is Finish.FAILED
    assert "NaN or infinity" in str(bad.events[-1].error)
    assert good.wait().tokens == alone[1]
    engine.close(finish=True)


def _rows_stay_where_they_were(patch: pytest.MonkeyPatch) -> None:
    right = Batch._place

    def wrong(self: Batch, slots: tuple[int, ...]) -> None:
        if len(slots) == 2 and len(self._placed) == 3:
            self._placed = ()
        right(self, slots)

    patch.setattr(Batch, "_place", wrong)


def _slots_mixed_up(patch: pytest.MonkeyPatch) -> None:
    right = Batch.begin

    def wrong(self: Batch, slot: int, position: int, sampler: Sampler) -> None:
        right(self, slot, position, sampler)
        self._slots.slot[slot] = 0

    patch.setattr(Batch, "begin", wrong)


@pytest.mark.parametrize(
    "plant",
    [_rows_stay_where_they_were, state_one_token_off, stale_ring_row, _slots_mixed_up],
    ids=lambda plant: plant.__name__.strip("_").replace("_", " "),
)
def test_a_planted_fault_is_noticed(
    model: HostModel, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch, plant: Any
) -> None:
    def told() -> list[Any]:
        engine = serving(model, 3)
        heard = all_of(engine, logprobs=2)
        heard[4].wait()
        heard.append(ask(engine, job(PROMPTS[2], 2, logprobs=2)))
        engine.close(finish=True)
        return [(one.tokens, one.logprobs) for one in heard]

    right = told()
    assert [tokens for tokens, _ in right[:5]] == alone
    plant(monkeypatch)
    assert told() != right


def test_chunks_that_are_too_short_are_refused(model: HostModel) -> None:
    with pytest.raises(RuntimeRefusal, match="chunks of a prompt have 32 tokens"):
        backend_of(model, 1, CAPACITY, chunk=32)
