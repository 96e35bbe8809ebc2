"""Wherever experts lie, the same bytes come out: placements of a model on emulated kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.bench.random_weights import RandomWeights
from dsv4.kernels.ops.experts import fetch_contract
from dsv4.runtime.gpu.expert_memory import ExpertMemory, PromptCopies
from dsv4.runtime.gpu.program import Program
from dsv4.runtime.gpu.session import GpuSession
from dsv4.runtime.gpu.weights import LayerRecords
from dsv4.runtime.load.placement import Placement, place
from dsv4.runtime.text.sampling import Sampler
from tests.runtime.gpu.test_session import CPU, IDS, SMALL, HostModel
from tests.support.emulator import Emulator

SHAPE = SMALL.num_hidden_layers, SMALL.n_routed_experts


class PlacedWeights(RandomWeights):
    """The same bytes, in two places."""

    def __init__(self, placement: Placement, *, counting: bool = False) -> None:
        super().__init__(SMALL, CPU)
        every = torch.stack([super(PlacedWeights, self).layer_records(n).records for n in range(4)])
        records = torch.full((placement.records, every.shape[2]), 0x5A, dtype=torch.uint8)
        hot = torch.from_numpy(placement.hot)
        records[: int(hot.sum())] = every[hot]
        host = every[~hot].contiguous()
        self.placed = ExpertMemory.make(
            placement, records, host, host.data_ptr(), counting=counting
        )

    @property
    def memory(self) -> Any:
        return self.placed

    def layer_records(self, layer: int) -> LayerRecords:
        own, found = self.placed, super().layer_records(layer)
        return dataclasses.replace(
            found,
            places=own.table[layer],
            prompt_places=own.prompt_table[layer],
            records=own.records,
        )


pytestmark = pytest.mark.usefixtures("no_graphs")


def session_of(weights: RandomWeights) -> GpuSession:
    return HostModel(weights, Emulator(SMALL), CPU).session(64, chunk=32)


def answers(session: GpuSession) -> list[Tensor]:
    """A prompt of a chunk and some steps; tokens one by one; another chunk."""
    found = [session.forward(IDS)]
    ids, sampler = IDS[:1], Sampler()
    for _ in range(3):
        ids = session.append_and_draw(ids, sampler)
        found.append(ids.clone())
    session.reset()
    found.append(session.forward(IDS.flip(0)))
    return found


@pytest.fixture(scope="module")
def wanted() -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "replay", Program.launch)
        return answers(session_of(RandomWeights(SMALL, CPU)))


def placed(kind: str) -> Placement:
    hot = np.zeros(SHAPE, bool)
    match kind:
        case "none hot":
            pass
        case "alternating":
            hot[:, ::2] = True
        case "some layers":
            hot[[0, 2]] = True
        case _:
            hot[:] = np.random.default_rng(5).random(SHAPE) < 0.6
    cold = int((~hot).sum(1).max())
    return Placement(hot, 2 * cold)


KINDS = ("none hot", "alternating", "some layers", "random")


@pytest.mark.parametrize("kind", KINDS)
def test_every_placement_gives_the_same_bytes(kind: str, wanted: list[Tensor]) -> None:
    weights = PlacedWeights(placed(kind))
    found = answers(session_of(weights))
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert int(weights.placed.fetched.sum()) > 0


def test_where_all_are_on_the_gpu_nothing_is_fetched_but_counted(wanted: list[Tensor]) -> None:
    weights = PlacedWeights(Placement.resident(*SHAPE), counting=True)
    session = session_of(weights)
    found = answers(session)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert int(weights.placed.fetched.sum()) == 0
    decode, prompt = weights.placed.counted()
    # Two prompts of 41: a chunk of 32, a step of 8 and one of 1; three steps of one token.
    assert prompt.sum(1).tolist() == [64 * SMALL.num_experts_per_tok] * 4
    assert decode.sum(1).tolist() == [(9 + 9 + 3) * SMALL.num_experts_per_tok] * 4
    assert not weights.placed.counted()[0].any(), "counts begin again"


def test_what_is_cached_is_not_fetched_again() -> None:
    weights = PlacedWeights(placed("none hot"))
    session = session_of(weights)
    session.forward(IDS[:1])
    before = int(weights.placed.fetched.sum())
    session.reset()
    session.forward(IDS[:1])
    assert before > 0 and int(weights.placed.fetched.sum()) == before


FAULTS = ("two records swapped", "an absent expert", "a chunk does not wait", "nothing is fetched")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_changes_the_bytes(
    fault: str, wanted: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = PlacedWeights(placed("alternating"))
    own = weights.placed
    if fault == "two records swapped":
        own.host[[0, 1]] = own.host[[1, 0]].clone()
    elif fault == "an absent expert":
        own.table[1, 1], own.hot_table[1, 1] = 0, 0
    elif fault == "a chunk does not wait":
        monkeypatch.setattr(PromptCopies, "leave", lambda self, layer: None)
    else:
        right = fetch_contract.run

        def without(experts: int, given: dict[str, Any]) -> dict[str, Any]:
            scratch = torch.zeros_like(given["records"])
            return right(experts, given | {"records": scratch}) | {"records": given["records"]}

        monkeypatch.setattr(fetch_contract, "run", without)
    found = answers(session_of(weights))
    assert not all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_a_planned_placement_runs(wanted: list[Tensor]) -> None:
    record = RandomWeights(SMALL, CPU).layer_records(0).records.shape[1]
    counts = np.random.default_rng(1).random(SHAPE)
    found = place(counts, SHAPE, record, 25 * record)
    assert found.cold > 0 and found.records <= 25
    assert all(
        torch.equal(*pair)
        for pair in zip(answers(session_of(PlacedWeights(found))), wanted, strict=True)
    )
