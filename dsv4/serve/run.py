"""A job on its way, and the slot that holds its tokens."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence

from dsv4.formats.errors import RuntimeRefusal
from dsv4.serve.jobs import Deliver, Event, Finish, Job, TokenLogprob
from dsv4.serve.prefix_cache import Keys, Node, common


@dataclasses.dataclass(eq=False)
class Slot:
    """A place for a sequence in the backend.

    tokens: those that it holds, and behind them those that are drawn and not appended yet.
    position: how many were appended. cold: how many of these were computed as those of a prompt
    are of which nothing is remembered; prompt: how many the last sequence began with. floor: no
    going back before it; written: the farthest position that was written since. holder: the
    sequence that has it; without one, the tokens stay for whoever goes on from them. used: when it
    was last given away.
    """

    number: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    position: int = 0
    cold: int = 0
    prompt: int = 0
    floor: int = 0
    written: int = 0
    salt: bytes = b""
    holder: Run | None = None
    used: int = 0

    def reusable(
        self, ids: Sequence[int], salt: bytes, slack: int, least: int, *, cold: bool
    ) -> int:
        """How many of the tokens another prompt may go on from; at least one is left to read.

        A prompt that goes on behind an answer takes what that left, unless it must be `cold`. Any
        other gives the bytes that it gives when nothing is remembered: `least` tokens are left.
        """
        if self.salt != salt:
            return 0
        found = min(common(self.tokens[: self.position], ids), len(ids) - 1)
        if cold or found <= self.prompt:
            found = min(found, self.cold)
        if found <= self.cold:
            found = max(min(found, len(ids) - least), 0)
        reached = self.written - found <= slack and found >= self.floor
        return found if reached else 0

    def went_to(self, position: int, *, cold: bool) -> None:
        """The backend has appended tokens up to there; cold: as in a prompt."""
        if cold and self.cold == self.position:
            self.cold = position
        self.position = position
        self.written = max(self.written, position)

    def empty(self, position: int = 0) -> None:
        """It holds a new sequence, of which `position` tokens were put there at once."""
        self.position = self.cold = self.floor = self.written = position

    def go_back(self, position: int) -> None:
        """The backend has forgotten the tokens from there on."""
        self.position, self.cold = position, min(self.cold, position)

    def leave(self) -> None:
        """The sequence has ended; what it holds stays."""
        self.holder = None
        del self.tokens[self.position :]


class Run:
    """A job that was taken. `cancel` may be called from any thread; all else is the engine's.

    limit: most tokens of the answer. launched: tokens that were drawn, or are being; told: that
    were told. drafts: how many its last step had.
    start: tokens of the slot that it goes on from. cached: tokens that were not computed;
    kept: those that a state was considered for. shared,
    behind: what it has in common with a sequence before it, which it waits for while that pays.
    """

    def __init__(self, job: Job, deliver: Deliver, capacity: int, wake: Callable[[], None]) -> None:
        self.job, self.deliver, self._wake = job, deliver, wake
        self.ids = list(job.ids)
        self.limit = min(job.max_new_tokens, capacity - len(self.ids))
        self.launched = self.told = self.start = self.cached = self.kept = self.shared = 0
        self.overtaken = self.turn = self.drafts = 0
        self.slot: Slot | None = None
        self.begun = self.ended = False
        self.behind: Run | None = None
        self.marks: set[int] = set()
        self.keys: Keys | None = None
        self.passing: list[Node] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        self.submitted = self.began = self.answered = 0.0
        self._cancelled = threading.Event()
        self._first = True

    def cancel(self) -> None:
        """See `jobs.Ticket`."""
        self._cancelled.set()
        self._wake()

    @property
    def cancelled(self) -> bool:
        """Whether it is to end."""
        return self._cancelled.is_set()

    @property
    def held(self) -> Slot:
        """The slot, once it has one."""
        assert self.slot is not None
        return self.slot

    @property
    def left(self) -> int:
        """Tokens of the prompt still to be read."""
        return len(self.ids) - (self.held.position if self.begun else self.start)

    @property
    def goes_on(self) -> bool:
        """Whether another token is wanted behind those that are being drawn."""
        return self.launched < self.limit

    def waits(self) -> bool:
        """Whether somebody reads what it needs too, and that takes less than it saves."""
        before = self.behind
        if before is None or self.begun or before.ended or before.left <= 0:
            return False
        return before.left <= self.shared - self.start

    def tell(
        self,
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
        finish: Finish | None = None,
        error: str | None = None,
    ) -> None:
        """Deliver an event. What whoever takes it raises ends this sequence alone."""
        self.told += len(tokens)
        event = Event(tokens, logprobs, finish=finish, error=error)
        if self._first:
            found = tuple(self.prompt_logprobs)
            event = dataclasses.replace(event, cached_tokens=self.cached, prompt_logprobs=found)
            self._first, self.prompt_logprobs = False, []
        self.ended = self.ended or finish is not None
        self.deliver(event)


def checked(job: Job, capacity: int, vocab: int) -> None:
    """Raise RuntimeRefusal for a job that can never run."""
    count = len(job.ids)
    if count == 0:
        raise RuntimeRefusal("the prompt is empty, expected at least one token")
    strange = [token for token in job.ids if not 0 <= token < vocab]
    if strange:
        raise RuntimeRefusal(f"token id {strange[0]} is not in the vocabulary of {vocab} ids")
    if job.max_new_tokens < 0:
        raise RuntimeRefusal(f"max_new_tokens is {job.max_new_tokens}, expected at least 0")
    if job.logprobs is not None and job.logprobs < 0:
        raise RuntimeRefusal(f"logprobs is {job.logprobs}, expected at least 0")
    if count + min(job.max_new_tokens, 1) > capacity:
        raise RuntimeRefusal(
            f"the prompt has {count} tokens, and with its answer a sequence may have {capacity}; "
            "shorten it, or serve with a larger --max-seq-len"
        )
