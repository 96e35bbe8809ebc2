"""A session of the GPU runtime gives the reference's logits, whatever the cuts, and its tokens."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.bench.random_weights import RandomWeights
from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.releases import FLASH
from dsv4.kernels.reference.numerics import Numerics
from dsv4.runtime.gpu import plan
from dsv4.runtime.gpu.activations import Streams
from dsv4.runtime.gpu.model import GpuModel
from dsv4.runtime.gpu.operands import Connection
from dsv4.runtime.gpu.session import GpuSession
from dsv4.runtime.model import load
from dsv4.runtime.text.generate import generate
from dsv4.runtime.text.sampling import Sampler
from tests.support.emulator import Emulator

CPU = torch.device("cpu")
SMALL = dataclasses.replace(
    FLASH,
    vocab_size=256,
    hidden_size=512,
    num_hidden_layers=4,
    compress_ratios=(0, 4, 16, 4),
    num_hash_layers=1,
    num_attention_heads=4,
    q_lora_rank=128,
    o_lora_rank=64,
    o_groups=2,
    moe_intermediate_size=512,
    n_routed_experts=8,
    num_experts_per_tok=2,
    sliding_window=8,
    index_n_heads=2,
    index_topk=4,
)
"""Every kind of layer; the window wraps, blocks complete and are chosen within forty tokens."""


class HostModel(GpuModel):
    """On the CPU."""

    def multiprocessors(self) -> int:
        """Without asking a device."""
        return 1


@pytest.fixture(scope="module")
def weights() -> RandomWeights:
    return RandomWeights(SMALL, CPU)


pytestmark = pytest.mark.usefixtures("no_graphs")


def session_of(
    weights: RandomWeights, config: ModelConfig = SMALL, chunk: int | None = None
) -> GpuSession:
    return HostModel(weights, Emulator(config), CPU).session(64, chunk=chunk)


def reference(weights: RandomWeights, ids: Tensor) -> Tensor:
    model = load(weights, dtype=torch.bfloat16, numerics=Numerics.CACHES)
    return model.session(64).forward(ids)


IDS = torch.randint(0, SMALL.vocab_size, (41,), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("chunk", [0, 32, None])
def test_logits_are_the_references(weights: RandomWeights, chunk: int | None) -> None:
    """By steps; a chunk and what is left; one chunk."""
    found, wanted = session_of(weights, chunk=chunk).forward(IDS), reference(weights, IDS)
    error = (found - wanted).square().mean(1).sqrt() / wanted.std()
    assert float(error.median()) < 0.03  # both round to bfloat16, not always alike
    assert float((found.argmax(1) == wanted.argmax(1)).float().mean()) > 0.9


def test_chunks_go_on_in_the_same_caches(weights: RandomWeights) -> None:
    """The window and the rings wrap within a chunk, and between chunks."""
    ids = torch.cat((IDS, IDS.flip(0)[:23]))
    session = session_of(weights, chunk=32)
    whole, wanted = session.forward(ids), reference(weights, ids)
    error = (whole - wanted).square().mean(1).sqrt() / wanted.std()
    assert float(error.median()) < 0.03
    launched = session.model.library.launched  # type: ignore[attr-defined]
    assert launched.count("experts_route") == 2 * SMALL.num_hidden_layers
    assert "experts" not in launched
    session.reset()
    assert torch.equal(session.forward(ids, "last"), whole[-1:])
    session.reset()
    session.forward(ids[:32])
    assert torch.equal(session.forward(ids[32:]), whole[32:])


def test_any_cuts_give_the_same_bytes(weights: RandomWeights) -> None:
    session = session_of(weights, chunk=0)
    whole = session.forward(IDS)
    session.reset()
    parts, first = [], 0
    for count in (1, 3, 8, 2, 11, 1, 1, 14):
        parts.append(session.forward(IDS[first : first + count]))
        first += count
    assert torch.equal(torch.cat(parts), whole)
    session.reset()
    assert torch.equal(session.forward(IDS, "last"), whole[-1:])


@pytest.mark.parametrize("sampler", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}])
def test_tokens_drawn_in_the_step_are_those_of_its_logits(
    weights: RandomWeights, sampler: dict[str, Any]
) -> None:
    session, prompt = session_of(weights), IDS[:9].tolist()
    drawn = list(generate(session, prompt, 12, Sampler(**sampler)))
    assert session.position == 9 + 11
    session.reset()
    by_hand, ids, one = [], IDS[:9], Sampler(**sampler)
    for _ in range(12):
        ids = one(session.forward(ids, "last"))
        by_hand.append(int(ids))
    assert drawn == by_hand


@pytest.mark.parametrize(
    "sampler",
    [
        {"temperature": 0.8, "top_p": 0.9, "top_k": 5, "seed": 3},
        {"temperature": 1.1, "min_p": 0.2, "seed": 4},
        {"repetition_penalty": 0.1},  # seen tokens become likelier
        {"temperature": 0.9, "top_k": 7, "seed": 5},
    ],
)
def test_what_the_kernel_cannot_draw_is_drawn_on_the_host(
    weights: RandomWeights, sampler: dict[str, Any]
) -> None:
    session, prompt = session_of(weights), IDS[:9].tolist()
    drawn = list(generate(session, prompt, 6, Sampler(**sampler)))
    launched = session.model.library.launched  # type: ignore[attr-defined]
    on_host = Sampler(**sampler).host_reason() is not None
    assert on_host == ("top_k" not in sampler or "top_p" in sampler)
    assert launched.count("sampling") == (0 if on_host else 6)
    session.reset()
    by_hand, ids, one = [], IDS[:9], Sampler(**sampler)
    one.begin(prompt)
    for _ in range(6):
        ids = one(session.forward(ids, "last"))
        one.took(int(ids))
        by_hand.append(int(ids))
    assert drawn == by_hand
    neutral = {name: sampler[name] for name in ("temperature", "seed") if name in sampler}
    session.reset()
    assert list(generate(session, prompt, 6, Sampler(**neutral))) != drawn, "it mattered"


def test_a_session_changes_between_host_and_device(weights: RandomWeights) -> None:
    session, plain, other = session_of(weights), Sampler(0.9, seed=1), Sampler(0.9, 0.8, 1, top_k=4)
    ids, found = IDS[:9], []
    for number in range(9):
        ids = session.append_and_draw(ids, other if number % 3 == 1 else plain)
        found.append(int(ids))
    session.reset()
    whole = session.forward(torch.tensor([*IDS[:9].tolist(), *found]))[8:-1]
    again, ones = [], {True: Sampler(0.9, 0.8, 1, top_k=4), False: Sampler(0.9, seed=1)}
    for number, row in enumerate(whole):
        again.append(int(ones[number % 3 == 1](row[None])))
    assert again == found


def test_another_turn_goes_on_where_the_last_one_ended(weights: RandomWeights) -> None:
    session, prompt = session_of(weights), IDS[:5].tolist()
    first = list(generate(session, prompt, 4, Sampler()))
    second = list(generate(session, [first[-1], 17, 4], 3, Sampler()))
    session.reset()
    whole = session.forward(torch.tensor([*prompt, *first, 17, 4, *second]))
    assert whole[len(prompt) + len(first) + 1 :].argmax(1)[:3].tolist() == second


@pytest.mark.parametrize("chunk", [0, 64])
def test_a_launch_that_reads_another_tensor_of_its_kind_is_noticed(
    weights: RandomWeights, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """The streams of the other parity have the same shape: only numbers tell."""
    right, calls = plan.connect, itertools.count()

    def wrong(
        run: plan.Pass, place: str, own: Connection, old: Streams, u: tuple[Tensor, ...]
    ) -> Any:
        if next(calls) % 8 == 2:
            other = run.a.streams[1 - run.a.streams.index(old)]
            swapped = dataclasses.replace(old, post=other.post)
            first, second = (swapped if one is old else one for one in run.a.streams)
            activations = dataclasses.replace(run.a, streams=(first, second))
            return right(dataclasses.replace(run, a=activations), place, own, swapped, u)
        return right(run, place, own, old, u)

    monkeypatch.setattr(plan, "connect", wrong)
    found, wanted = session_of(weights, chunk=chunk).forward(IDS), reference(weights, IDS)
    error = (found - wanted).square().mean(1).sqrt() / wanted.std()
    assert float(error.median()) > 0.03


def test_a_session_refuses_before_it_changes_anything(weights: RandomWeights) -> None:
    session = session_of(weights)
    session.forward(IDS[:40])
    with pytest.raises(RuntimeRefusal, match="exceed its capacity of 64"):
        session.forward(IDS[:30])
    with pytest.raises(RuntimeRefusal, match="token id 256 is not in the vocabulary"):
        session.forward(torch.tensor([256]))
    assert session.position == 40
