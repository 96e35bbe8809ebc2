"""What `bench decode` counts: rows choose about as chance would; what they chose is counted."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dsv4.bench import decode
from dsv4.bench.kernels import Machine
from dsv4.bench.random_weights import RandomWeights
from dsv4.runtime.gpu.program import Program
from dsv4.runtime.gpu.session import GpuSession
from tests.runtime.gpu.test_session import CPU, SMALL, HostModel
from tests.support.emulator import Emulator

MANY = dataclasses.replace(
    SMALL,
    num_hidden_layers=2,
    compress_ratios=(0, 4),
    n_routed_experts=64,
    num_experts_per_tok=4,
)


@pytest.fixture(scope="module")
def session() -> GpuSession:
    weights = RandomWeights(MANY, CPU)
    return HostModel(weights, Emulator(MANY), CPU).session(64)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are launched, not recorded; a measured run takes a second."""

    def once(runs: list[object]) -> float:
        return float(len(runs))

    monkeypatch.setattr(Program, "replay", Program.launch)
    monkeypatch.setattr(decode, "graph_seconds", once)


def test_rows_choose_about_as_differently_as_chance(session: GpuSession) -> None:
    session.programs_at(40, 8)
    distinct = [len(set(one.flatten().tolist())) for one in session.choices(8)]
    chance = MANY.n_routed_experts * (1 - (1 - 4 / 64) ** 8)
    assert all(0.8 * chance <= count <= 32 for count in distinct)


def test_a_measured_step_keeps_its_tokens(session: GpuSession) -> None:
    whole, _ = session.programs_at(40, 4)
    before = {name: session._inputs[name].clone() for name in ("ids", "position")}
    chosen = session.choices(4)
    whole.launch()
    assert all(torch.equal(session._inputs[name], value) for name, value in before.items())
    assert all(torch.equal(a, b) for a, b in zip(session.choices(4), chosen, strict=True))


def test_bytes_are_those_of_the_experts_that_were_chosen(session: GpuSession) -> None:
    layers = MANY.num_hidden_layers
    none, head = decode.step_bytes(session, 40, 1, [0] * layers)
    some, _ = decode.step_bytes(session, 40, 1, [3, 5])
    expert = 3 * MANY.hidden_size * MANY.moe_intermediate_size * 9 // 16
    assert some - none == 8 * expert
    assert head >= MANY.vocab_size * MANY.hidden_size * 9 // 16


def test_a_step_says_how_many_experts_it_read(session: GpuSession) -> None:
    machine = Machine("none", 1e9, 1e12)
    one, eight = decode.time_steps(session, 40, (1, 8), machine)
    assert one.experts == 4
    assert 16 < eight.experts <= 32
    assert one.nbytes < eight.nbytes
    bound = eight.layer_bound * MANY.num_hidden_layers * machine.bandwidth
    assert bound == pytest.approx(eight.nbytes - decode.step_bytes(session, 40, 8, [0] * 2)[1])
