"""`dsv4 bench prompt`: chunks of every size are compared, and a wrong one is noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsv4.bench import prompt
from dsv4.bench.logits import distance, forward_whole, random_ids, reference
from dsv4.bench.random_weights import RandomWeights
from dsv4.kernels.core.contract import Buffers
from tests.runtime.gpu.test_session import CPU, SMALL, HostModel
from tests.support.emulator import Emulator


@pytest.fixture(scope="module")
def weights() -> RandomWeights:
    return RandomWeights(SMALL, CPU)


def lines(
    weights: RandomWeights, chunks: tuple[int, ...] = (40, 0), tokens: int = 40
) -> list[prompt.Line]:
    gpu, first = HostModel(weights, Emulator(SMALL), CPU), random_ids(SMALL.vocab_size, tokens, 1)
    exact = forward_whole(reference(weights, torch.float32), first)
    rounded = distance(forward_whole(reference(weights, torch.bfloat16), first), exact)
    return list(prompt._lines(gpu, first, first, exact, rounded, chunks))


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv4.runtime.gpu.program import Program

    monkeypatch.setattr(Program, "replay", Program.launch)
    monkeypatch.setattr(prompt, "COMPARED", 40)
    monkeypatch.setattr(prompt, "TURNS", 1)


def test_chunks_and_steps_are_right(weights: RandomWeights) -> None:
    found = lines(weights)
    assert [(one.chunk, one.tokens, one.right) for one in found] == [(40, 40, True), (0, 40, True)]


def test_a_wrong_product_of_a_chunk_is_noticed(
    weights: RandomWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Emulator._gemm

    def wrong(self: Emulator, given: dict[str, Any], buffers: Buffers) -> Buffers:
        return {"y": right(self, given, buffers)["y"].roll(1, 0)}

    monkeypatch.setattr(Emulator, "_gemm", wrong)
    assert [one.right for one in lines(weights)] == [False, True]


@pytest.mark.long
def test_a_chunk_of_another_size_gives_the_same_bytes(
    weights: RandomWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [one.right for one in lines(weights, (64, 32), 64)] == [True, True]
    right = Emulator._gemm

    def almost(self: Emulator, given: dict[str, Any], buffers: Buffers) -> Buffers:
        y = right(self, given, buffers)["y"]
        return {"y": y * 1.01 if len(y) == 32 else y}

    monkeypatch.setattr(Emulator, "_gemm", almost)
    assert [one.right for one in lines(weights, (64, 32), 64)] == [True, False]


def test_what_is_left_for_steps_is_not_held_against_chunks() -> None:
    found = [prompt._in_chunks(chunk, 96) for chunk in (96, 64, 48, 40, 0)]
    assert found == [True, True, True, False, False]
