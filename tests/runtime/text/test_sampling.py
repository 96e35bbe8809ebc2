"""Sampling against torch's softmax, and the nucleus against transformers' warper."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from dsv4.formats.errors import RuntimeRefusal
from dsv4.runtime.text.sampling import INVALID_TOKEN, Sampler

DRAWS = 20_000


def total_variation(draws: Tensor, expected: Tensor) -> float:
    """Half the L1 distance of the draws' frequencies from the expected probabilities."""
    counts = torch.bincount(draws, minlength=len(expected)).double()
    return 0.5 * float((counts / len(draws) - expected).abs().sum())


def variation_bound(categories: int, draws: int) -> float:
    """What the total variation of true draws exceeds with probability below 1e-9.

    E[TV] <= sqrt((k - 1) / n) / 2 (Jensen on each category's variance, then Cauchy-Schwarz);
    one draw moves TV by at most 1 / n, so McDiarmid adds sqrt(ln(1e9) / (2 n)).
    """
    return 0.5 * math.sqrt((categories - 1) / draws) + math.sqrt(math.log(1e9) / (2 * draws))


def some_logits(vocab: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


def draw_many(sampler: Sampler, logits: Tensor, draws: int = DRAWS) -> Tensor:
    return sampler(logits.expand(draws, -1))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = temperature * some_logits(50)
    draws = draw_many(Sampler(temperature, seed=1), logits)
    expected = (logits.double() / temperature).softmax(-1)
    bound = variation_bound(50, DRAWS)
    assert total_variation(draws, expected) < bound
    # The bound is tight enough to tell a temperature that is 20 % off.
    assert total_variation(draws, (logits.double() / (1.2 * temperature)).softmax(-1)) > bound


def test_draws_follow_the_nucleus() -> None:
    logits = some_logits(50)
    draws = draw_many(Sampler(0.8, 0.7, seed=2), logits)
    warped = TopPLogitsWarper(0.7)(torch.empty(1, 0), logits.double()[None] / 0.8)
    expected = warped[0].softmax(-1)
    assert set(draws.tolist()) == set(expected.nonzero().flatten().tolist())
    assert total_variation(draws, expected) < variation_bound(50, DRAWS)


def test_successive_calls_are_independent_draws() -> None:
    sampler, logits = Sampler(1.0, seed=3), some_logits(8)
    pairs = torch.stack([sampler(logits) for _ in range(1501)])
    joint = pairs[:-1] * 8 + pairs[1:]
    p = logits.double().softmax(-1)
    # Overlapping pairs: a draw is in two of them, which doubles its weight in the bound.
    assert total_variation(joint, torch.outer(p, p).flatten()) < 2 * variation_bound(64, 1500)


def test_top_k_and_top_p_keep_what_transformers_keeps() -> None:
    logits = some_logits(50)
    draws = draw_many(Sampler(1.0, 0.9, seed=2, top_k=9), logits)
    warped = TopKLogitsWarper(9)(torch.empty(1, 0), logits.double()[None])
    warped = TopPLogitsWarper(0.9)(torch.empty(1, 0), warped)
    expected = warped[0].softmax(-1)
    assert 1 < int((expected > 0).sum()) < 9, "both leave something out"
    assert set(draws.tolist()) == set(expected.nonzero().flatten().tolist())
    assert total_variation(draws, expected) < variation_bound(50, DRAWS)


def test_a_draw_depends_on_its_number_alone() -> None:
    logits = some_logits(1000)
    together, one_by_one = Sampler(1.0, 0.9, seed=4), Sampler(1.0, 0.9, seed=4)
    batch = draw_many(together, logits, 20)
    assert batch.tolist() == [int(one_by_one(logits)) for _ in range(20)]
    assert together.drawn == one_by_one.drawn == 20


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-5.0, -6.0, -1.0, -1.0]])
    assert Sampler(0.0)(logits).tolist() == [1, 0, 2]
    torch.manual_seed(0)
    wide = torch.randint(0, 3, (64, 5000)).float()
    first = [row.index(max(row)) for row in wide.tolist()]
    assert Sampler(0.0)(wide).tolist() == first


def test_a_tiny_temperature_is_greedy_without_overflow() -> None:
    logits = 1e4 * some_logits(100)
    for temperature in (1e-3, 1e-30, 5e-324):
        assert Sampler(temperature, 0.9, seed=0)(logits) == logits.argmax()


def test_equal_seeds_draw_alike_and_different_ones_do_not() -> None:
    logits = some_logits(1000)
    first, again, other = (draw_many(Sampler(1.0, seed=s), logits, 100) for s in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert Sampler(1.0).seed != Sampler(1.0).seed
    unseeded = Sampler(1.0)
    replayed = Sampler(1.0, seed=unseeded.seed)
    assert torch.equal(draw_many(unseeded, logits, 100), draw_many(replayed, logits, 100))


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(5)
    torch.manual_seed(11)
    sampler = Sampler(1.0, 0.9)
    draw_many(sampler, some_logits(100), 10)
    assert torch.equal(torch.rand(5), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_beyond_the_tokenizer_are_never_drawn(temperature: float) -> None:
    logits = some_logits(100)
    logits[60:] += 50
    draws = draw_many(Sampler(temperature, 0.9, seed=0, allowed=60), logits, 500)
    assert int(draws.max()) < 60
    assert int(draw_many(Sampler(temperature, 0.9, seed=0), logits, 500).min()) >= 60
    assert int(Sampler(temperature, seed=0, allowed=1000)(logits)) >= 60, "wider than the head"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_no_token(temperature: float, value: float) -> None:
    logits = some_logits(100).repeat(3, 1)
    logits[1, 30] = value
    drawn = Sampler(temperature, 0.9, seed=0)(logits).tolist()
    assert drawn[1] == INVALID_TOKEN
    assert drawn[0] != INVALID_TOKEN and drawn[2] != INVALID_TOKEN


def test_masked_logits_are_never_drawn() -> None:
    logits = some_logits(20)
    logits[::2] = -math.inf
    draws = draw_many(Sampler(5.0, seed=0), logits, 2000)
    assert set(draws.tolist()) == set(range(1, 20, 2))


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"temperature": 1e39},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": -1.0},
        {"top_p": math.nan},
        {"seed": -1},
        {"seed": 1 << 63},
        {"allowed": 0},
        {"top_k": 0},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf},
    ],
)
def test_bad_values_are_refused_by_name(bad: dict[str, float]) -> None:
    (name,) = bad
    with pytest.raises(RuntimeRefusal, match=f"^{name} is "):
        Sampler(**bad)  # type: ignore[arg-type]  # one dict for parameters of two types
