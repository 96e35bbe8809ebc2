"""Drafts on a GPU's session: rows of one step, each with its own draw, and the text stays.

Kernels are emulated, launches and buffers are the GPU's. The judge is plain decoding, which draws
in the step, too, and is itself compared with draws by hand (`test_session`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.bench.random_weights import RandomWeights
from dsv4.formats.errors import RuntimeRefusal
from dsv4.runtime.gpu.session import GpuSession
from dsv4.runtime.text.drafting import MOST_DRAFTS
from dsv4.runtime.text.generate import Timings, generate
from dsv4.runtime.text.sampling import Sampler
from tests.runtime.gpu.test_rewind import CAPACITY, FEW, IDS, Quick
from tests.runtime.gpu.test_session import CPU, HostModel
from tests.support.guesses import Script, always, chancy, right

VOCAB = FEW.vocab_size
SAMPLERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6, "seed": 3},
    {"temperature": 1.0, "top_p": 0.95, "seed": 5},
    {"temperature": 0.9, "top_k": 7, "seed": 6},
    {"temperature": 1.1, "min_p": 0.05, "top_p": 0.9, "top_k": 40, "seed": 7},
    {"temperature": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "seed": 8},
]


pytestmark = pytest.mark.usefixtures("no_graphs")


@pytest.fixture(scope="module")
def model() -> HostModel:
    return HostModel(RandomWeights(FEW, CPU), Quick(FEW), CPU)


class Answer:
    """Plain decoding of `count` tokens behind the first `prompt` of IDS, and the same drafted."""

    def __init__(
        self, model: HostModel, prompt: int, count: int, sampler: dict[str, Any], chunk: int = 0
    ) -> None:
        self.model, self.prompt, self.count = model, IDS[:prompt].tolist(), count
        self.sampler, self.chunk = sampler, chunk
        session, one = model.session(CAPACITY, chunk=chunk), Sampler(**sampler)
        self.plain = list(generate(session, self.prompt, count, one))
        self.whole = self.prompt + self.plain
        self.drawn = one.drawn
        self.after = after(session, one)

    def drafted(self, script: Script, most: int, timings: Timings | None = None) -> bool:
        """Whether text, the draws that follow, and logits that follow are the same."""
        session, one = self.model.session(CAPACITY, chunk=self.chunk), Sampler(**self.sampler)
        drafter = always(script, most)
        found = list(generate(session, self.prompt, self.count, one, (), timings, drafter=drafter))
        same = found == self.plain and one.drawn == self.drawn
        return same and all(map(torch.equal, after(session, one), self.after))


def after(session: GpuSession, sampler: Sampler) -> list[Tensor]:
    """What comes next of the sequence: drawn in its step, and logits."""
    start = session.position
    token = session.append_and_draw(torch.tensor([5]), sampler).clone()
    again = session.append_and_draw(session._tokens.ids[:1], sampler).clone()
    logits = session.forward(torch.tensor([1, 2, 3, 4, 5, 6, 7]))
    session.rewind(start)
    sampler.drawn -= 2
    return [token.long(), again.long(), logits]


@pytest.mark.parametrize("most", [0, 1, 4, 7])
def test_lengths_and_accepted_lengths(model: HostModel, most: int) -> None:
    answer = Answer(model, 13, 10, SAMPLERS[most % len(SAMPLERS)])
    for accepted in {0, most // 2, most}:
        timings = Timings()
        assert answer.drafted(right(answer.whole, accepted, VOCAB), most, timings)
        if accepted < most:
            assert timings.decode_steps == -(-9 // (accepted + 1))


@pytest.mark.long
@pytest.mark.parametrize("prompt", range(8, 16))
def test_every_length_and_every_accepted_length(model: HostModel, prompt: int) -> None:
    """From every place in the longest block."""
    answer = Answer(model, prompt, 17, SAMPLERS[prompt % len(SAMPLERS)])
    for most in range(MOST_DRAFTS + 1):
        for accepted in range(most + 1):
            assert answer.drafted(right(answer.whole, accepted, VOCAB), most), (most, accepted)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_way_to_draw(model: HostModel, sampler: dict[str, Any]) -> None:
    answer = Answer(model, 9, 14, sampler)
    assert answer.drafted(chancy(answer.whole, 0.7, VOCAB, seed=1), 7)


@pytest.mark.parametrize("prompt", [1, 7, 8])
def test_from_the_beginning_and_where_a_block_ends(model: HostModel, prompt: int) -> None:
    answer = Answer(model, prompt, 12, SAMPLERS[1])
    assert answer.drafted(chancy(answer.whole, 0.7, VOCAB, seed=2), 7)


def test_behind_a_chunk(model: HostModel) -> None:
    """What a chunk of the prompt computed stays as it was, whatever is forgotten behind it."""
    answer = Answer(model, 36, 10, {"temperature": 0.8, "seed": 2}, chunk=32)
    assert answer.drafted(chancy(answer.whole, 0.6, VOCAB), 7)


def test_one_step_a_round_and_a_draw_of_each_row(model: HostModel) -> None:
    answer = Answer(model, 13, 17, {"temperature": 0.8, "seed": 2})
    launched = model.library.launched  # type: ignore[attr-defined]
    launched.clear()
    session, timings = model.session(CAPACITY, chunk=0), Timings()
    drafter = always(right(answer.whole, 3, VOCAB), 3)
    list(generate(session, answer.prompt, 17, Sampler(0.8, seed=2), (), timings, drafter=drafter))
    prompt = -(-13 // 8)
    assert timings.decode_steps == 4
    assert launched.count("router") == (prompt + 4) * FEW.num_hidden_layers
    assert launched.count("sampling") == 1 + 4


def test_logits_that_are_not_finite_matter_where_they_are_drawn_from(
    model: HostModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of a wrong draft may hold anything; one that is reached is refused."""
    answer = Answer(model, 13, 12, {"temperature": 0.8, "seed": 2})
    good = Quick._sampling

    def broken(self: Quick, given: dict[str, Any], buffers: dict[str, Tensor]) -> Any:
        if len(buffers["logits"]) == 4:
            buffers["logits"][3] = torch.nan
        return good(self, given, buffers)

    monkeypatch.setattr(Quick, "_sampling", broken)
    assert answer.drafted(right(answer.whole, 2, VOCAB), 3)
    with pytest.raises(RuntimeRefusal, match="NaN or infinity"):
        answer.drafted(right(answer.whole, 3, VOCAB), 3)


