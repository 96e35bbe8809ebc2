"""Tokens that are guessed ahead: who guesses, how far, and whether it pays.

A draft is a guess of what the model will say. `generate` runs it in the step of the token before,
where one more row costs little, and keeps what the model itself then draws: nothing here changes a
text, only its pace. `auto` drafts as long as steps of several rows give more tokens than steps of
one would have in their time.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from dsv4.formats.errors import RuntimeRefusal
from dsv4.kernels.core.sizes import STEP_ROWS
from dsv4.runtime.draft import Draft

MOST_DRAFTS = STEP_ROWS - 1
"""Of a step, which is the token that is certain and its drafts."""

Wish = Literal["auto", "off"] | int
"""How far to draft: as it pays, not at all, or always so many tokens."""


class Proposal(NamedTuple):
    """Guesses for the tokens that come next. confidence: how likely each is to be right where those
    before it are; None if nobody knows.
    """

    ids: list[int]
    confidence: list[float] | None = None


class Proposer(Protocol):
    """Guesses, for one answer."""

    def propose(self, ids: Sequence[int], count: int) -> Proposal:
        """At most `count` guesses of what follows `ids`: all tokens so far, the last not fed yet.

        It has been called with the beginning of `ids` before, or not at all.
        """


class PromptLookup:
    """What followed when the last few tokens were there before (Saxena 2023, "prompt lookup").

    The longest run of tokens that is found again counts, `most` at most and `least` at least, where
    it was first. Helps where an answer quotes or repeats; elsewhere it has nothing to say. The last
    `REACH` tokens are looked at.
    """

    REACH = 1 << 16

    def __init__(self, most: int = 4, least: int = 2) -> None:
        self._most, self._least = most, least
        self._ids = np.empty(0, np.int32)
        self._known = 0

    def propose(self, ids: Sequence[int], count: int) -> Proposal:
        """See `Proposer`."""
        end = len(ids)
        if end > len(self._ids):
            self._ids = np.resize(self._ids, 2 * end)
        self._ids[self._known : end] = ids[self._known : end]
        self._known = end
        known = self._ids[max(end - self.REACH, 0) : end]
        places = np.flatnonzero(known[:-1] == known[-1])  # of the last token of a run
        found = None
        for length in range(1, self._most + 1):
            places = places[places >= length - 1]
            places = places[known[places - length + 1] == known[-length]]
            if not len(places):
                break
            if length >= self._least:
                found = int(places[0])
        return Proposal([] if found is None else known[found + 1 :][:count].tolist())


class ProposingSession(Protocol):
    """A session whose store has draft layers."""

    def propose(self, token: int, count: int) -> Draft:
        """See `runtime.session.SequenceBase.propose`."""


class DraftLayers:
    """The store's own draft layers."""

    def __init__(self, session: ProposingSession) -> None:
        self._session = session

    def propose(self, ids: Sequence[int], count: int) -> Proposal:
        """See `Proposer`."""
        draft = self._session.propose(ids[-1], count)
        sure = draft.confidence
        return Proposal(
            draft.ids.tolist(), None if sure is None else sure.double().sigmoid().tolist()
        )


