"""`rewind` leaves a session as if tokens had never been fed: its bytes are those of a new one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.runtime import session as sessions
from dsv4.runtime.cache import SLACK
from dsv4.runtime.model import Model, load
from tests.runtime.in_memory import InMemoryWeights
from tests.runtime.small_models import TRANSFORMERS_TINY, random_ids, random_weights

CONFIG = TRANSFORMERS_TINY
RATIOS = sorted(set(CONFIG.compress_ratios[: CONFIG.num_hidden_layers]) - {0})
IDS = random_ids(CONFIG, 300)
OTHER = IDS.flip(0)
MORE = 5  # tokens of which the logits are compared


@pytest.fixture(scope="module")
def model() -> Model:
    return load(InMemoryWeights(CONFIG, random_weights(CONFIG)))


@pytest.fixture(scope="module")
def expected(model: Model) -> Tensor:
    return model.session().forward(IDS)


def fed_again(session: sessions.Session, position: int) -> int:
    """Tokens that run when the session goes back to `position`."""
    ran: list[int] = []
    right = session._append

    def counted(ids: Tensor, logits: Tensor, *, chunk: bool) -> None:
        ran.append(len(ids))
        right(ids, logits, chunk=chunk)

    session._append = counted  # type: ignore[method-assign]
    session.rewind(position)
    session._append = right  # type: ignore[method-assign]
    return sum(ran)


def test_every_place_in_a_block(model: Model, expected: Tensor) -> None:
    """One token back and more, across blocks that have been completed meanwhile."""
    start = 2 * max(RATIOS) - min(RATIOS)
    session = model.session()
    session.forward(IDS[:start], "last")
    for position in range(start, start + 2 * min(RATIOS) + 1):
        back = 1 + position % (2 * min(RATIOS))
        session.forward(OTHER[:back], "last")
        assert fed_again(session, position) == 0
        logits = session.forward(IDS[position : position + 1])
        assert torch.equal(logits, expected[position : position + 1]), position


@pytest.mark.parametrize("written", [1, SLACK // 2, SLACK])
@pytest.mark.parametrize("position", [1, 3, 130, 200])
def test_as_far_as_the_rings_reach(
    model: Model, expected: Tensor, position: int, written: int
) -> None:
    """What was written beyond lies where the oldest needed tokens would, were rings shorter."""
    session = model.session()
    session.forward(torch.cat((IDS[:position], OTHER[:written])), "last")
    assert fed_again(session, position) == 0
    end = position + MORE
    assert torch.equal(session.forward(IDS[position:end]), expected[position:end])


@pytest.mark.parametrize("position", [1, 3, 130, 200])
def test_farther_back_the_tokens_are_fed_again(
    model: Model, expected: Tensor, position: int
) -> None:
    session = model.session()
    session.forward(torch.cat((IDS[:position], OTHER[: SLACK + 1])), "last")
    assert fed_again(session, position) == position
    end = position + MORE
    assert torch.equal(session.forward(IDS[position:end]), expected[position:end])


def test_without_feeding_again_one_token_more_would_be_wrong(
    model: Model, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions.Session, "slack", SLACK + 1)
    session = model.session()
    session.forward(torch.cat((IDS[:200], OTHER[: SLACK + 1])), "last")
    assert fed_again(session, 200) == 0
    assert not torch.equal(session.forward(IDS[200:205]), expected[200:205])


def test_what_was_overwritten_before_counts(model: Model, expected: Tensor) -> None:
    """Two short ways are a long one: tokens of the first have been written over the ring."""
    session = model.session()
    session.forward(torch.cat((IDS[:140], OTHER[:SLACK])), "last")
    assert fed_again(session, 140) == 0
    session.forward(OTHER[:10], "last")
    assert fed_again(session, 130) == 130
    assert torch.equal(session.forward(IDS[130:135]), expected[130:135])


def test_back_to_the_start_is_a_reset(model: Model, expected: Tensor) -> None:
    session = model.session()
    session.forward(OTHER[:20])
    assert fed_again(session, 0) == 0
    assert torch.equal(session.forward(IDS[:20]), expected[:20])


def test_an_interrupted_session_can_go_back(
    model: Model, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = model.session()
    session.forward(IDS[:20])

    def interrupt(*_: object) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(model.layers[1]), "__call__", interrupt)
        session.forward(OTHER[:10])
    session.rewind(session.position)
    assert session.position == 20
    assert torch.equal(session.forward(IDS[20:25]), expected[20:25])


@pytest.mark.parametrize("position", [-1, 21])
def test_a_position_that_was_not_reached_is_refused(model: Model, position: int) -> None:
    session = model.session()
    session.forward(IDS[:20])
    with pytest.raises(RuntimeRefusal, match=f"position {position}: it has 20 tokens"):
        session.rewind(position)
    assert session.position == 20


def test_tokens_that_were_never_fed_cannot_be_fed_again(model: Model) -> None:
    session = model.session()
    session.skip_to(SLACK + 1)
    with pytest.raises(RuntimeRefusal, match=r"first 65 tokens are not known; call reset\(\)"):
        session.rewind(1)