def _counts_all_rows(patch: pytest.MonkeyPatch) -> None:
    step = GpuSession.append_and_draw_each

    def run(self: GpuSession, ids: Tensor, sampler: Sampler) -> Tensor:
        drawn = step(self, ids, sampler)
        sampler.drawn += len(ids) - 1
        return drawn

    patch.setattr(GpuSession, "append_and_draw_each", run)


def _one_counter_for_all_rows(patch: pytest.MonkeyPatch) -> None:
    settled = GpuSession._set_sampler

    def setting(self: GpuSession, sampler: Sampler) -> None:
        settled(self, sampler)
        self._parameters.counter.fill_(sampler.drawn)

    patch.setattr(GpuSession, "_set_sampler", setting)


def _keeps_its_draw(patch: pytest.MonkeyPatch) -> None:
    step = GpuSession.append_and_draw_each

    def run(self: GpuSession, ids: Tensor, sampler: Sampler) -> Tensor:
        drawn = step(self, ids, sampler)
        self._parameters.counter.sub_(1)
        return drawn.roll(1)

    patch.setattr(GpuSession, "append_and_draw_each", run)


def _rewinds_one_short(patch: pytest.MonkeyPatch) -> None:
    back = GpuSession.rewind
    patch.setattr(GpuSession, "rewind", lambda self, position: back(self, position + 1))


FAULTS = {
    "counter by rows": _counts_all_rows,
    "one counter for all rows": _one_counter_for_all_rows,
    "another row's draw": _keeps_its_draw,
    "rewind one short": _rewinds_one_short,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(model: HostModel, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    answer = Answer(model, 9, 8, {"temperature": 1.0, "seed": 4})
    assert answer.drafted(right(answer.whole, 2, VOCAB), 6)
    FAULTS[fault](monkeypatch)
    assert not answer.drafted(right(answer.whole, 2, VOCAB), 6)
