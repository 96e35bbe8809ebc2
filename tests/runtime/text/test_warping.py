"""Biases, penalties, top-k, top-p and min-p against transformers' processors, in their order."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dsv4.formats.model.releases import FLASH
from dsv4.formats.model.settings import GenerationSettings
from dsv4.runtime.text.generate import generate
from dsv4.runtime.text.sampling import INVALID_TOKEN, Sampler
from dsv4.runtime.text.warping import Context, Penalties, biased, keep
from tests.runtime.text.test_sampling import draw_many, total_variation, variation_bound
from tests.runtime.text.text_fixtures import FakeSession

VOCAB = 60
NOTHING = torch.empty(1, 0, dtype=torch.int64)

# Drawn before there was anything but temperature and top-p, from `random_logits(11, 1)`.
BEFORE = [17, 25, 1, 10, 59, 10, 10, 10, 47, 10, 59, 28]


GREEDY = GenerationSettings((1,), do_sample=False)


def random_logits(seed: int, rows: int = 4) -> Tensor:
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def sampler_of(how: dict[str, float], seed: int = 0) -> Sampler:
    return Sampler(
        how.get("temperature", 1.0),
        how.get("top_p", 1.0),
        seed=seed,
        top_k=int(how.get("top_k", 0)) or None,
        min_p=how.get("min_p", 0.0),
        repetition_penalty=how.get("repetition_penalty", 1.0),
    )


def warped(logits: Tensor, ids: Tensor, how: dict[str, float]) -> Tensor:
    """What transformers' `generate` would draw from, in float64. Absent settings are neutral."""
    processors = LogitsProcessorList()
    if how.get("repetition_penalty", 1.0) != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(how["repetition_penalty"]))
    processors.append(TemperatureLogitsWarper(how.get("temperature", 1.0)))
    if how.get("top_k"):
        processors.append(TopKLogitsWarper(int(how["top_k"])))
    if how.get("top_p", 1.0) < 1:
        processors.append(TopPLogitsWarper(how["top_p"]))
    if how.get("min_p"):
        processors.append(MinPLogitsWarper(how["min_p"]))
    result: Tensor = processors(ids.expand(len(logits), -1), logits.double())
    return result


def kept(logits: Tensor, how: dict[str, float]) -> Tensor:
    parameters = sampler_of(how).parameters(len(logits), logits.device)
    return keep(logits, parameters, how.get("min_p", 0.0)).isfinite()


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_what_is_left_is_what_transformers_leaves(temperature: float) -> None:
    cut = 0
    choices = itertools.product((0, 1, 9, 60, 500), (1.0, 0.9, 0.35, 1e-6), (0.0, 0.02, 0.3, 1.0))
    for number, (top_k, top_p, min_p) in enumerate(choices):
        logits = random_logits(number)
        how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        expected = warped(logits, NOTHING, how).isfinite()
        assert torch.equal(kept(logits, how), expected), how
        cut += int((~expected).sum())
    assert cut > 1000, "something was cut"


def test_the_order_matters_and_is_transformers() -> None:
    """Top-p of all tokens, or after min-p, would leave other ones."""
    logits = torch.tensor([[0.4, 0.3, 0.1, 0.1, 0.05, 0.05]]).log()
    assert int(kept(logits, {"top_p": 0.55}).sum()) == 2
    assert int(kept(logits, {"top_k": 2, "top_p": 0.55}).sum()) == 1
    filtered = logits.masked_fill(logits < math.log(0.2), -math.inf)
    assert int(kept(filtered, {"top_p": 0.55}).sum()) == 1
    assert int(kept(logits, {"top_p": 0.55, "min_p": 0.5}).sum()) == 2


def test_equal_logits_are_cut_in_the_order_of_ids() -> None:
    """transformers keeps all that equal the k-th; here there are k, the lowest ids of those."""
    rng = random.Random(3)
    for seed in range(60):
        logits = random_logits(seed, rows=1).round()
        top_k = rng.randrange(1, VOCAB)
        theirs = warped(logits, NOTHING, {"top_k": top_k}).isfinite()
        ours = kept(logits, {"top_k": top_k})
        assert int(ours.sum()) == top_k and bool((theirs | ~ours).all())
        last = logits[ours].min()
        chosen = ours[0][(logits[0] == last).nonzero()[:, 0]].tolist()
        assert chosen == sorted(chosen, reverse=True)
        assert torch.equal(ours & (logits != last), theirs & (logits != last))
    equal = torch.zeros(1, VOCAB)
    assert kept(equal, {"min_p": 1.0}).all(), "as likely as the likeliest"
    assert kept(equal, {"top_p": 0.5}).sum() == VOCAB // 2


