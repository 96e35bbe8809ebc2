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

GENERATOR = torch.Generator().manual_seed(3)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> HostModel:
    monkeypatch.setattr(Program, "replay", Program.launch)
    monkeypatch.setattr(streaming, "CONTEXT", 64)
    monkeypatch.setattr(streaming, "COMPARED", (33, 2))
    monkeypatch.setattr(streaming, "WARM", 1)
    return HostModel(PlacedWeights(placed("alternating")), Emulator(SMALL), CPU)


def test_misses_are_those_of_the_measured_tokens(model: HostModel) -> None:
    session = streaming._session(model)
    seconds, misses = streaming.decode(session, 3, 5, streaming.Routes.of(model, "uniform", 0))
    cold = SMALL.num_hidden_layers * SMALL.num_experts_per_tok
    assert seconds > 0 and 0 <= misses <= cold
    memory = streaming._memory(model)
    decode, prompt = memory.counted()
    assert decode.sum() == (8 + 1 + 3) * cold and not prompt.any()


def test_routes_are_as_popular_as_was_asked_and_texts_differ(model: HostModel) -> None:
    """Drawn by the model's own routers; and the store's biases are back afterwards."""
    memory, session = streaming._memory(model), streaming._session(model)
    own = [
        layer.gate.bias.clone() for layer in model.operands.layers if layer.gate.bias is not None
    ]

    def chosen(text: str, number: int) -> np.ndarray:
        memory.counted()
        streaming.decode(session, 30, 5, streaming.Routes.of(model, text, number))
        return np.asarray(memory.counted()[0][SMALL.num_hash_layers :])

    even, skewed, other = chosen("uniform", 0), chosen("skewed", 0), chosen("skewed", 1)
    experts = SMALL.n_routed_experts
    assert streaming.effective(even) > 0.8 * experts
    assert streaming.effective(skewed) < 0.9 * streaming.effective(even)
    assert not np.array_equal(skewed, other)
    biases = [layer.gate.bias for layer in model.operands.layers if layer.gate.bias is not None]
    assert all(torch.equal(one, before) for one, before in zip(biases, own, strict=True))


def test_the_popularity_of_a_release_s_size() -> None:
    """The fractions of facts that were published: 150 of 256 in effect, 63 % by the first 64."""
    popular = torch.exp(streaming.DEVIATION * torch.randn(200, 256, generator=GENERATOR))
    shares = (popular / popular.sum(1, keepdim=True)).sort(descending=True).values
    assert streaming.effective(shares.numpy()) == pytest.approx(150, abs=6)
    assert float(shares[:, :64].sum(1).mean()) == pytest.approx(0.63, abs=0.02)
    assert float(shares[:, :128].sum(1).mean()) == pytest.approx(0.86, abs=0.02)


def test_effective_experts_of_known_shares() -> None:
    assert streaming.effective(np.ones((2, 16))) == pytest.approx(16)
    assert streaming.effective(np.eye(2, 8)) == pytest.approx(1)
