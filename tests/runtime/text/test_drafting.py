"""Who guesses, how far, and when it is given up: against transformers' lookup, by told times.

What becomes of a text is `tests/runtime/test_drafts.py`.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

import pytest
import torch

from dsv4.formats.errors import RuntimeRefusal
from dsv4.runtime.draft import Draft
from dsv4.runtime.session import SequenceBase
from dsv4.runtime.text import drafting
from dsv4.runtime.text.drafting import (
    MOST_DRAFTS,
    Auto,
    Drafter,
    DraftLayers,
    Drafts,
    PromptLookup,
    Proposal,
    drafter,
    remark,
)
from tests.support.guesses import Guesses


def sequence(vocab: int, count: int, seed: int) -> list[int]:
    lot = random.Random(seed)
    return [lot.randrange(vocab) for _ in range(count)]


@pytest.mark.parametrize("vocab", [2, 3, 8, 40])
@pytest.mark.parametrize("most", [1, 2, 4])
def test_lookup_is_that_of_transformers(vocab: int, most: int) -> None:
    from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

    peer = PromptLookupCandidateGenerator(
        num_output_tokens=5, max_matching_ngram_size=most, max_length=1 << 20
    )
    ids, lookup, proposals = sequence(vocab, 120, seed=vocab), PromptLookup(most, least=1), 0
    for end in range(2, len(ids) + 1):
        found = lookup.propose(ids[:end], 5).ids
        wanted, _ = peer.get_candidates(torch.tensor([ids[:end]]))
        assert found == wanted[0, end:].tolist()
        proposals += bool(found)
    assert proposals > 30


def test_lookup_that_begins_later_finds_the_same() -> None:
    ids, lookup = sequence(4, 200, seed=1), PromptLookup()
    for end in sorted({*random.Random(2).sample(range(1, 200), 40), 200}):
        assert lookup.propose(ids[:end], 3) == PromptLookup().propose(ids[:end], 3)


def test_a_single_token_alike_is_not_enough() -> None:
    assert PromptLookup().propose([1, 2, 3, 9, 3], 4).ids == []
    assert PromptLookup().propose([1, 2, 3, 9, 2, 3], 4).ids == [9, 2, 3]
    assert PromptLookup().propose([7], 4).ids == []


def test_what_is_far_away_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptLookup, "REACH", 20)
    far = [1, 2, 3, *range(10, 30), 1, 2]
    assert PromptLookup().propose(far, 4).ids == []
    assert PromptLookup().propose([1, 2, 3, 10, 11, 1, 2], 4).ids == [3, 10, 11, 1]


# Seconds of a step by its rows: Flash on an H200, resident, and in proportion a CPU on which rows
# cost little, and experts behind a bus.
FLASH = (4.48, 5.4, 6.3, 7.1, 7.8, 8.45, 9.0, 9.65)
CPU = tuple(1 + 0.08 * row for row in range(8))
BUS = tuple(1 + 0.8 * row for row in range(8))
MACHINES = {"flash": FLASH, "cpu": CPU, "bus": BUS}


def played(
    seconds: Sequence[float], tokens: int, accepted: Callable[[int, int], int], most: int = 7
) -> tuple[float, Drafts, Drafter]:
    """Time against plain decoding of an answer whose round at token n with k drafts accepts so."""
    one = Drafter("a script", lambda: Guesses(lambda ids, count: [0] * count), most, auto=True)
    said, spent = 0, 0.0
    while said < tokens:
        drafts = len(one.propose([0], tokens - said - 1))
        right = min(accepted(said, drafts), drafts)
        spent += seconds[drafts]
        one.ran(drafts, right, seconds[drafts])
        said += 1 + right
    return spent / (said * seconds[0]), one.drafts, one


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("tokens", [20, 70, 400])
def test_accepting_nothing_costs_little(machine: str, tokens: int) -> None:
    """At most 5 % of an answer of some length; of a short one, the two rounds that show it."""
    time, drafts, _ = played(MACHINES[machine], tokens, lambda said, count: 0)
    tried = 1 + tokens // drafting.PAUSE
    assert 0 < drafts.rounds <= drafting.TRIES * tried
    two_rounds = (MACHINES[machine][2] + MACHINES[machine][1]) / MACHINES[machine][0] - 2
    assert time <= 1 + two_rounds * tried / tokens + 1e-9
    if tokens == 400:
        assert time <= 1.05


@pytest.mark.parametrize("machine", ["flash", "cpu"])
def test_accepting_everything_pays_and_goes_to_the_limit(machine: str) -> None:
    seconds = MACHINES[machine]
    time, drafts, _ = played(seconds, 400, lambda said, count: count)
    assert time < 1.15 * seconds[7] / seconds[0] / 8
    assert drafts.accepted == drafts.proposed and len(drafts.proposed) == 7


def test_a_rule_that_never_gives_up_would_cost_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "PAUSE", 0)
    assert played(FLASH, 400, lambda said, count: 0)[0] > 1.05


def test_it_comes_back_where_drafts_become_right() -> None:
    """Prose, then a quotation, then prose: probed again within PAUSE tokens."""
    rounds: list[tuple[int, int]] = []

    def accepted(said: int, count: int) -> int:
        rounds.append((said, count))
        return count if 200 <= said < 400 else 0

    time, _, _ = played(FLASH, 600, accepted)
    begun = min(said for said, count in rounds if said >= 200 and count)
    assert begun < 200 + drafting.PAUSE + 2
    assert max(count for said, count in rounds if 300 < said < 400) == 7
    assert sum(count > 0 for said, count in rounds if 420 < said < 600) <= 2 * drafting.TRIES
    assert time < 0.9


def test_nothing_is_drafted_before_a_plain_step_was_timed() -> None:
    auto = Auto(7)
    for _ in range(drafting.WARM):
        auto.ran(0, 0, 100.0, tried=False)
        assert auto.most == 0
    auto.ran(0, 0, 1.0, tried=False)
    assert auto.most == drafting.TRIES


def test_the_first_steps_of_a_size_are_not_timed() -> None:
    """They load and record what the others only replay: a round that took long tells nothing."""
    auto = Auto(7)
    for _ in range(drafting.WARM + 1):
        auto.ran(0, 0, 1.0, tried=False)
    for _ in range(drafting.WARM):
        auto.ran(2, 2, 1000.0, tried=True)
        assert auto.most > 0


def test_confidence_decides_how_many_rows_are_worth_it() -> None:
    """As long as its chance to be reached and right is above a row's cost: 0.2 at first."""
    auto = Auto(5)
    for _ in range(drafting.WARM + 1):
        auto.ran(0, 0, 1.0, tried=False)
    assert auto.worth([0.9, 0.9, 0.9, 0.2, 0.9]) == 3
    assert auto.worth([0.9, 0.9, 0.9, 0.9, 0.9]) == 5
    assert auto.worth([0.1, 0.9]) == 0
    lot = random.Random(3)
    for _ in range(200):  # what is behind a draft does not decide about it
        sure = [lot.random() for _ in range(5)]
        for end in range(6):
            assert auto.worth(sure[:end]) == min(auto.worth(sure), end)