@pytest.mark.parametrize(
    "how",
    [
        {"top_k": 5, "top_p": 0.8},
        {"min_p": 0.1},
        {"min_p": 0.05, "top_p": 0.9, "top_k": 12, "temperature": 0.7},
        {"repetition_penalty": 1.5, "top_p": 0.9},
    ],
)
def test_draws_follow_what_transformers_would_draw_from(how: dict[str, float]) -> None:
    logits = random_logits(5, rows=1)[0]
    context = [3, 7, 7, int(logits.argmax())]
    expected = warped(logits[None], torch.tensor([context]), how)[0].softmax(-1)
    sampler = sampler_of(how, seed=2)
    sampler.begin(context)
    draws = draw_many(sampler, logits)
    assert set(draws.tolist()) == set(expected.nonzero().flatten().tolist())
    assert total_variation(draws, expected) < variation_bound(VOCAB, len(draws))


@pytest.mark.parametrize("penalty", [1.2, 0.5, 3.0])
def test_the_repetition_penalty_is_transformers_to_the_bit(penalty: float) -> None:
    logits = random_logits(1, rows=1)
    logits[0, 5], logits[0, 6], logits[0, 7] = 0.0, -0.0, -math.inf
    ids = [5, 6, 7, 8, 8, 9, VOCAB + 3]  # each counts once, one beyond the head never
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits.clone())
    found = Context(ids).penalised(logits, Penalties(penalty))
    assert torch.equal(found, expected) and not torch.equal(found, logits)


BIAS = {3: 2.5, 8: -4.0, 9: 0.25, 40: 100.0, 41: -99.5}


def test_a_bias_is_transformers_to_the_bit() -> None:
    logits = random_logits(4)
    logits[0, 3], logits[1, 8] = -math.inf, 0.0
    theirs = SequenceBiasLogitsProcessor([[[token], value] for token, value in BIAS.items()])
    expected = theirs(torch.zeros((4, 1), dtype=torch.int64), logits.clone())
    found = biased(logits, BIAS | {VOCAB + 2: 50.0})
    assert torch.equal(found, expected) and not torch.equal(found, logits)
    greedy = Sampler(bias=BIAS)(logits)
    assert torch.equal(greedy, expected.argmax(-1)) and greedy.tolist() == [40] * 4


def test_draws_follow_the_bias_before_all_else() -> None:
    """Then the penalty, as in transformers: it divides or multiplies what the bias made."""
    logits, bias = random_logits(5, rows=1)[0], {3: 2.5, 7: -4.0, 9: 3.25}
    more = torch.zeros(VOCAB).index_add(0, torch.tensor(list(bias)), torch.tensor([2.5, -4, 3.25]))
    how = {"repetition_penalty": 1.5, "top_p": 0.9}
    expected = warped((logits + more)[None], torch.tensor([[3, 7]]), how)[0].softmax(-1)
    sampler = Sampler(1.0, 0.9, seed=2, repetition_penalty=1.5, bias=bias)
    sampler.begin([3, 7])
    draws = draw_many(sampler, logits)
    assert set(draws.tolist()) == set(expected.nonzero().flatten().tolist())
    assert total_variation(draws, expected) < variation_bound(VOCAB, len(draws))


def test_the_answer_counts_for_the_other_penalties_and_the_prompt_does_not() -> None:
    """OpenAI's formula: a logit loses frequency * count + presence * (count > 0)."""
    logits, context = random_logits(2), Context([1, 2])
    for token in (4, 5, 4, 4):
        context.add(token)
    counts = torch.zeros(VOCAB).scatter_add(0, torch.tensor([4, 5, 4, 4]), torch.ones(4))
    expected = logits - counts * 0.25 - (counts > 0) * 0.5
    found = context.penalised(logits, Penalties(presence=0.5, frequency=0.25))
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_huge_penalty_leaves_finite_logits() -> None:
    logits = torch.tensor([[1e30, -1e30, 1.0]])
    for penalties in (Penalties(1e-20), Penalties(1e20), Penalties(frequency=3e38)):
        context = Context([0, 1])
        context.add(0)
        context.add(0)
        assert context.penalised(logits, penalties).isfinite().all()


