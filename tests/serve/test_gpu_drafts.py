"""Drafts in the GPU's backend, on emulated kernels: a slot has several rows of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from dsv4.bench.random_weights import RandomWeights
from dsv4.runtime.gpu.batch import Batch
from dsv4.runtime.text.drafting import Wish
from dsv4.runtime.text.generate import generate
from dsv4.runtime.text.sampling import Sampler
from dsv4.serve import backend, drafts, gpu_backend
from dsv4.serve.engine import Options, ServeEngine
from dsv4.serve.gpu_backend import GpuBackend
from dsv4.serve.scheduler import Sharing
from tests.runtime.gpu.test_rewind import Quick
from tests.runtime.gpu.test_session import CPU, HostModel
from tests.serve.harness import Heard, ask, job
from tests.serve.test_drafts import Knowing
from tests.serve.test_gpu_backend import BLOCK, CAPACITY, CHUNK, CONFIG, PROMPTS, SAMPLERS

COUNT = 12


pytestmark = pytest.mark.usefixtures("no_graphs")


@pytest.fixture(scope="module")
def model() -> HostModel:
    return HostModel(RandomWeights(CONFIG, CPU), Quick(CONFIG), CPU)


@pytest.fixture(scope="module")
def alone(model: HostModel) -> list[list[int]]:
    """What sessions of their own say, without drafts."""
    return [
        list(generate(model.session(CAPACITY, chunk=128), ids, COUNT, Sampler(**sampler)))
        for ids, sampler in zip(PROMPTS, SAMPLERS, strict=True)
    ]


Serve = Callable[..., tuple[list[list[int]], ServeEngine]]


@pytest.fixture
def serve(model: HostModel, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> Serve:
    """What all are told by a server of so many slots, and another turn of one of them."""
    wholes = [ids + said for ids, said in zip(PROMPTS, alone, strict=True)]
    monkeypatch.setattr(drafts, "PromptLookup", lambda: Knowing(wholes, 0.8))

    def run(draft: Wish, slots: int) -> tuple[list[list[int]], ServeEngine]:
        made = GpuBackend(model.engine(CAPACITY, slots=slots, chunk=CHUNK), block=BLOCK)
        engine = ServeEngine(made, Options(100, sharing=Sharing(share=0.0), draft=draft))
        heard: list[Heard] = [
            ask(engine, job(ids, COUNT, Sampler(**sampler), logprobs=1 if number == 2 else None))
            for number, (ids, sampler) in enumerate(zip(PROMPTS, SAMPLERS, strict=True))
        ]
        following = [*PROMPTS[1], *heard[1].wait().tokens, 7, 8, 9]
        heard.append(ask(engine, job(following, 3)))
        engine.close(finish=True)
        for slot in engine._scheduler.slots:
            assert slot.position == made._positions[slot.number]
        return [one.tokens for one in heard], engine

    return run


@pytest.mark.parametrize(("draft", "slots"), [(7, 1), (2, 3)])
def test_alone_is_as_among_others(
    serve: Serve, alone: list[list[int]], draft: Wish, slots: int
) -> None:
    """Drafted for, logprobs told, drawn on the host."""
    told, engine = serve(draft, slots)
    assert told[:5] == alone
    found = engine.stats()
    assert found.draft_tokens > found.right_drafts > 0


def test_the_next_turn_goes_on_behind_accepted_drafts(serve: Serve) -> None:
    """In the slot, as behind the same answer without drafts."""
    told, plain = serve(3, 5)[0], serve("off", 5)[0]
    assert len(told[5]) == 3 and told == plain


@pytest.mark.long
@pytest.mark.parametrize("slots", range(1, 8))
def test_any_number_of_slots(serve: Serve, alone: list[list[int]], slots: int) -> None:
    for draft in ("auto", 1, 4, 6):
        assert serve(draft, slots)[0][:5] == alone


def _a_wrong_row_is_put_back(patch: pytest.MonkeyPatch) -> None:
    """The first of a slot, where a later one counts."""
    right = Batch.keep

    def wrong(self: Batch, rows: Sequence[int]) -> None:
        right(self, [self._placed.index(self._placed[row]) for row in rows])

    patch.setattr(Batch, "keep", wrong)


def _counter_off_by_one(patch: pytest.MonkeyPatch) -> None:
    right = Batch.keep

    def wrong(self: Batch, rows: Sequence[int]) -> None:
        self._row_parameters.counter[list(rows)] += 1
        right(self, rows)

    patch.setattr(Batch, "keep", wrong)


def _rows_share_a_draw(patch: pytest.MonkeyPatch) -> None:
    """All rows of a slot are drawn with the number of its first."""
    right = Batch._place_drafts

    def wrong(self: Batch, slots: Sequence[int], some: Sequence[Sequence[int]]) -> None:
        right(self, slots, some)
        first = [self._placed.index(slot) for slot in self._placed]
        counter = self._row_parameters.counter
        counter[: len(first)] = counter[torch.tensor(first)]

    patch.setattr(Batch, "_place_drafts", wrong)


def _one_too_many_is_accepted(patch: pytest.MonkeyPatch) -> None:
    right = backend.right_drafts
    patch.setattr(
        gpu_backend, "right_drafts", lambda some, drawn: min(right(some, drawn) + 1, len(some))
    )


@pytest.mark.parametrize(
    "plant",
    [
        _a_wrong_row_is_put_back,
        _counter_off_by_one,
        _rows_share_a_draw,
        _one_too_many_is_accepted,
    ],
    ids=lambda plant: plant.__name__.strip("_").replace("_", " "),
)
def test_a_planted_fault_is_noticed(
    serve: Serve, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch, plant: Any
) -> None:
    plant(monkeypatch)
    assert serve(3, 2)[0][:5] != alone
