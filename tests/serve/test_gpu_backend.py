"""The GPU's backend on emulated kernels: the same promises as the CPU's, against its sessions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.bench.random_weights import RandomWeights
from dsv4.formats.errors import RuntimeRefusal
from dsv4.runtime.gpu.batch import Batch
from dsv4.runtime.gpu.program import Program
from dsv4.runtime.snapshots import SlotMemory
from dsv4.runtime.text.generate import generate
from dsv4.runtime.text.sampling import Sampler
from dsv4.serve.engine import Options, ServeEngine
from dsv4.serve.gpu_backend import GpuBackend
from dsv4.serve.jobs import Finish
from dsv4.serve.remembering import Memory
from tests.runtime.gpu.test_rewind import FEW, Quick
from tests.runtime.gpu.test_session import CPU, HostModel
from tests.serve.harness import Heard, ask, job

CONFIG = dataclasses.replace(FEW, vocab_size=128)
CAPACITY = 192
CHUNK = 64
BLOCK = 16
IDS = torch.randint(0, 128, (300,), generator=torch.Generator().manual_seed(5)).tolist()
PROMPTS = [IDS[:9], IDS[:40], IDS[:100], [*IDS[:50], *IDS[120:160]], IDS[200:240]]
SAMPLERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 5},
    {"temperature": 1.0, "min_p": 0.05, "seed": 8},
    {"temperature": 1.2, "top_p": 0.8, "seed": 6},
    {"repetition_penalty": 1.3},
]
COUNT = 6


@pytest.fixture(scope="module", autouse=True)
def _no_graphs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "replay", Program.launch)
        yield


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
    return ServeEngine(backend, Options(queue=100, memory=Memory(**memory)))


def all_of(engine: ServeEngine, **more: Any) -> list[Heard]:
    return [
        ask(engine, job(ids, COUNT, Sampler(**sampler), **more))
        for ids, sampler in zip(PROMPTS, SAMPLERS, strict=True)
    ]


@pytest.mark.parametrize("slots", [1, 3, 5])
def test_rows_of_a_step_are_alone(model: HostModel, alone: list[list[int]], slots: int) -> None:
    engine = serving(model, slots)
    heard = all_of(engine)
    heard[2].wait()
    again = ask(engine, job(PROMPTS[3], COUNT, Sampler(**SAMPLERS[3])))
    engine.close(finish=True)
    assert [one.tokens for one in heard] == alone
    assert again.tokens == alone[3]


def test_more_slots_than_rows(model: HostModel, alone: list[list[int]]) -> None:
    """Two groups take turns, whose rows come and go."""
    engine = serving(model, 10)
    heard = [*all_of(engine), *all_of(engine)]
    engine.close(finish=True)
    assert [one.tokens for one in heard] == [*alone, *alone]
    assert engine.stats().steps < engine.stats().rows / 2


@pytest.mark.parametrize("reproducible", [False, True])
def test_what_is_remembered_gives_the_bytes_of_a_cold_run(
    model: HostModel, reproducible: bool
) -> None:
    """Rests of every length behind the block: 32 tokens and more are a chunk, whatever is known."""
    engine = serving(model, 2, reproducible=reproducible)
    cold = serving(model, 1)
    cold._scheduler.remembering.cache = None
    ask(engine, job(IDS[:120], 1)).wait()
    for count in (48, 79, 80, 81, 112, 127, 128):
        if not reproducible:  # so that no slot goes on where it is
            for start in (130, 140):
                ask(engine, job(IDS[start : start + 40], 1)).wait()
        wanted = ask(cold, job(IDS[:count], 3, logprobs=5)).wait()
        ask(cold, job(IDS[250:260], 1)).wait()
        found = ask(engine, job(IDS[:count], 3, logprobs=5)).wait()
        assert found.cached == (min(count, 120) - 32) // 16 * 16 or found.cached >= count - 48
        assert found.cached <= count - 32
        assert (found.tokens, found.logprobs) == (wanted.tokens, wanted.logprobs), count
    engine.close(finish=True)
    cold.close(finish=True)


def test_probabilities_of_a_prompt(model: HostModel) -> None:
    """In a chunk and in steps: those of a session's logits."""
    engine = serving(model, 2)
    for ids in (IDS[:100], IDS[:13]):
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


@pytest.mark.parametrize("number", range(len(SAMPLERS)))
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


def _state_one_token_off(patch: pytest.MonkeyPatch) -> None:
    right = SlotMemory.save_state
    patch.setattr(
        SlotMemory, "save_state", lambda self, position, state: right(self, position - 1, state)
    )


def _stale_ring_row(patch: pytest.MonkeyPatch) -> None:
    right = SlotMemory.load_state

    def wrong(self: SlotMemory, position: int, state: Tensor) -> None:
        ring = self._rings[0].rows
        before = ring[(position - 2) % len(ring)].clone()
        right(self, position, state)
        ring[(position - 2) % len(ring)] = before

    patch.setattr(SlotMemory, "load_state", wrong)


def _slots_mixed_up(patch: pytest.MonkeyPatch) -> None:
    right = Batch.begin

    def wrong(self: Batch, slot: int, position: int, sampler: Sampler) -> None:
        right(self, slot, position, sampler)
        self._slots.slot[slot] = 0

    patch.setattr(Batch, "begin", wrong)


@pytest.mark.parametrize(
    "plant",
    [_rows_stay_where_they_were, _state_one_token_off, _stale_ring_row, _slots_mixed_up],
    ids=lambda plant: plant.__name__.strip("_").replace("_", " "),
)
def test_a_planted_fault_is_noticed(
    model: HostModel, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch, plant: Any
) -> None:
    def told() -> list[Any]:
        engine = serving(model, 3)
        heard = all_of(engine, logprobs=2)
        heard[4].wait()
        heard += all_of(engine, logprobs=2)
        engine.close(finish=True)
        return [(one.tokens, one.logprobs) for one in heard]

    right = told()
    assert [tokens for tokens, _ in right[:5]] == alone
    plant(monkeypatch)
    assert told() != right


def test_chunks_that_are_too_short_are_refused(model: HostModel) -> None:
    with pytest.raises(RuntimeRefusal, match="chunks of a prompt have 32 tokens"):
        GpuBackend(model.engine(CAPACITY, slots=1, chunk=32))