def test_proposals_that_are_never_worth_a_row_are_not_made_for_long() -> None:
    """Proposing takes time, too: 0.2 of a step here."""

    class Unsure(Guesses):
        def propose(self, ids: Sequence[int], count: int) -> Proposal:
            super().propose(ids, count)
            return Proposal([0] * count, [0.01] * count)

    unsure = Unsure(lambda ids, count: [0] * count)
    one = Drafter("a script", lambda: unsure, 5, auto=True)
    for _ in range(400):
        before = unsure.asked
        assert one.propose([0], 100) == []
        one.ran(0, 0, 1.2 if unsure.asked > before else 1.0)
    assert 0 < unsure.asked < 40 and one.drafts.rounds == 0


def test_a_fixed_number_is_always_drafted() -> None:
    one = Drafter("a script", lambda: Guesses(lambda ids, count: [0] * count), 3, auto=False)
    for _ in range(50):
        assert len(one.propose([0], 100)) == 3
        one.ran(3, 0, 1.0)
    assert len(one.propose([0], 2)) == 2 and one.propose([0], 0) == []


def test_what_is_said_of_an_answer() -> None:
    drafts = Drafts("prompt lookup")
    for proposed, accepted in ((3, 2), (3, 0), (0, 0), (2, 2), (5, 1)):
        drafts.add(proposed, accepted, 0.010)
    assert (drafts.rounds, drafts.steps) == (4, 1)
    assert drafts.proposed == [4, 4, 3, 1, 1] and drafts.accepted == [3, 2, 0, 0, 0]
    assert drafts.mean_length == 1 + 5 / 4 and drafts.round_milliseconds == pytest.approx(10)
    assert drafts.line() == (
        "drafts by prompt lookup: 4 rounds, 2.25 tokens and 10.0 ms each, "
        "accepted 3/4, 2/4, 0/3, 0/1, 0/1"
    )
    said = drafts.to_dict()
    assert said["mean_length"] == 2.25 and said["proposed"] == [4, 4, 3, 1, 1]
    assert Drafts("x").line() == "" and Drafts("x").mean_length == 0


