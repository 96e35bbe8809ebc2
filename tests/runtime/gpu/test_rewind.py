"""Going back leaves a sequence as if the tokens had never been fed; slots do not see each other.

The judge is another session: one that was never fed those tokens, or has the engine for itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.bench.random_weights import RandomWeights
from dsv4.formats.errors import RuntimeRefusal
from dsv4.kernels.core.contract import Buffers
from dsv4.runtime.gpu.program import Program
from dsv4.runtime.gpu.session import GpuSession
from dsv4.runtime.text.generate import generate
from dsv4.runtime.text.sampling import Sampler
from tests.runtime.gpu.test_session import CPU, SMALL, HostModel
from tests.support.emulator import Emulator

FEW = dataclasses.replace(
    SMALL, num_hidden_layers=3, compress_ratios=(0, 4, 8), num_hash_layers=0, n_routed_experts=4
)
"""A layer of every kind; the window and the longest block are of 8 tokens."""


class Quick(Emulator):
    """What is between attention sublayers is replaced, row by row, by what takes no time: caches
    and positions are what is looked at. Experts of a chunk round otherwise than those of a step.
    """

    def _mhc(self, given: dict[str, Any], buffers: Buffers) -> Buffers:
        if given["place"] == "first":
            new = buffers["embed"][buffers["ids"].long()][:, None].expand(-1, 4, -1)
        else:
            u = buffers["u"].float() + buffers.get("u1", torch.zeros(()))
            new = buffers["streams"].float() + u[:, None]
        x = new.float().mean(1)
        found = {"new_streams": new, "x": x / x.square().mean(1, keepdim=True).sqrt()}
        places = ("new_post", "new_comb") if given["place"] != "last" else ()
        return found | {name: torch.zeros_like(buffers[name]) for name in places}

    def _experts(self, given: dict[str, Any], buffers: Buffers) -> Buffers:
        return {"y": torch.tanh(buffers["x"].float())}

    def _experts_combine(self, given: dict[str, Any], buffers: Buffers) -> Buffers:
        return {"y": torch.tanh(self._routed["x"].flatten(1).float())}


IDS = torch.randint(0, FEW.vocab_size, (60,), generator=torch.Generator().manual_seed(11))
OTHER = IDS.flip(0)
CAPACITY = 64


pytestmark = pytest.mark.usefixtures("no_graphs")


@pytest.fixture(scope="module")
def model() -> HostModel:
    return HostModel(RandomWeights(FEW, CPU), Quick(FEW), CPU)


@pytest.fixture(scope="module")
def expected(model: HostModel) -> Tensor:
    """Logits of IDS, by steps."""
    return model.session(CAPACITY, chunk=0).forward(IDS)


def steps_since(session: GpuSession) -> int:
    """Launches of the router since the last call: how much was run."""
    launched = session.model.library.launched  # type: ignore[attr-defined]
    count: int = launched.count("router")
    launched.clear()
    return count


@pytest.mark.parametrize("fed", range(16, 24))
def test_a_short_way_back_costs_nothing(model: HostModel, expected: Tensor, fed: int) -> None:
    """From every place in a block, by up to 8 tokens, which are the most that a step writes."""
    session = model.session(CAPACITY, chunk=0)
    session.forward(IDS[:fed])
    back = 1 + fed % 8
    for position in (fed - 1, fed - back):
        if session.position < fed:
            session.forward(OTHER[: fed - session.position])
        steps_since(session)
        session.rewind(position)
        assert steps_since(session) == 0 and session.position == position
    assert torch.equal(
        session.forward(IDS[session.position : fed + 5]), expected[fed - back : fed + 5]
    )


@pytest.mark.parametrize("position", [1, 3, 8, 13])
def test_a_long_way_back_feeds_again(model: HostModel, expected: Tensor, position: int) -> None:
    session = model.session(CAPACITY, chunk=0)
    session.forward(torch.cat((IDS[:position], OTHER[:30])), "last")
    steps_since(session)
    session.rewind(position)
    assert steps_since(session) == FEW.num_hidden_layers * -(-position // 8)
    end = position + 12
    assert torch.equal(session.forward(IDS[position:end]), expected[position:end])


def test_rings_of_the_needed_length_alone_would_not_do(
    model: HostModel, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the slack promises is what the rings hold: one token more, and the bytes differ."""
    wrong = []
    for slack in (8, 12):
        session = model.session(CAPACITY, chunk=0)
        monkeypatch.setattr(session, "slack", slack)
        session.forward(torch.cat((IDS[:20], OTHER[:slack])))
        session.rewind(20)
        wrong.append(not torch.equal(session.forward(IDS[20:26]), expected[20:26]))
    assert wrong == [False, True]


