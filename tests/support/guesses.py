"""Drafts that are as right as a test wants them to be."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from dsv4.runtime.text.drafting import Drafter, Proposal

Script = Callable[[Sequence[int], int], list[int]]


class Guesses:
    """Says what `script` does. asked: how often it was."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.asked = 0

    def propose(self, ids: Sequence[int], count: int) -> Proposal:
        """See `Proposer`."""
        self.asked += 1
        return Proposal(self._script(ids, count))


def right(whole: Sequence[int], most: int = 1 << 30, vocab: int = 99) -> Script:
    """What comes in `whole`, the prompt and its plain answer; from draft `most` on, never that."""

    def script(ids: Sequence[int], count: int) -> list[int]:
        following = list(whole[len(ids) : len(ids) + count])
        following += [0] * (count - len(following))
        return [id if n < most else (id + 1) % vocab for n, id in enumerate(following)]

    return script


def chancy(whole: Sequence[int], share: float, vocab: int = 99, seed: int = 0) -> Script:
    """A number of drafts and of right ones among them by lot; each right with this chance."""
    lot = random.Random(seed)

    def script(ids: Sequence[int], count: int) -> list[int]:
        following = right(whole)(ids, lot.randint(0, count))
        return [id if lot.random() < share else lot.randrange(vocab) for id in following]

    return script


def always(script: Script, most: int) -> Drafter:
    """Drafts so many tokens in every round, whatever comes of it."""
    return Drafter("a script", lambda: Guesses(script), most, auto=False)
