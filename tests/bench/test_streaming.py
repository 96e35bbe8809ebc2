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
    seconds, misses = streaming.decode(session, 3, 5, streaming.DrawnRoutes.of(model, "uniform", 0))
    cold = SMALL.num_hidden_layers * SMALL.num_experts_per_tok
    assert seconds > 0 and 0 < misses <= cold
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
        streaming.decode(session, 30, 5, streaming.DrawnRoutes.of(model, text, number))
        return np.asarray(memory.counted()[0][SMALL.num_hash_layers :])

    even, skewed, other = chosen("uniform", 0), chosen("skewed", 0), chosen("skewed", 1)
    experts = SMALL.n_routed_experts
    assert streaming.effective(even) > 0.8 * experts
    assert streaming.effective(skewed) < 0.9 * streaming.effective(even)
    assert not np.array_equal(skewed, other)
    biases = [layer.gate.bias for layer in model.operands.layers if layer.gate.bias is not None]
    assert all(torch.equal(one, before) for one, before in zip(biases, own, strict=True))


# Counted on the released model: share of the routes that the most popular take, of a layer; hits of
# a placement by the text itself, and the mean over eight other texts, by fraction placed.
SHARES = {64: 0.63, 128: 0.86, 192: 0.965}
OWN_HITS = {0.465: 0.842, 0.884: 0.9928}
OTHER_HITS = {0.465: 0.776, 0.6: 0.858, 0.8: 0.965, 0.884: 0.9894}


def test_popularity_is_that_of_the_released_model() -> None:
    layers, experts = 40, 256

    def counted(text: int, tokens: int) -> torch.Tensor:
        popular = torch.stack(
            [streaming.log_popularity(experts, layer, text) for layer in range(layers)]
        )
        noise = torch.rand((tokens, layers, experts), generator=GENERATOR).clamp_min(1e-30)
        chosen = (popular - noise.log().neg().log()).topk(6, -1).indices
        counts = torch.zeros(layers, experts)
        ones = torch.ones(layers, 6 * tokens)
        return counts.scatter_add_(1, chosen.permute(1, 0, 2).reshape(layers, -1), ones)

    def hits(placed_by: torch.Tensor, counts: torch.Tensor, fraction: float) -> float:
        hot = placed_by.flatten().topk(int(fraction * counts.numel())).indices
        return float(counts.flatten()[hot].sum() / counts.sum())

    own, other = counted(1, 1024), counted(0, 1024)
    assert streaming.effective(own.numpy()) == pytest.approx(150, abs=6)
    shares = (own / own.sum(1, keepdim=True)).sort(1, descending=True).values
    for first, share in SHARES.items():
        assert float(shares[:, :first].sum(1).mean()) == pytest.approx(share, abs=0.02)
    for fraction, share in OWN_HITS.items():
        assert hits(own, own, fraction) == pytest.approx(share, abs=0.02)
    for fraction, share in OTHER_HITS.items():
        assert hits(other, own, fraction) == pytest.approx(share, abs=0.03)
    even = torch.rand(layers, experts, generator=GENERATOR)
    assert hits(even, own, 0.884) < 0.95  # a placement that knows nothing is told apart


def test_effective_experts_of_known_shares() -> None:
    assert streaming.effective(np.ones((2, 16))) == pytest.approx(16)
    assert streaming.effective(np.eye(2, 8)) == pytest.approx(1)
