"""What `bench decode STORE` counts and how it skews routers, on emulated kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsv4.bench import streaming
from dsv4.runtime.gpu.program import Program
from tests.runtime.gpu.test_expert_memory import PlacedWeights, placed
from tests.runtime.gpu.test_session import CPU, SMALL, HostModel
from tests.support.emulator import Emulator


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> HostModel:
    monkeypatch.setattr(Program, "replay", Program.launch)
    monkeypatch.setattr(streaming, "CONTEXT", 64)
    monkeypatch.setattr(streaming, "COMPARED", (33, 2))
    monkeypatch.setattr(streaming, "WARM", 1)
    return HostModel(PlacedWeights(placed("alternating")), Emulator(SMALL), CPU)


def test_misses_are_those_of_the_measured_tokens(model: HostModel) -> None:
    session = streaming._session(model)
    seconds, misses = streaming.decode(session, 3, 5)
    cold = SMALL.num_hidden_layers * SMALL.num_experts_per_tok
    assert seconds > 0 and 0 <= misses <= cold
    memory = streaming._memory(model)
    decode, prompt = memory.counted()
    assert decode.sum() == (8 + 1 + 3) * cold and not prompt.any()


def test_skewed_routers_choose_fewer_experts_and_texts_differ(model: HostModel) -> None:
    memory = streaming._memory(model)

    def chosen(deviation: float, text: int) -> np.ndarray:
        streaming.skew_routers(model, deviation, text)
        memory.counted()
        session = streaming._session(model)
        session.forward(torch.arange(33) * 7 % SMALL.vocab_size)
        decode, prompt = memory.counted()
        return np.asarray((decode + prompt)[SMALL.num_hash_layers :])

    even, skewed, other = chosen(0.0, 0), chosen(0.3, 0), chosen(0.3, 1)
    assert streaming.effective(skewed) < 0.85 * streaming.effective(even)
    assert not np.array_equal(skewed, other)


def test_effective_experts_of_known_shares() -> None:
    assert streaming.effective(np.ones((2, 16))) == pytest.approx(16)
    assert streaming.effective(np.eye(2, 8)) == pytest.approx(1)