@dataclasses.dataclass
class Drafts:
    """What came of drafting in an answer.

    proposer: "draft layers", "prompt lookup", ... rounds: steps with at least one draft; steps:
    those without. proposed, accepted: drafts by their place behind the token that was certain.
    seconds: of the rounds, with their proposals and draws.
    """

    proposer: str
    rounds: int = 0
    steps: int = 0
    proposed: list[int] = dataclasses.field(default_factory=list)
    accepted: list[int] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def mean_length(self) -> float:
        """Tokens a round, the one that needs no draft included; 0 before there was a round."""
        return 1 + sum(self.accepted) / self.rounds if self.rounds else 0.0

    @property
    def round_milliseconds(self) -> float:
        """Of a round, in the mean."""
        return 1000 * self.seconds / self.rounds if self.rounds else 0.0

    def add(self, proposed: int, accepted: int, seconds: float) -> None:
        """A step is over, in which so many drafts were run."""
        if not proposed:
            self.steps += 1
            return
        self.rounds += 1
        self.seconds += seconds
        for counts, count in ((self.proposed, proposed), (self.accepted, accepted)):
            counts += [0] * (proposed - len(counts))
            for place in range(count):
                counts[place] += 1

    def line(self) -> str:
        """For people; empty where no round had a draft."""
        if not self.rounds:
            return ""
        places = zip(self.accepted, self.proposed, strict=True)
        accepted = ", ".join(f"{right}/{all_}" for right, all_ in places)
        rounds = "1 round" if self.rounds == 1 else f"{self.rounds} rounds"
        return (
            f"drafts by {self.proposer}: {rounds}, {self.mean_length:.2f} tokens and "
            f"{self.round_milliseconds:.1f} ms each, accepted {accepted}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self) | {
            "mean_length": self.mean_length,
            "round_milliseconds": self.round_milliseconds,
        }

    def warning(self) -> str | None:
        """Of many steps nothing was drafted, or hardly a draft was right: a sentence."""
        if not self.rounds and self.steps >= _MANY:
            return (
                f"{self.proposer} proposed nothing in {self.steps} steps, expected drafts in most; "
                "--draft off does without"
            )
        if self.rounds >= _MANY and self.mean_length < _POOR:
            return (
                f"{sum(self.accepted)} of {sum(self.proposed)} drafts by {self.proposer} were "
                f"accepted in {self.rounds} rounds, expected at least one in "
                f"{1 / (_POOR - 1):.0f} rounds; --draft off is faster"
            )
        return None


_MANY, _POOR = 256, 1.1  # steps that say enough; tokens a round that drafting is not worth


class Drafter:
    """Drafts for the answers of one session.

    proposer: makes one for an answer; name: what it is called. most: drafts of a round. auto:
    whether to draft only where it pays. drafts: what came of it in the present answer.
    """

    def __init__(
        self, name: str, proposer: Callable[[], Proposer], most: int, *, auto: bool
    ) -> None:
        self._name, self._make, self._most = name, proposer, most
        self._auto = Auto(most) if auto else None
        self._proposer = proposer()
        self._tried = False
        self.drafts = Drafts(name)

    def begin(self) -> None:
        """An answer begins."""
        self._proposer, self.drafts = self._make(), Drafts(self._name)

    def propose(self, ids: Sequence[int], room: int) -> list[int]:
        """Drafts for the next step, at most `room`, behind the last of `ids`; often none."""
        auto = self._auto
        most = min(self._most if auto is None else auto.most, room)
        self._tried = False
        if most < 1:
            return []
        proposal = self._proposer.propose(ids, most)
        self._tried = bool(proposal.ids)
        worth = most
        if auto is not None and proposal.confidence is not None:
            worth = min(auto.worth(proposal.confidence), most)
        return proposal.ids[:worth]

    def ran(self, proposed: int, accepted: int, seconds: float) -> None:
        """The step is over. accepted: drafts that the model drew too; seconds: with proposing."""
        self.drafts.add(proposed, accepted, seconds)
        if self._auto is not None:
            self._auto.ran(proposed, accepted, seconds, tried=self._tried)


# What a row beside others costs, of a step, until it has been timed: of Flash on an H200 1.0 ms of
# 4.5 for the second, and less for those behind it.
ROW_COST = 0.2
UNTRIED = 0.5  # a draft of such a chance is run where none was timed, whatever it may cost
TRIES, PAUSE = 2, 64  # rounds until it is judged; tokens until it is tried again
WARM = 2  # steps of a size that are not timed: a GPU loads code in the first and records the second
_NEW = 0.25  # weight of what is new in a mean


