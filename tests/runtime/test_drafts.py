"""With drafts a text is what it is without, and so is what the session holds.

The judge is plain decoding by another session. Each way to get it wrong is planted once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.runtime.model import Model, load
from dsv4.runtime.session import Session
from dsv4.runtime.text.drafting import MOST_DRAFTS, Drafter, PromptLookup
from dsv4.runtime.text.generate import Lookahead, Timings, generate
from dsv4.runtime.text.sampling import Sampler
from tests.runtime.in_memory import InMemoryWeights
from tests.runtime.small_models import TRANSFORMERS_TINY, random_ids, random_weights
from tests.support.guesses import Script, always, chancy, right

CONFIG = TRANSFORMERS_TINY
IDS = random_ids(CONFIG, 400)
OTHER = IDS.flip(0)
GREEDY: dict[str, Any] = {}
SAMPLERS: list[dict[str, Any]] = [
    GREEDY,
    {"temperature": 0.6, "seed": 3},
    {"temperature": 1.0, "seed": 4},
    {"temperature": 1.0, "top_p": 0.95, "seed": 5},
    {"temperature": 0.9, "top_k": 7, "seed": 6},
    {"temperature": 1.1, "min_p": 0.05, "top_p": 0.9, "top_k": 40, "seed": 7},
    {"temperature": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "seed": 8},
]


@pytest.fixture(scope="module")
def model() -> Model:
    return load(InMemoryWeights(CONFIG, random_weights(CONFIG)))


@pytest.fixture(scope="module")
def expected(model: Model) -> Tensor:
    return model.session().forward(IDS)


def visible(session: Session) -> Iterator[Tensor]:
    """All that what comes next can see: slots that may be stale are left out."""
    end = session.position
    for layer, cache in enumerate(session.caches):
        ring = cache.window.ring
        yield ring[torch.arange(max(end - cache.window.window + 1, 0), end) % len(ring)]
        for part in (cache.compressed, cache.index_keys):
            if part is not None:
                yield part.entries[: end // CONFIG.compress_ratio(layer)]
                last = torch.arange(max(end - part.state, 0), end) % len(part.ring_kv)
                yield part.ring_kv[last]
                yield part.ring_gate[last]


def same_state(one: Session, other: Session) -> bool:
    pairs = zip(visible(one), visible(other), strict=True)
    return one.position == other.position and all(itertools.starmap(torch.equal, pairs))


class Answer:
    """Plain decoding of `count` tokens behind the first `prompt` of IDS, and the same drafted."""

    def __init__(self, model: Model, prompt: int, count: int, sampler: dict[str, Any]) -> None:
        self.model, self.prompt, self.count = model, IDS[:prompt].tolist(), count
        self.sampler = sampler
        self.session, self.plain_sampler = model.session(512), Sampler(**sampler)
        self.plain = list(generate(self.session, self.prompt, count, self.plain_sampler))
        self.whole = self.prompt + self.plain

    def drafted(self, script: Script, most: int, timings: Timings | None = None) -> bool:
        """Whether nothing can be told apart: text, state, and the number of the next draw."""
        session, sampler = self.model.session(512), Sampler(**self.sampler)
        drafter = always(script, most)
        found = list(
            generate(session, self.prompt, self.count, sampler, (), timings, drafter=drafter)
        )
        same = found == self.plain and sampler.drawn == self.plain_sampler.drawn
        return same and same_state(session, self.session)


@pytest.mark.parametrize("most", range(MOST_DRAFTS + 1))
def test_every_length_and_every_accepted_length(model: Model, most: int) -> None:
    answer = Answer(model, 120, 24, SAMPLERS[most % len(SAMPLERS)])
    for accepted in range(most + 1):
        timings = Timings()
        assert answer.drafted(right(answer.whole, accepted), most, timings)
        drafts = timings.drafts
        assert drafts is not None and sum(drafts.accepted[accepted:]) == 0
        if accepted < most:
            assert timings.decode_steps == -(-23 // (accepted + 1))
        assert timings.decode_tokens == 23


@pytest.mark.parametrize("prompt", [1, 2, 3, 4, 5, 9, 126, 127, 128, 129, 130, 254, 255, 257])
def test_from_the_places_where_something_completes(model: Model, prompt: int) -> None:
    answer = Answer(model, prompt, 20, GREEDY)
    for script in (right(answer.whole), right(answer.whole, 0), chancy(answer.whole, 0.7)):
        assert answer.drafted(script, 5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_way_to_draw(model: Model, sampler: dict[str, Any]) -> None:
    answer = Answer(model, 40, 60, sampler)
    for share in (1.0, 0.6):
        assert answer.drafted(chancy(answer.whole, share, seed=1), 7)


def test_longer_drafts_are_not_worse(model: Model) -> None:
    """One load, every length: an error that comes with the length alone would be seen here."""
    answer = Answer(model, 100, 80, {"temperature": 1.0, "seed": 1})
    script = chancy(answer.whole, 0.7, seed=2)
    assert [answer.drafted(script, most) for most in range(8)] == [True] * 8


def every_way_back(model: Model, expected: Tensor, residues: list[int]) -> None:
    """Of rows 1 to 8 so many are right; what is behind them is forgotten, and decoding goes on."""
    session, plain = model.session(), model.session()
    session.forward(IDS[: 128 + residues[0]], "last")
    for position in (128 + residue for residue in residues):
        if session.position < position:
            session.forward(IDS[session.position : position], "last")
        for rows in range(2, MOST_DRAFTS + 2):
            for kept in range(1, rows + 1):
                end = position + kept
                ids = torch.cat((IDS[position:end], (IDS[end:] + 1)[: rows - kept] % 99))
                logits = session.forward(ids)
                assert torch.equal(logits[:kept], expected[position:end]), (position, rows, kept)
                session.rewind(end)
                found = session.forward(IDS[end : end + 1])
                assert torch.equal(found, expected[end : end + 1]), (position, rows, kept)
                session.rewind(position)
        plain.forward(IDS[plain.position : position], "last")
        assert same_state(session, plain), position


def test_rows_that_were_wrong_leave_no_trace(model: Model, expected: Tensor) -> None:
    every_way_back(model, expected, [0, 1, 4, 61, 126, 127])


@pytest.mark.long
def test_rows_that_were_wrong_leave_no_trace_anywhere(model: Model, expected: Tensor) -> None:
    every_way_back(model, expected, list(range(128)))


@pytest.mark.parametrize("place", range(8))
def test_a_stop_among_drafts_ends_it_there(model: Model, place: int) -> None:
    """Stop ids are not run, and a run that goes beyond one is cut."""
    answer = Answer(model, 30, 16, {"temperature": 1.0, "seed": 2})
    stop = answer.plain[place]
    before = answer.plain[: answer.plain.index(stop)]
    session = model.session()
    drafter = always(right(answer.whole), 7)
    ids = generate(session, answer.prompt, 16, Sampler(1.0, seed=2), {stop}, drafter=drafter)
    assert list(ids) == before
    assert session.position == 30 + len(before)
    plain = model.session()
    plain.forward(torch.tensor(answer.prompt + before))
    assert same_state(session, plain)


@pytest.mark.parametrize("taken", range(1, 12))
def test_a_closed_iterator_leaves_what_was_consumed(model: Model, taken: int) -> None:
    """So that another turn, by the same sampler, is the plain one, too."""
    answer = Answer(model, 30, 16, {"temperature": 1.0, "seed": 2})
    found = []
    for drafter in (None, always(right(answer.whole, 5), 6)):
        session, sampler = model.session(), Sampler(1.0, seed=2)
        tokens = generate(session, answer.prompt, 16, sampler, drafter=drafter)
        first = [next(tokens) for _ in range(taken)]
        tokens.close()
        assert session.position == 30 + taken - 1
        second = list(generate(session, [first[-1], 7], 6, sampler, drafter=drafter))
        found.append((first, second, sampler.drawn))
    assert found[0] == found[1]


def test_an_answer_that_fills_the_session(model: Model) -> None:
    whole = model.session(48)
    plain = list(generate(whole, IDS[:20].tolist(), 28, Sampler()))
    session = model.session(48)
    drafter = always(right(IDS[:20].tolist() + plain), 7)
    assert list(generate(session, IDS[:20].tolist(), 28, Sampler(), drafter=drafter)) == plain
    assert same_state(session, whole)


def test_the_package_says_the_same_however_it_drafts(model: Model) -> None:
    prompt = torch.cat((IDS[:30], IDS[:30], IDS[:12]))
    plain = list(model.session().generate(prompt, 40, 0.9, seed=1, draft="off"))
    for draft in ("auto", 0, 1, 4, 7):
        assert list(model.session().generate(prompt, 40, 0.9, seed=1, draft=draft)) == plain


@pytest.mark.parametrize("draft", [8, -1, True, "on", 2.0, None])
def test_other_wishes_are_refused_by_name(model: Model, draft: Any) -> None:
    with pytest.raises(RuntimeRefusal, match=r"draft is .*, expected auto, off, or 0 to 7 tokens"):
        model.session().generate([1, 2], 4, draft=draft)


def test_an_answer_that_repeats_its_prompt_takes_fewer_steps(model: Model) -> None:
    """Greedy decoding of a small model ends in a circle, which lookup finds."""
    timings = Timings()
    plain = list(generate(model.session(), IDS[:9].tolist(), 200, Sampler()))
    drafter = Drafter("prompt lookup", PromptLookup, 7, auto=False)
    found = generate(
        model.session(), IDS[:9].tolist(), 200, Sampler(), (), timings, drafter=drafter
    )
    assert list(found) == plain
    assert timings.decode_steps < 199 and timings.drafts is drafter.drafts
    assert timings.decode_steps == drafter.drafts.rounds + drafter.drafts.steps
    assert timings.decode_tokens == 199 == timings.decode_steps + sum(drafter.drafts.accepted)


def test_an_interrupted_round_is_not_rewound(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it is in the caches: `reset` is what helps, as without drafts."""
    session = model.session()
    answer = Answer(model, 20, 12, GREEDY)
    tokens = generate(session, answer.prompt, 12, Sampler(), drafter=always(right(answer.whole), 3))
    next(tokens)

    def interrupt(*_: object) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(model.layers[1]), "__call__", interrupt)
        next(tokens)
    with pytest.raises(RuntimeRefusal, match="was interrupted"):
        session.forward(IDS[:1])
    session.reset()
    assert list(generate(session, answer.prompt, 12, Sampler())) == answer.plain