@pytest.mark.parametrize("position", [10, 36, 47])
def test_what_a_chunk_computed_stays_as_it_was(model: HostModel, position: int) -> None:
    """A chunk rounds otherwise than steps: fed again, tokens are of the chunk that they were of."""
    whole = model.session(CAPACITY, chunk=32)
    whole.forward(IDS[:48])  # a chunk of 32, steps of 8
    short = model.session(CAPACITY, chunk=32)
    short.forward(torch.cat((IDS[:position], OTHER[: 48 - position])))
    for session in (whole, short):
        session.rewind(position)
    monkey = model.session(CAPACITY, chunk=32)
    monkey.forward(IDS[:48])
    monkey._interrupted = True  # so that all is fed again
    monkey.rewind(position)
    logits = [one.forward(IDS[position : position + 5]) for one in (whole, short, monkey)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_a_draw_after_going_back_is_that_of_the_shorter_sequence(model: HostModel) -> None:
    session, sampler = model.session(CAPACITY), Sampler(0.9, seed=4)
    ids = IDS[:9]
    for _ in range(6):
        ids = session.append_and_draw(ids, sampler)
    session.rewind(9)
    fresh, again = model.session(CAPACITY), Sampler(0.9, seed=4)
    fresh.append_and_draw(IDS[:9], again)
    again.drawn = sampler.drawn
    token = torch.tensor([5])
    for _ in range(3):
        found, wanted = session.append_and_draw(token, sampler), fresh.append_and_draw(token, again)
        assert int(found) == int(wanted)
        token = found.clone()


def test_drawn_tokens_are_fed_again(model: HostModel) -> None:
    """They were never on the host, as far as the session knows."""
    session = model.session(CAPACITY, chunk=0)
    drawn = list(generate(session, IDS[:5].tolist(), 20, Sampler()))
    session.rewind(10)
    fresh = model.session(CAPACITY, chunk=0)
    fresh.forward(torch.tensor([*IDS[:5].tolist(), *drawn[:5]]))
    assert torch.equal(session.forward(IDS[:3]), fresh.forward(IDS[:3]))


def test_three_sequences_of_one_engine_are_alone(model: HostModel) -> None:
    prompts = (IDS[:5], IDS[10:51], OTHER[:12])
    samplers: tuple[dict[str, Any], ...] = (
        {},
        {"temperature": 0.8, "seed": 5},
        {"temperature": 1.1, "top_p": 0.9, "seed": 6},
    )

    def turns(session: GpuSession, number: int) -> Iterator[list[int] | Tensor]:
        run = generate(session, prompts[number].tolist(), 4, Sampler(**samplers[number]))
        yield [next(run), next(run)]
        yield list(run)
        session.rewind(session.position - 2)
        yield session.forward(IDS[:3])

    alone = [list(turns(model.session(CAPACITY), number)) for number in range(3)]
    engine = model.engine(CAPACITY, slots=3)
    running = [turns(engine.session(), number) for number in range(3)]
    together: list[list[list[int] | Tensor]] = [[], [], []]
    for _ in range(3):
        for number in (2, 0, 1):
            together[number].append(next(running[number]))
    for one, other in zip(alone, together, strict=True):
        assert one[:2] == other[:2]
        assert torch.equal(torch.as_tensor(one[2]), torch.as_tensor(other[2]))
    with pytest.raises(RuntimeRefusal, match=r"all 3 slots hold a sequence; close\(\) one"):
        engine.session()


def test_a_slot_that_was_given_back_is_empty(model: HostModel, expected: Tensor) -> None:
    engine = model.engine(CAPACITY, slots=2, chunk=0)
    first, _ = engine.session(), engine.session()
    first.forward(OTHER[:20])
    first.close()
    again = engine.session()
    assert again.slot == first.slot
    assert torch.equal(again.forward(IDS[:12]), expected[:12])


def test_ids_on_the_device_are_checked_but_for_its_own_draw(
    model: HostModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, sampler = model.session(CAPACITY), Sampler()
    drawn = session.append_and_draw(IDS[:3], sampler)
    looked: list[object] = []
    monkeypatch.setattr("dsv4.runtime.session.check_ids", lambda ids, *_: looked.append(ids))
    drawn = session.append_and_draw(drawn, sampler)
    assert not looked
    session.append_and_draw(drawn.clone(), sampler)
    assert len(looked) == 1


def test_what_was_interrupted_says_so_and_can_go_back(
    model: HostModel, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = model.session(CAPACITY, chunk=0)
    session.forward(IDS[:8])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Program, "replay", _interrupted)
        session.forward(OTHER[:16])
    with pytest.raises(RuntimeRefusal, match="was interrupted"):
        session.forward(IDS[8:9])
    session.rewind(8)
    assert torch.equal(session.forward(IDS[8:14]), expected[8:14])


def _interrupted(program: Program) -> None:
    for call in program.calls[: len(program.calls) // 2]:
        call()
    raise KeyboardInterrupt


@pytest.mark.parametrize("position", [-1, 4])
def test_a_position_that_was_not_reached_is_refused(model: HostModel, position: int) -> None:
    session = model.session(CAPACITY, chunk=0)
    session.forward(IDS[:3])
    with pytest.raises(RuntimeRefusal, match=f"position {position}: it has 3 tokens"):
        session.rewind(position)
    assert session.position == 3