@pytest.mark.parametrize(
    ("proposed", "accepted", "sentence"),
    [
        (0, 0, "draft layers proposed nothing in 256 steps"),
        (2, 0, "0 of 512 drafts by draft layers were accepted in 256 rounds"),
    ],
)
def test_many_rounds_without_a_use_are_warned_of(
    proposed: int, accepted: int, sentence: str
) -> None:
    drafts = Drafts("draft layers")
    for _ in range(255):
        drafts.add(proposed, accepted, 1.0)
    assert drafts.warning() is None
    drafts.add(proposed, accepted, 1.0)
    assert str(drafts.warning()).startswith(sentence)
    good = Drafts("draft layers")
    for number in range(300):
        good.add(1, number % 2, 1.0)
    assert good.warning() is None


@dataclasses.dataclass
class LayeredSession:
    """Its draft layers say what they were asked."""

    most_drafts: int = 5
    experts_on_host: bool = False

    def propose(self, token: int, count: int) -> Draft:
        confidence = torch.tensor([0.0, 2.0, -2.0, 0.0, 0.0][:count])
        return Draft(torch.arange(token, token + count), torch.empty(count, 9), confidence)


def test_draft_layers_say_how_sure_they_are_as_a_chance() -> None:
    found = DraftLayers(LayeredSession()).propose([4, 7], 3)
    assert found.ids == [7, 8, 9] and found.confidence is not None
    assert found.confidence == pytest.approx([0.5, 0.8808, 0.1192], abs=1e-4)


def test_a_session_is_drafted_for_by_its_own_layers_where_it_has_some() -> None:
    own, none = drafter(LayeredSession(), 7), drafter(LayeredSession(most_drafts=0), 7)
    assert own is not None and own.drafts.proposer == "draft layers"
    assert len(own.propose([1], 100)) == 5  # as many as they have
    assert none is not None and none.drafts.proposer == "prompt lookup"
    assert none.propose([1, 2, 8, 9, 1, 2], 100) == [8, 9, 1, 2]
    assert SequenceBase.most_drafts == 0


def test_what_a_number_of_drafts_does_not_say_is_said() -> None:
    layers, none = LayeredSession(most_drafts=5), LayeredSession(most_drafts=0)
    assert remark(layers, 7) == "7 drafts were asked for; the draft layers propose 5 at most"
    assert "(prompt lookup)" in str(remark(none, 4))
    assert all(remark(layers, wish) is None for wish in ("auto", "off", 0, 5))
    assert all(remark(none, wish) is None for wish in ("auto", "off", 0))


def test_experts_behind_a_bus_are_drafted_for_only_if_asked() -> None:
    session = LayeredSession(experts_on_host=True)
    assert drafter(session, "auto") is None and drafter(session, 2) is not None
    assert drafter(LayeredSession(), "off") is None and drafter(LayeredSession(), 0) is None
    with pytest.raises(RuntimeRefusal, match="draft is 8, expected auto, off, or 0 to 7 tokens"):
        drafter(session, MOST_DRAFTS + 1)
