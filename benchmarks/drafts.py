"""`python -m benchmarks drafts`: how many tokens draft layers guess right, on text new to them.

Prompts are windows of held-out text, each continued by the model: greedily, and drawn at
temperatures. A round proposes as many tokens as the draft layers have; the model runs them all, and
those count as accepted that it draws itself, up to the first other one. The same answers are made
without drafts, and have to be the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.quality import HELD_OUT, read_windows
from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.threads import one_torch_thread
from dsv4.runtime.model import Model
from dsv4.runtime.session import Session
from dsv4.runtime.text.drafting import Drafter, DraftLayers, Proposal
from dsv4.runtime.text.generate import generate
from dsv4.runtime.text.sampling import Sampler

PROMPT = 256  # tokens, of a window of 512
TEMPERATURES = (0.0, 0.6, 1.0)
BINS = 5  # of confidence


@dataclasses.dataclass(frozen=True)
class Round:
    """confidence: of the drafts that were run. accepted: so many of them."""

    confidence: tuple[float, ...]
    accepted: int

    @property
    def judged(self) -> list[tuple[float, bool]]:
        """(confidence, right) of the drafts whose predecessors were right."""
        seen = self.confidence[: self.accepted + 1]
        return [(sure, place < self.accepted) for place, sure in enumerate(seen)]


@dataclasses.dataclass(frozen=True)
class Bin:
    """Drafts of similar confidence, of those whose predecessors were right."""

    count: int
    confidence: float
    accepted: float


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """At one temperature. reached: shares of rounds in which the first 1, 2, ... drafts were
    accepted, of those that had so many; length: tokens a round, with the one the model gives;
    error: mean distance of confidence and acceptance over bins, by their count.
    """

    temperature: float
    rounds: int
    length: float
    reached: tuple[float, ...]
    bins: tuple[Bin, ...]
    error: float
    same_text: bool

    @classmethod
    def of(cls, temperature: float, rounds: Sequence[Round], *, same_text: bool) -> Acceptance:
        """From at least one round."""
        most = max(len(one.confidence) for one in rounds)
        reached = []
        for place in range(most):
            had = [one.accepted > place for one in rounds if len(one.confidence) > place]
            reached.append(sum(had) / len(had))
        judged = [pair for one in rounds for pair in one.judged]
        bins = [
            _bin([pair for pair in judged if min(int(pair[0] * BINS), BINS - 1) == number])
            for number in range(BINS)
        ]
        error = sum(one.count * abs(one.confidence - one.accepted) for one in bins) / len(judged)
        length = 1 + sum(one.accepted for one in rounds) / len(rounds)
        return cls(temperature, len(rounds), length, tuple(reached), tuple(bins), error, same_text)


class _Sure(DraftLayers):
    """The draft layers, which leave how sure they were."""

    confidence: Sequence[float] = ()

    def propose(self, ids: Sequence[int], count: int) -> Proposal:
        """See `Proposer`."""
        proposal = super().propose(ids, count)
        if proposal.confidence is None:
            raise RuntimeRefusal(
                "the draft layers do not say how sure they are, expected DSpark's, which do"
            )
        self.confidence = proposal.confidence
        return proposal


class _Watched(Drafter):
    """Always drafts all that it can, and writes down what came of it."""

    def __init__(self, session: Session) -> None:
        self._sure = _Sure(session)
        self.rounds: list[Round] = []
        super().__init__("draft layers", lambda: self._sure, session.most_drafts, auto=False)

    def ran(self, proposed: int, accepted: int, seconds: float) -> None:
        """See `Drafter`."""
        super().ran(proposed, accepted, seconds)
        if proposed:
            self.rounds.append(Round(tuple(self._sure.confidence[:proposed]), accepted))


def acceptance(
    model: Model,
    directory: str | Path,
    prompts: int,
    tokens: int,
    temperatures: Sequence[float] = TEMPERATURES,
    progress: Callable[[str], None] | None = None,
) -> list[Acceptance]:
    """What `model`, a store of the checkpoint `directory`, makes of its own drafts.

    prompts: windows of heldout.txt; tokens: of each answer. Raises RuntimeRefusal where the model
    has no DSpark layers or the text is missing.
    """
    directory = Path(directory)
    tell = progress or (lambda _: None)
    windows = read_windows(directory, directory / HELD_OUT, 1 << 20)
    chosen = windows[:: max(len(windows) // prompts, 1)][:prompts, :PROMPT].tolist()
    if not model.session(1).most_drafts:
        raise RuntimeRefusal(f"{directory} has no draft layers, so nothing can be accepted")
    found = []
    with one_torch_thread():
        for temperature in temperatures:
            tell(f"temperature {temperature}")
            found.append(_at(model, chosen, tokens, temperature))
    return found


def _at(model: Model, prompts: list[list[int]], tokens: int, temperature: float) -> Acceptance:
    rounds: list[Round] = []
    same = True
    for seed, prompt in enumerate(prompts):
        answers = []
        for drafted in (True, False):
            session = model.session(PROMPT + tokens)
            watched = _Watched(session) if drafted else None
            sampler = Sampler(temperature, seed=seed)
            stops = model.config.eos_token_ids
            answers.append(list(generate(session, prompt, tokens, sampler, stops, drafter=watched)))
            rounds += watched.rounds if watched else []
        same &= answers[0] == answers[1]
    return Acceptance.of(temperature, rounds, same_text=same)


def _bin(pairs: list[tuple[float, bool]]) -> Bin:
    count = len(pairs)
    sums = [sum(part) / max(count, 1) for part in zip(*pairs, strict=True)] or [0.0, 0.0]
    return Bin(count, sums[0], sums[1])


def acceptance_table(found: Sequence[Acceptance]) -> Table:
    """A line a temperature."""
    table = Table(title="drafts on held-out text, all of them always run", title_justify="left")
    most = max(len(one.reached) for one in found)
    columns = ["temperature", "rounds", "tokens a round"]
    columns += [f"first {place + 1}" for place in range(most)]
    for column in (*columns, "same text"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in found:
        table.add_row(
            f"{one.temperature:g}",
            str(one.rounds),
            f"{one.length:.2f}",
            *(f"{share:.1%}" for share in one.reached),
            "yes" if one.same_text else "NO",
        )
    return table


def confidence_table(found: Sequence[Acceptance]) -> Table:
    """Measured acceptance by confidence, a column a temperature."""
    table = Table(
        title="accepted by confidence, where all before was accepted: share / mean confidence",
        title_justify="left",
    )
    table.add_column("confidence")
    for one in found:
        table.add_column(f"temperature {one.temperature:g}", justify="right", no_wrap=True)
    for number in range(BINS):
        bins = [one.bins[number] for one in found]
        table.add_row(
            f"{number / BINS:.1f} to {(number + 1) / BINS:.1f}",
            *(f"{b.accepted:.2f} / {b.confidence:.2f} of {b.count}" for b in bins),
        )
    table.add_row("mean distance", *(f"{one.error:.3f}" for one in found))
    return table
