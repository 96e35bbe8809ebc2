"""Sessions: what they refuse, and that a refusal changes nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.runtime.model import Model, load
from tests.runtime.in_memory import InMemoryWeights
from tests.runtime.small_models import TRANSFORMERS_TINY, random_ids, random_weights

CONFIG = dataclasses.replace(TRANSFORMERS_TINY, max_position_embeddings=300)
IDS = random_ids(CONFIG, 150)


@pytest.fixture(scope="module")
def model() -> Model:
    return load(InMemoryWeights(CONFIG, random_weights(CONFIG)))


def test_position_counts_tokens(model: Model) -> None:
    session = model.session(200)
    assert session.position == 0
    session.forward(IDS[:7])
    assert session.position == 7
    session.forward(IDS[7:])
    assert session.position == 150


def test_last_gives_the_last_row_of_all(model: Model) -> None:
    every, last = model.session(), model.session()
    expected = every.forward(IDS)
    found = last.forward(IDS, logits="last")
    assert found.shape == (1, CONFIG.vocab_size) and found.dtype == torch.float32
    assert torch.equal(found, expected[-1:])
    assert last.position == every.position


def test_reset_forgets(model: Model) -> None:
    session = model.session(300)
    expected = session.forward(IDS)
    session.reset()
    assert session.position == 0
    assert torch.equal(session.forward(IDS), expected)


def test_sessions_do_not_share_state(model: Model) -> None:
    first, second = model.session(), model.session()
    expected = model.session().forward(IDS)
    rows = []
    for token in torch.split(IDS, 50):
        rows.append(first.forward(token))
        second.forward(token.flip(0))
    assert torch.equal(torch.cat(rows), expected)


def test_the_caller_may_change_logits_in_place(model: Model) -> None:
    logits = model.session().forward(IDS[:3])
    assert not logits.requires_grad
    logits.div_(2.0)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([3, 99, 4]), "token id 99 is not in the vocabulary of 99 ids"),
        (torch.tensor([3, -1]), "token id -1 is not in the vocabulary of 99 ids"),
        (torch.zeros(0, dtype=torch.int64), "ids are empty"),
        (torch.zeros(151, dtype=torch.int64), "exceed its capacity of 250"),
        (torch.zeros((1, 4), dtype=torch.int64), r"shape \(1, 4\), expected int64 \[T\]"),
        (torch.zeros(4), "ids are torch.float32"),
    ],
)
def test_refused_ids_change_nothing(model: Model, ids: Tensor, message: str) -> None:
    session = model.session(250)
    session.forward(IDS[:100])
    with pytest.raises(RuntimeRefusal, match=message):
        session.forward(ids)
    assert session.position == 100
    untouched = model.session(250)
    untouched.forward(IDS[:100])
    assert torch.equal(session.forward(IDS[100:]), untouched.forward(IDS[100:]))


def test_capacity_is_exact(model: Model) -> None:
    session = model.session(150)
    session.forward(IDS)
    with pytest.raises(RuntimeRefusal, match="1 tokens after the 150 already in the session"):
        session.forward(IDS[:1])


def test_unknown_logits_mode(model: Model) -> None:
    mode: Any = "some"
    with pytest.raises(RuntimeRefusal, match="expected 'all' or 'last'"):
        model.session().forward(IDS[:1], logits=mode)


@pytest.mark.parametrize("length", [0, -4, 301])
def test_impossible_lengths(model: Model, length: int) -> None:
    with pytest.raises(RuntimeRefusal, match="expected 1 to 300"):
        model.session(length)


def test_generate_follows_the_largest_logit(model: Model) -> None:
    """Greedy decoding against one pass over what it produced; it stops at the end-of-turn id."""
    prompt = IDS[:9]
    produced = list(model.session().generate(prompt, max_new_tokens=20))
    assert 0 < len(produced) <= 20
    logits = model.session().forward(torch.cat((prompt, torch.tensor(produced))))
    best = logits[len(prompt) - 1 :].argmax(-1).tolist()
    assert produced == best[:-1]
    assert len(produced) == 20 or best[-1] in CONFIG.eos_token_ids


def test_an_interrupted_session_must_be_reset(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = model.session()
    expected = session.forward(IDS)
    session.reset()

    def interrupt(*_: object) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(model.layers[1]), "__call__", interrupt)
        session.forward(IDS[:10])
    with pytest.raises(RuntimeRefusal, match=r"call reset\(\)"):
        session.forward(IDS[10:])
    session.reset()
    assert torch.equal(session.forward(IDS), expected)
