"""`dsv4 bench parity` on emulated kernels: what is right passes, what is planted does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dsv4.bench import parity_logits, parity_sessions, soak
from dsv4.bench.parity import Sizes, prove
from dsv4.bench.parity_weights import TellingWeights
from dsv4.bench.reference_state import take_over
from dsv4.formats.config import ModelConfig
from dsv4.kernels.case import Launch
from dsv4.runtime.gpu import attention_plan, plan
from dsv4.runtime.gpu.program import Program
from dsv4.runtime.gpu.session import GpuSession
from tests.runtime.gpu.emulator import Emulator
from tests.runtime.gpu.test_session import CPU, SMALL, HostModel

SIZES = Sizes(tokens=44, context=104, compared=24, text=20, soak=6)


@pytest.fixture(scope="module")
def weights() -> TellingWeights:
    return TellingWeights(SMALL, CPU)


@pytest.fixture(autouse=True)
def _no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Program, "replay", Program.launch)


def model_of(weights: TellingWeights) -> HostModel:
    return HostModel(weights, Emulator(SMALL), CPU)


def proofs(weights: TellingWeights, *parts: str) -> list[parity_logits.Proof]:
    return list(prove(model_of(weights), weights, parts, SIZES))


@pytest.mark.parametrize("part", ["logits", "long", "text"])
def test_the_emulated_kernels_pass(weights: TellingWeights, part: str) -> None:
    found = proofs(weights, part)
    assert len(found) > 1
    assert [one for one in found if not one.right] == []


def test_s(weights):
    for part in ("text","sessions","soak"):
        f=proofs(weights, part)
        for x in f: print(x)
