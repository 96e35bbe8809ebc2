"""`dsv4 bench parity` on emulated kernels: what is right passes, what is planted does not."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from benchmarks import parity_sessions, soak
from benchmarks.parity_logits import Proof, after_long_context, from_the_start
from benchmarks.parity_text import greedy_text
from benchmarks.parity_weights import TellingWeights
from dsv4.bench.logits import Distance, distance
from dsv4.formats.model.config import ModelConfig
from dsv4.runtime.gpu import engine
from dsv4.runtime.gpu.caches import LayerCaches, allocate_caches
from tests.runtime.gpu.test_session import CPU, SMALL, HostModel
from tests.support.emulator import Emulator


@pytest.fixture(scope="module")
def weights() -> TellingWeights:
    return TellingWeights(SMALL, CPU)


pytestmark = pytest.mark.usefixtures("no_graphs")


@pytest.fixture
def gpu(weights: TellingWeights) -> HostModel:
    return HostModel(weights, Emulator(SMALL), CPU)


def wrong(proofs: list[Proof]) -> list[str]:
    return [one.what for one in proofs if not one.right]


def test_a_distance_is_of_tokens_in_units_of_the_logits_deviation() -> None:
    wanted = torch.randn(300, 1000, generator=torch.Generator().manual_seed(1)) * 3
    found = wanted.clone()
    found[7] += 0.3
    one = distance(found, wanted)
    assert float(one.errors[7]) == pytest.approx(0.1, rel=0.01)
    assert float(one.errors.sum() - one.errors[7]) == 0
    assert str(one[:7]) == "0.0000 0.0000 0.0000 100.0%"


def test_what_is_allowed_follows_the_reference_in_bfloat16() -> None:
    same = torch.ones(4, dtype=torch.bool)
    rounded = Distance(torch.tensor([0.04, 0.05, 0.06, 0.2]), same)
    assert rounded.within(rounded)
    assert not Distance(torch.tensor([0.04, 0.07, 0.07, 0.2]), same).within(rounded)  # median
    assert not Distance(torch.tensor([0.04, 0.05, 0.06, 0.5]), same).within(rounded)  # worst
    assert not Distance(torch.tensor([0.04, 0.05, float("nan"), 0.2]), same).within(rounded)


def test_kernels_pass_and_a_kernel_that_reads_other_entries_does_not(
    weights: TellingWeights, gpu: HostModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wrong(list(from_the_start(gpu, weights, 41, (16,)))) == []
    monkeypatch.setattr(Emulator, "_indexer", _reversed_choice(Emulator._indexer))
    assert "logits of tokens 16 to 40" in wrong(list(from_the_start(gpu, weights, 41, (16,))))


def _reversed_choice(right: Any) -> Any:
    def choose(self: Emulator, given: dict[str, Any], buffers: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = right(self, given, buffers)
        if "blocks" in found:  # the oldest ones, whatever their scores
            blocks, count = found["blocks"], SMALL.index_topk
            first = torch.arange(count, dtype=blocks.dtype).expand_as(blocks)
            found["blocks"] = torch.where(blocks < 0, blocks, first)
        return found

    return choose


def test_references_go_on_from_the_kernels_caches(weights: TellingWeights, gpu: HostModel) -> None:
    found = list(after_long_context(gpu, weights, 43, 16))
    assert found[0].right
    faults = [float(one.found.split()[0]) for one in found[1:]]
    assert min(faults) > 0.05  # entries are read by both kinds of layer


def test_greedy_text(
    weights: TellingWeights, gpu: HostModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wrong(list(greedy_text(gpu, weights, 8, prompt=6))) == []
    right = Emulator._sampling

    def second_best(self: Emulator, given: dict[str, Any], buffers: dict[str, Any]) -> Any:
        likeliest = buffers["logits"].argmax(1)
        low = buffers["logits"].scatter(1, likeliest[:, None], float("-inf"))
        return right(self, given, buffers | {"logits": low - low.amax(1, keepdim=True) * 9})

    monkeypatch.setattr(Emulator, "_sampling", second_best)
    assert wrong(list(greedy_text(gpu, weights, 8, prompt=6)))


@pytest.mark.long
def test_sessions_that_share_a_cache_are_noticed(
    gpu: HostModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity_sessions, "PROMPTS", (1, 2))
    monkeypatch.setattr(parity_sessions, "CUT", 5)
    assert wrong(list(parity_sessions.sessions(gpu, 2))) == []
    right, shared = allocate_caches, dict[int, tuple[LayerCaches, ...]]()

    def one_for_all(
        config: ModelConfig, slots: int, capacity: int, rows: int, device: torch.device
    ) -> tuple[LayerCaches, ...]:
        made = right(config, slots, capacity, rows, device)
        return made if device.type == "meta" else shared.setdefault(capacity, made)

    monkeypatch.setattr(engine, "allocate_caches", one_for_all)
    found = wrong(list(parity_sessions.sessions(gpu, 2)))
    assert found == ["a session among two others, in turns"]


@pytest.mark.long
def test_a_soak_notices_what_does_not_repeat(
    gpu: HostModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("PROMPT", 8), ("NEW", 3), ("CAPACITY", (16, 40))):
        monkeypatch.setattr(soak, name, value)
    assert wrong(list(soak.soak(gpu, 4))) == []
    right, calls = Emulator._sampling, iter(range(1000))

    def drifting(self: Emulator, given: dict[str, Any], buffers: dict[str, Any]) -> Any:
        found = right(self, given, buffers)
        return found | {"token": (found["token"] + next(calls)) % SMALL.vocab_size}

    monkeypatch.setattr(Emulator, "_sampling", drifting)
    assert wrong(list(soak.soak(gpu, 4))) == ["4 of them again, in other sessions"]


def test_memory_that_grows_is_noticed() -> None:
    assert soak.flat("host memory", 100, 100 + soak.HOST_GROWTH, soak.HOST_GROWTH).right
    assert not soak.flat("host memory", 100, 101 + soak.HOST_GROWTH, soak.HOST_GROWTH).right


def test_jobs_are_of_all_kinds() -> None:
    rng = random.Random(1)
    jobs = [soak.Job.random(rng) for _ in range(200)]
    assert {job.temperature for job in jobs} == {0.0, 0.7, 1.3}
    assert len({(job.prompt, job.new) for job in jobs}) > 150
    assert 0 < sum(job.abandoned > 0 for job in jobs) < 50