class Auto:
    """How many drafts a round is to have, by what the last ones gave. sequences: that go on in it;
    drafts are those of all of them.

    Times are measured, so that one rule serves a GPU, a CPU and experts behind a bus. Few drafts at
    first; two more when all were right, one less when not, unless they say how likely they are.
    Where rounds give fewer tokens than plain steps would in their time, none for a while.
    """

    def __init__(self, most: int, sequences: int = 1) -> None:
        self._limit, self._sequences = most, sequences
        self._untimed = ROW_COST / (1 + ROW_COST * (sequences - 1))  # of a row, of their step
        self._seconds: dict[int, float] = {}  # of a step, by its kind
        self._seen: Counter[int] = Counter()
        self._pause = 0
        self._sure = False  # whether proposals say how likely they are, which decides then
        self._length, self._rounds = min(TRIES, most), 0
        self._tokens = self._cost = 1.0  # of a round: tokens each, time in plain steps

    @property
    def most(self) -> int:
        """Drafts of the next round. None before a plain step was timed, to compare with."""
        return 0 if self._pause or 1 not in self._seconds else self._length

    def worth(self, confidence: Sequence[float]) -> int:
        """How many drafts to run: as long as one's chance to be reached and right is worth its row.

        Looks at a draft and those before it only.
        """
        least = self.least()
        chances = itertools.accumulate(confidence, operator.mul)
        return len(list(itertools.takewhile(lambda chance: chance >= least, chances)))

    def least(self) -> float:
        """The chance at which a draft is worth its row: the tokens that its time would give
        otherwise. Who asks cuts by it from then on.
        """
        self._sure = True
        found = self._row_cost() * self._sequences * self._tokens / self._cost
        return found if max(self._seconds) > 1 else min(found, UNTRIED)

    def ran(self, proposed: int, accepted: int, seconds: float, *, tried: bool) -> None:
        """A step is over. tried: whether there was a proposal, run or not."""
        kind = 1 + proposed if proposed or not tried else 0  # 0: nothing of a proposal was worth it
        self._time(kind, seconds)
        if self._pause:
            self._pause = max(self._pause - 1 - accepted, 0)
            return
        if not tried:
            return
        cost = 1 + self._untimed * proposed
        if kind in self._seconds:
            cost = self._seconds[kind] / self._seconds[1]
        self._cost += _NEW * (cost - self._cost)
        self._tokens += _NEW * (1 + accepted / self._sequences - self._tokens)
        more = self._limit if self._sure else 2 if accepted == proposed else -1
        self._length = min(max(self._length + more, 1), self._limit)
        self._rounds += 1
        if self._rounds >= TRIES and self._tokens < self._cost:
            self._pause = PAUSE
            self._length, self._rounds = min(TRIES, self._limit), 0
            self._tokens = self._cost = 1.0

    def _time(self, kind: int, seconds: float) -> None:
        self._seen[kind] += 1
        if self._seen[kind] > WARM:
            before = self._seconds.setdefault(kind, seconds)
            self._seconds[kind] = before + _NEW * (seconds - before)

    def _row_cost(self) -> float:
        most = max(self._seconds)
        if most == 1:
            return self._untimed
        return (self._seconds[most] / self._seconds[1] - 1) / (most - 1)


class DraftingSession(ProposingSession, Protocol):
    """What `drafter` looks at."""

    most_drafts: int
    experts_on_host: bool


def drafter(session: DraftingSession, wish: Wish) -> Drafter | None:
    """As wished: by the session's draft layers, or by prompt lookup where it has none.

    `auto` is none where experts lie in host memory: every row of a step brings its own over the
    bus. Raises RuntimeRefusal for a wish that is not one.
    """
    check_wish(wish)
    if wish in ("off", 0) or (wish == "auto" and session.experts_on_host):
        return None
    most = MOST_DRAFTS if wish == "auto" else int(wish)
    auto = wish == "auto"
    if session.most_drafts:
        layers = min(most, session.most_drafts)
        return Drafter("draft layers", lambda: DraftLayers(session), layers, auto=auto)
    return Drafter("prompt lookup", PromptLookup, most, auto=auto)


def remark(session: DraftingSession, wish: Wish) -> str | None:
    """What becomes of a wish for so many drafts that its number does not say: a sentence."""
    if isinstance(wish, str) or not wish:
        return None
    if not session.most_drafts:
        return (
            "no draft layers are loaded: drafts come from what followed the last tokens before "
            "(prompt lookup), and there are none where nothing is repeated"
        )
    if wish > session.most_drafts:
        return (
            f"{wish} drafts were asked for; the draft layers propose {session.most_drafts} at most"
        )
    return None


def check_wish(wish: object) -> None:
    """Raise RuntimeRefusal for anything but auto, off, and numbers of drafts that a step has."""
    if wish in ("auto", "off"):
        return
    if isinstance(wish, bool) or not isinstance(wish, int) or not 0 <= wish <= MOST_DRAFTS:
        raise RuntimeRefusal(
            f"draft is {wish!r}, expected auto, off, or 0 to {MOST_DRAFTS} tokens: a step has "
            f"{MOST_DRAFTS + 1} rows, of which one is the token before them"
        )