# Faults, each of which has to be seen.


def _rewinds_to(difference: int, patch: pytest.MonkeyPatch) -> None:
    back = Session.rewind
    patch.setattr(Session, "rewind", lambda self, position: back(self, position + difference))


def _counts_all_rows(patch: pytest.MonkeyPatch) -> None:
    step = Lookahead._run

    def run(self: Lookahead, ids: Tensor) -> int:
        token = step(self, ids)
        self._sampler.drawn += len(ids) - 1
        return token

    patch.setattr(Lookahead, "_run", run)


def _does_not_count(patch: pytest.MonkeyPatch) -> None:
    draw = Lookahead._draw

    def again(self: Lookahead) -> int:
        before = self._sampler.drawn
        token = draw(self)
        self._sampler.drawn = before
        return token

    patch.setattr(Lookahead, "_draw", again)


def _accepts_one_too_many(patch: pytest.MonkeyPatch) -> None:
    step = Lookahead.next

    def take(self: Lookahead, token: int, wanted: int) -> int:
        if self._drafts and self._drafts[0] != token:
            self._drafts[0] = token  # as if the row had been run with it
        return step(self, token, wanted)

    patch.setattr(Lookahead, "next", take)


def _draws_from_the_row_behind(patch: pytest.MonkeyPatch) -> None:
    step = Lookahead._run

    def run(self: Lookahead, ids: Tensor) -> int:
        token = step(self, ids)
        self._rows.rotate(1)
        return token

    patch.setattr(Lookahead, "_run", run)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "rewind one too far": lambda patch: _rewinds_to(-1, patch),
    "rewind one short": lambda patch: _rewinds_to(1, patch),
    "no rewind": lambda patch: patch.setattr(Session, "rewind", lambda self, position: None),
    "counter by rows": _counts_all_rows,
    "counter not advanced": _does_not_count,
    "one too many accepted": _accepts_one_too_many,
    "another row": _draws_from_the_row_behind,
    "rings without slack": lambda patch: patch.setattr("dsv4.runtime.cache.SLACK", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(model: Model, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    answer = Answer(model, 120, 24, {"temperature": 1.0, "seed": 4})
    assert answer.drafted(right(answer.whole, 2), 6)
    FAULTS[fault](monkeypatch)
    assert not answer.drafted(right(answer.whole, 2), 6)
