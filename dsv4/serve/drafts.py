"""Which sequences of a step are guessed ahead, and how far: rows that are free go where it pays.

A step has as many rows as it has; those that answers leave are shared among their drafts, the one
first whose chance to be reached and right is best. Nothing is drafted for an answer whose tokens
the backend cannot draw by their seed alone, nor where answers need all rows. A draft changes no
text (`runtime.text.drafting`).
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Sequence

from dsv4.runtime.text.drafting import (
    MOST_DRAFTS,
    UNTRIED,
    Auto,
    PromptLookup,
    Proposer,
    Wish,
    check_wish,
)
from dsv4.serve.backend import Backend
from dsv4.serve.run import Run

CHANCE = UNTRIED  # of a draft to be right, before any was tried
_NEW, _FORGOTTEN = 0.25, 1 / 64  # weight of what is new; of CHANCE, where nothing is tried


class Guesser:
    """Drafts of one answer. chance: of one to be right where those before it are, by its last ones;
    for a proposer that does not say itself how sure it is.
    """

    def __init__(self, proposer: Proposer) -> None:
        self._proposer, self.chance = proposer, CHANCE

    def propose(self, ids: Sequence[int], count: int) -> list[tuple[int, float]]:
        """At most `count` drafts behind `ids`, each with its chance to be reached and right."""
        proposal = self._proposer.propose(ids, count)
        sure = proposal.confidence
        each = [self.chance] * len(proposal.ids) if sure is None else sure
        return list(zip(proposal.ids, itertools.accumulate(each, operator.mul), strict=True))

    def ran(self, proposed: int, right: int) -> None:
        """The step is over. right: drafts of it that were, from the first one on."""
        for place in range(min(right + 1, proposed)):
            self.chance += _NEW * ((place < right) - self.chance)
        if not proposed:
            self.chance += _FORGOTTEN * (CHANCE - self.chance)


@dataclasses.dataclass(frozen=True)
class Share:
    """drafts: for each sequence of a step. tried: whether there was a proposal, run or not."""

    drafts: list[list[int]]
    tried: bool

    def __bool__(self) -> bool:
        return any(self.drafts)


class Drafting:
    """Of the sequences of `backend`. wish: how far, as for one sequence; `auto` looks at what steps
    of as many sequences gave and took, and is off where experts lie in host memory.

    guessers: by slot, None for an answer without drafts. Raises RuntimeRefusal for a wish that is
    not one.
    """

    def __init__(self, backend: Backend, wish: Wish) -> None:
        check_wish(wish)
        self._backend = backend
        self.layers = backend.most_drafts > 0
        most = MOST_DRAFTS if wish == "auto" else 0 if wish == "off" else int(wish)
        if self.layers:
            most = min(most, backend.most_drafts)
        self._most = 0 if wish == "auto" and backend.experts_on_host else most
        self._auto: dict[int, Auto] | None = {} if wish == "auto" else None
        self.guessers: list[Guesser | None] = [None] * backend.slots

    def begin(self, run: Run) -> None:
        """Its prompt is read."""
        job, slot = run.job, run.held.number
        by_seed = job.constraint is None and job.logprobs is None
        self.guessers[slot] = None
        if self._most and by_seed and job.sampler.host_reason() is None:
            own = self._backend.proposer(slot) if self.layers else PromptLookup()
            self.guessers[slot] = Guesser(own)

    def room(self, sequences: int) -> int:
        """Drafts that a step of so many sequences may have."""
        room = self._backend.most_rows - sequences
        if room < 1 or not self._most or not sequences:
            return 0
        return room if self._auto is None else min(room, self._auto_of(sequences).most)

    def share(self, runs: Sequence[Run]) -> Share:
        """Drafts for a step of `runs`, behind the tokens of theirs that are known."""
        room, found = self.room(len(runs)), []
        for place, run in enumerate(runs):
            # It ends with the last token that it may have, which no draft has to bring.
            count = min(self._most, room, run.limit - run.launched - 1)
            guesser = self.guessers[run.held.number]
            if guesser is not None and count > 0:
                proposed = guesser.propose(run.held.tokens, count)
                found += [
                    (-chance, ahead, place, draft) for ahead, (draft, chance) in enumerate(proposed)
                ]
        least = 0.0
        if found and self._auto is not None:
            least = self._auto_of(len(runs)).least()
        drafts: list[list[int]] = [[] for _ in runs]
        for chance, _, place, draft in sorted(found)[:room]:
            if -chance >= least:
                drafts[place].append(draft)
        for some, run in zip(drafts, runs, strict=True):
            ends = (at for at, draft in enumerate(some) if draft in run.job.stop_ids)
            del some[next(ends, len(some)) :]  # what comes behind an end is not wanted
        return Share(drafts, bool(found))

    def judge(self, run: Run, right: int) -> None:
        """A step of `run` is over: so many of its drafts are right."""
        guesser = self.guessers[run.held.number]
        if guesser is not None:
            guesser.ran(run.drafts, right)

    def ran(self, sequences: int, share: Share | None, right: int, seconds: float) -> None:
        """A step is over. share: of its drafts, None for a step before which none were looked for;
        right: how many of them were.
        """
        if self._auto is not None and sequences:
            proposed = 0 if share is None else sum(map(len, share.drafts))
            tried = share is not None and share.tried
            self._auto_of(sequences).ran(proposed, right, seconds, tried=tried)

    def _auto_of(self, sequences: int) -> Auto:
        assert self._auto is not None
        if sequences not in self._auto:
            most = min(self._backend.most_rows - sequences, sequences * self._most)
            self._auto[sequences] = Auto(max(most, 0), sequences)
        return self._auto[sequences]