def test_top_k_of_one_is_greedy_whatever_else() -> None:
    for seed in range(40):
        logits = random_logits(seed, rows=8)
        logits = logits.round() if seed % 2 else logits
        greedy = Sampler()(logits)
        for more in ({}, {"min_p": 0.5}, {"top_p": 0.4}):
            sampler = sampler_of({"temperature": 1.3, "top_k": 1, **more}, seed)
            assert torch.equal(sampler(logits), greedy)


def test_neutral_settings_draw_what_was_always_drawn() -> None:
    logits = random_logits(11, rows=1)[0]
    assert draw_many(Sampler(0.9, 0.95, seed=7), logits, 12).tolist() == BEFORE
    neutral = sampler_of({"temperature": 0.9, "top_p": 0.95}, seed=7)
    assert draw_many(neutral, logits, 12).tolist() == BEFORE
    settings = GenerationSettings((1,), temperature=0.9, top_p=0.95)
    assert draw_many(Sampler.from_settings(settings, seed=7), logits, 12).tolist() == BEFORE


def test_rows_that_are_no_distribution_are_no_token() -> None:
    logits = random_logits(4, rows=5)
    logits[1, 3], logits[2, 0] = math.nan, math.inf
    logits[3] = -math.inf
    drawn = Sampler(1.0, 0.9, seed=1, top_k=5, min_p=0.1, repetition_penalty=1.1)(logits).tolist()
    assert [token == INVALID_TOKEN for token in drawn] == [False, True, True, True, False]


def test_padding_of_the_head_takes_no_place_among_the_top() -> None:
    logits = random_logits(6, rows=1)
    logits[:, 40:] = 30
    sampler = Sampler(1.0, 0.9, seed=1, top_k=3, min_p=0.01, allowed=40)
    top = set(logits[0, :40].topk(3).indices.tolist())
    drawn = set(draw_many(sampler, logits[0], 300).tolist())
    assert drawn <= top and len(drawn) > 1


class Ranked(FakeSession):
    """A model that always likes token 0 best, then 1, and so on."""

    def forward(self, ids: Tensor, logits: Literal["all", "last"] = "all") -> Tensor:
        self.consumed += ids.tolist()
        return torch.arange(16.0, 0, -1)[None]


def test_generate_tells_prompt_history_and_answer() -> None:
    def said(history: list[int], **penalty: Any) -> list[int]:
        session, sampler = Ranked(lambda ids: 0), Sampler.from_settings(GREEDY, **penalty)
        return list(generate(session, [1], 4, sampler, history=history))

    assert said([]) == [0, 0, 0, 0]
    assert said([], repetition_penalty=100.0) == [0, 2, 3, 4], "1 is in the prompt"
    assert said([2, 3], repetition_penalty=100.0) == [0, 4, 5, 6]
    assert said([2, 3], presence_penalty=50.0) == [0, 1, 2, 3], "the answer alone"
    assert said([], frequency_penalty=1.5) == [0, 1, 0, 2]


def test_settings_decide_unless_something_is_given() -> None:
    raw = b'{"do_sample": true, "temperature": 0.5, "top_k": 7, "min_p": 0.2, "top_p": 0.9}'
    settings = GenerationSettings.from_json(raw, FLASH)
    own = Sampler.from_settings(settings)
    assert (own.temperature, own.top_k, own.min_p, own.top_p) == (0.5, 7, 0.2, 0.9)
    given = Sampler.from_settings(settings, temperature=0.0, top_k=0, min_p=0.0, top_p=1.0)
    assert (given.temperature, given.top_k, given.min_p, given.top_p) == (0.0, None, 0.0, 1.0)
    zero = GenerationSettings.from_json(b'{"do_sample": true, "top_p": 0}', FLASH)
    logits = random_logits(8)
    assert torch.equal(Sampler.from_settings(zero, seed=3)(logits), logits.argmax(-1))


def test_the_reason_to_draw_on_the_host_names_what_the_kernel_lacks() -> None:
    for none in (Sampler(), Sampler(1.0, 0.9), Sampler(1.0, top_k=4), Sampler(0.0, 0.9, top_k=4)):
        assert none.host_reason() is None
    assert "top-k together with top-p" in str(Sampler(1.0, 0.9, top_k=4).host_reason())
    assert "min-p" in str(Sampler(1.0, min_p=0.1).host_reason())
    assert "penalty" in str(Sampler(repetition_penalty=1.1).host_reason())
    assert "a bias of tokens" in str(Sampler(bias={4: 0.5}).host_reason())
