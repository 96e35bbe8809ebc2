"""Many sequences in one backend: who has a slot, who reads a chunk, and steps of all that answer.

`turn` does one thing: a chunk of one prompt, or a round, in which every sequence that answers gets
a token. A round launches the next step before it reads the tokens of the last one: a sequence that
turns out to have ended has wasted a row. A round with drafts has to know the last tokens, and what
came of its drafts before anything else: it reads both. Not for concurrent use;
`engine.ServeEngine` is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable

from torch import Tensor

from dsv4.runtime.text.drafting import Wish
from dsv4.serve import logprobs
from dsv4.serve.backend import Backend, Draw, Drawn
from dsv4.serve.drafts import Drafting
from dsv4.serve.jobs import Finish, Stats, TokenLogprob
from dsv4.serve.order import Pace, chunk_end, groups, next_prompt
from dsv4.serve.prefix_cache import common
from dsv4.serve.remembering import Remembering
from dsv4.serve.run import Run, Slot

NOT_FINITE = (
    "the model's logits hold NaN or infinity, expected finite numbers; `dsv4 validate` tells "
    "whether the packed checkpoint is damaged"
)


@dataclasses.dataclass(frozen=True)
class Sharing:
    """How prompts and answers share the time. max_pause: seconds that one who answers waits for a
    token because of somebody's prompt; share: of the time that prompts leave to answers.
    """

    max_pause: float = 0.2
    share: float = 0.5


class Scheduler:
    """clock: seconds, of which only differences matter. draft: tokens that are guessed ahead."""

    def __init__(
        self,
        backend: Backend,
        remembering: Remembering,
        sharing: Sharing | None = None,
        clock: Callable[[], float] = time.monotonic,
        draft: Wish = "off",
    ) -> None:
        self.backend, self.remembering, self.clock = backend, remembering, clock
        self.drafting = Drafting(backend, draft)
        self.sharing = sharing or Sharing()
        self.slots = [Slot(number) for number in range(backend.slots)]
        self.waiting: deque[Run] = deque()
        self.reading: list[Run] = []
        self.running: list[Run] = []
        self._drawn: list[tuple[list[Run | None], Drawn]] = []
        least = max(backend.block, 2 * backend.least_chunk)
        self._pace = Pace(backend.chunk, min(least, backend.chunk))
        self._turns = 0
        self._rounds = 0  # since the last chunk
        self._steady = 0  # sequences of the last turn's step, which the next one waits for
        self._round_seconds = 0.0
        self._answers_until = 0.0
        self._sums = Stats(slots=backend.slots, finished=dict.fromkeys(Finish, 0))

    def submit(self, run: Run) -> None:
        """Take a checked job."""
        run.submitted = self.clock()
        run.keys = self.remembering.keys(run.job.salt)
        self.waiting.append(run)

    def turn(self) -> bool:
        """Do what is next. False if there was nothing to do."""
        self._turns += 1
        for run in [one for one in self._all() if one.cancelled]:
            self._end(run, Finish.CANCELLED)
        self._admit()
        answers = bool(self.running or self._drawn)
        due = self._rounds > 0 and self.clock() >= self._answers_until
        if self.reading and (not answers or due):
            self._read(next_prompt([run for run in self.reading if not run.waits()]))
        elif answers:
            self._round()
        else:
            return False
        return True

    def fail(self, error: str) -> None:
        """Nothing can be run any more: tell everybody."""
        self._drawn.clear()
        for run in self._all():
            self._end(run, Finish.FAILED, error)

    def cancel(self) -> None:
        """End everybody's."""
        for run in self._all():
            run.cancel()

    def stats(self) -> Stats:
        """Now. May be read from any thread."""
        cache = self.remembering.cache
        answering, reading = len(self.running), len(self.reading)
        return dataclasses.replace(
            self._sums,
            running=answering + reading,
            reading=reading,
            waiting=len(self.waiting),
            kept=sum(slot.holder is None and slot.position > 0 for slot in self.slots),
            remembered_blocks=0 if cache is None else cache.blocks,
            remembered_bytes=0 if cache is None else cache.held_bytes,
            finished=dict(self._sums.finished),
        )

    def _all(self) -> list[Run]:
        return [*self.running, *self.reading, *self.waiting]

    def _admit(self) -> None:
        """Give free slots to those who wait, in order of arrival."""
        while self.waiting:
            free = [slot for slot in self.slots if slot.holder is None]
            if not free:
                return
            run = self.waiting[
                0
            ]  # until it is somewhere else: who is nowhere is not told of a failure
            slot, run.start = self.remembering.choose(run, free)
            self._meet(run)
            slot.holder, slot.used, slot.salt = run, self._turns, run.job.salt
            slot.tokens, slot.prompt = list(run.ids), len(run.ids)
            run.slot = slot
            self.reading.append(self.waiting.popleft())

    def _meet(self, run: Run) -> None:
        """Find who reads the longest beginning that it has too."""
        if self.remembering.cache is None or run.job.prompt_logprobs:
            return
        for other in self.reading:
            if other.job.salt == run.job.salt:
                alike = self.remembering.usable(common(other.ids, run.ids), len(run.ids))
                if alike > max(run.shared, run.start):
                    run.shared, run.behind = alike, other
        if run.behind is not None:
            run.behind.marks.add(run.shared)

    def _read(self, run: Run) -> None:
        """A chunk of its prompt; with the last one, the first token of its answer."""
        answering, self._steady = bool(self.running), 0
        self._hear()
        start = self.clock()
        slot = run.held
        if not run.begun:
            self._begin(run, slot)
        limit = self._pace.most
        if answering:
            # The token behind the chunk is told when the round after it has begun.
            limit = self._pace.tokens(self.sharing.max_pause - 2 * self._round_seconds)
        position = slot.position
        end = chunk_end(position, len(run.ids), limit, self.backend.block, self.backend.least_chunk)
        self.backend.read(
            slot.number,
            run.ids[position:end],
            marks=sorted(mark for mark in run.marks if position < mark <= end),
            reached=lambda mark: self.remembering.keep(run, mark),
            logits=self._prompt_logprobs(run) if run.job.prompt_logprobs else None,
        )
        slot.went_to(end, cold=end - position >= self.backend.least_chunk)
        self.remembering.read(run)
        run.turn = self._turns
        if end == len(run.ids):
            self._answer(run)
        self.backend.synchronize()
        seconds = self.clock() - start
        self._pace.took(end - position, seconds)
        share = self.sharing.share
        self._answers_until = self.clock() + seconds * share / (1 - share)
        self._rounds = 0

    def _begin(self, run: Run, slot: Slot) -> None:
        run.began = self.clock()
        run.begun = True
        self.remembering.begin(run)
        self._count(
            queue_seconds=run.began - run.submitted,
            prompt_tokens=len(run.ids),
            cached_tokens=run.cached,
        )

    def _prompt_logprobs(self, run: Run) -> Callable[[Tensor], None]:
        def look(rows: Tensor) -> None:
            first = len(run.prompt_logprobs) + 1
            following = run.ids[first : first + rows.shape[0]]
            if following:
                found = logprobs.of_rows(rows[: len(following)], following, run.job.logprobs or 0)
                run.prompt_logprobs += found

        return look

    def _answer(self, run: Run) -> None:
        """The prompt is read."""
        self.reading.remove(run)
        self.running.append(run)
        if run.limit == 0:
            return self._end(run, Finish.LENGTH)
        run.job.sampler.begin(run.ids)
        self.backend.begin(run.held.number, run.job.sampler)
        self.drafting.begin(run)
        self._draw([run])
        return None

    def _round(self) -> None:
        """A token of everybody who answers, or more with drafts."""
        start, drafting = self.clock(), self.drafting
        ready, share = self._ready(), None
        if drafting.room(len(ready)) and (drafting.layers or drafting.share(ready)):
            self._hear()
            start, ready = self.clock(), self._ready()
            share = drafting.share(ready)
        right = 0
        if share is not None and share.tried:
            right = self._together(ready, share.drafts)
        else:
            share = None
            self._plain(ready)
        seconds = self.clock() - start
        if share is not None or self._steady == len(ready):
            drafting.ran(len(ready), share, right, seconds)
        self._steady = len(ready) if share is None else 0
        self._rounds += 1
        self._round_seconds = seconds

    def _ready(self) -> list[Run]:
        return [run for run in self.running if run.goes_on]

    def _together(self, group: list[Run], drafts: list[list[int]]) -> int:
        """A step with drafts, and what was drawn in it; -> how many drafts are right."""
        self.backend.forward([run.held.number for run in group], drafts)
        for run, some in zip(group, drafts, strict=True):
            run.drafts = len(some)
            cold = self.backend.least_chunk == 1
            run.held.went_to(run.held.position + 1 + run.drafts, cold=cold)
        self._count(steps=1, rows=len(group) + sum(map(len, drafts)))
        before = self._sums.right_drafts
        self._draw(group)
        self._hear()
        return self._sums.right_drafts - before

    def _plain(self, ready: list[Run]) -> None:
        """A token each, which is read when the next step has begun."""
        for part in groups(len(ready), self.backend.most_rows):
            group = [run for run in ready[part] if not run.ended]
            if not group:
                continue
            self.backend.forward([run.held.number for run in group])
            for run in group:
                run.held.went_to(run.held.position + 1, cold=self.backend.least_chunk == 1)
            self._count(steps=1, rows=len(group))
            self._hear()
            self._draw(group)
            for run in group:
                self.drafting.judge(run, 0)
        if not ready:
            self._hear()

    def _draw(self, group: list[Run]) -> None:
        """Begin the draws of those of the last step that have not ended meanwhile."""
        wanted: list[Run | None] = []
        draws: list[Draw | None] = []
        for run in group:
            draw = None if run.ended else self._draw_of(run)
            draws.append(draw)
            wanted.append(None if draw is None else run)
        if any(draws):
            self._drawn.append((wanted, self.backend.draw(draws)))

    def _draw_of(self, run: Run) -> Draw | None:
        constraint = run.job.constraint
        try:
            mask = None if constraint is None else constraint.mask()
            if mask is not None and not bool(mask.any()):
                self._end(run, Finish.STOP)
                return None
        except Exception as error:
            self._end(run, Finish.FAILED, f"the constraint on the answer failed: {error}")
            return None
        run.launched += 1
        return Draw(run.job.sampler, mask, run.job.logprobs)

    def _hear(self) -> None:
        """Read the tokens that were being drawn, and tell them."""
        drawn, self._drawn = self._drawn, []
        for wanted, tokens in drawn:
            for run, found in zip(wanted, tokens.read(), strict=True):
                if run is not None and not run.ended:
                    self._took(run, found)

    def _took(self, run: Run, found: list[tuple[int, TokenLogprob | None]]) -> None:
        """A token that was drawn, behind drafts that were right."""
        if run.answered == 0.0:
            run.answered = self.clock()
            self._count(prefill_seconds=run.answered - run.began)
        slot, right = run.held, len(found) - 1
        if run.drafts:
            slot.go_back(slot.position - (run.drafts - right))
            self._judge(run, right)
        slot.tokens += [token for token, _ in found if token >= 0]
        if found[-1][0] < 0:
            slot.empty()  # what such a sequence holds is not to be gone on from
        else:
            self.remembering.took(run)
        for token, told in found:
            if run.ended or run.cancelled:
                return
            self._took_one(run, token, told)

    def _judge(self, run: Run, right: int) -> None:
        """So many of the drafts of its last step are right."""
        self.drafting.judge(run, right)
        run.launched += right
        at = tuple(count + (place < right) for place, count in enumerate(self._sums.right_at))
        self._sums = dataclasses.replace(self._sums, right_at=at)
        self._count(drafted=1, draft_tokens=run.drafts, right_drafts=right)
        run.drafts = 0

    def _took_one(self, run: Run, token: int, told: TokenLogprob | None) -> None:
        if token < 0:
            return self._end(run, Finish.FAILED, NOT_FINITE)
        if token in run.job.stop_ids:
            return self._end(run, Finish.STOP)
        constraint = run.job.constraint
        try:
            run.job.sampler.took(token)
            if constraint is not None:
                constraint.took(token)
            stopped = constraint is not None and constraint.ended
        except Exception as error:
            return self._end(run, Finish.FAILED, f"the constraint on the answer failed: {error}")
        self._count(generated_tokens=1)
        given = (token,), () if told is None else (told,)
        if stopped:
            return self._end(run, Finish.STOP, None, *given)
        if run.told + 1 == run.limit:
            return self._end(run, Finish.LENGTH, None, *given)
        return self._tell(run, *given)

    def _tell(self, run: Run, tokens: tuple[int, ...], told: tuple[TokenLogprob, ...]) -> None:
        try:
            run.tell(tokens, told)
        except Exception:  # whoever asked is not there any more
            run.cancel()

    def _end(
        self,
        run: Run,
        finish: Finish,
        error: str | None = None,
        tokens: tuple[int, ...] = (),
        told: tuple[TokenLogprob, ...] = (),
    ) -> None:
        for some in (self.running, self.reading, self.waiting):
            if run in some:
                some.remove(run)
        run.behind = None
        self._sums.finished[finish] += 1
        if run.answered:
            self._count(decode_seconds=self.clock() - run.answered)
        with contextlib.suppress(Exception):  # whoever asked is not there any more
            run.tell(tokens, told, finish, error)
        slot = run.slot
        if slot is not None:
            if not run.begun:  # what was there before is not known to be whole any more
                slot.empty()
            slot.leave()
            if run.begun and finish is not Finish.FAILED:
                self.remembering.end(run)

    def _count(self, **more: float) -> None:
        sums = {name: getattr(self._sums, name) + value for name, value in more.items()}
        self._sums = dataclasses.replace(self._sums, **sums)
