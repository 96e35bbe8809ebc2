"""What a scheduler does so that beginnings of prompts are not computed twice.

Two places remember: slots, which keep an ended sequence until another one needs them, and a
`PrefixCache`. A slot goes on where its sequence ended, at no cost. The cache has states where other
prompts are likely to part: at the last block that a prompt may go on from, at the end of its first
part (a system prompt and tools), where it met what was known, and every STATE_TOKENS.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from dsv4.serve.backend import Backend
from dsv4.serve.prefix_cache import Keys, PrefixCache
from dsv4.serve.run import Run, Slot

STATE_TOKENS = 4096  # a state takes about as much as the blocks of 1,024 tokens
PASSING_STATES = 2  # of an answer: the last ones stay


@dataclasses.dataclass(frozen=True)
class MemoryOptions:
    """reproducible: only what prompts computed is used again, so that a prompt gives the same
    bytes whether it was known or not. Else a conversation also goes on from what its answers left,
    which steps computed: the same numbers but for rounding. turn_id: the token that begins the
    user's first turn. log: takes a line for people, without any content.
    """

    reproducible: bool = False
    turn_id: int | None = None
    state_tokens: int = STATE_TOKENS
    log: Callable[[str], None] = lambda line: None


class Remembering:
    """cache: None to remember in slots alone."""

    def __init__(
        self, backend: Backend, cache: PrefixCache | None, memory: MemoryOptions | None = None
    ) -> None:
        self.backend, self.cache, self.memory = backend, cache, memory or MemoryOptions()

    def keys(self, salt: bytes) -> Keys | None:
        """For a new run."""
        return None if self.cache is None else self.cache.keys(salt)

    def usable(self, count: int, tokens: int) -> int:
        """Of the first `count` tokens of a prompt of `tokens`, those that a state may stand for."""
        block = self.backend.block
        return max(min(count, tokens - self.backend.least_chunk), 0) // block * block

    def choose(self, run: Run, free: Sequence[Slot]) -> tuple[Slot, int]:
        """A slot for the run, and how many of its tokens the run goes on from."""
        idle = min(free, key=lambda slot: (slot.position > 0, slot.used))
        if run.job.prompt_logprobs:
            return idle, 0
        slack, least, cold = self.backend.slack, self.backend.least_chunk, self.memory.reproducible
        reusable = {
            slot.number: slot.reusable(run.ids, run.job.salt, slack, least, cold=cold)
            for slot in free
        }
        best = max(free, key=lambda slot: reusable[slot.number])
        found = reusable[best.number]
        if found == 0 or found < self._cached(run):
            return idle, 0
        return best, found

    def begin(self, run: Run) -> None:
        """Bring the run's slot to where its reading begins, and note where states are wanted."""
        slot, number = run.held, run.held.number
        node = None
        if self.cache is not None and run.keys is not None and not run.job.prompt_logprobs:
            before = self.cache.known(run.keys, run.ids)
            node = self.cache.find(run.keys, run.ids, self.usable(len(run.ids), len(run.ids)))
            run.marks |= self._marks(run, before[0])
        position = node.depth * self.backend.block if node is not None else 0
        if node is not None and self.cache is not None and position > run.start:
            self.cache.load(number, node)
            slot.empty(position)
        elif run.start:
            if slot.position != run.start:
                self.backend.rewind(number, run.start)
            slot.go_back(run.start)
        else:
            self.backend.reset(number)
            slot.empty()
        run.cached = run.kept = slot.position
        if self.cache is not None and run.keys is not None and not run.job.prompt_logprobs:
            self.memory.log(_line(len(run.ids), run.cached, max(before[1], run.cached)))

    def keep(self, run: Run, position: int) -> None:
        """The run's slot is at `position`, or was just now."""
        if self.cache is not None and run.keys is not None:
            self.cache.keep_state(run.held.number, run.keys, run.ids, position)

    def read(self, run: Run) -> None:
        """The run has read up to its slot's position."""
        if self.cache is not None and run.keys is not None:
            slot = run.held
            self.cache.keep_blocks(slot.number, run.keys, run.ids, slot.position)
            run.kept = slot.position

    def took(self, run: Run) -> None:
        """The run's answer has another token."""
        slot, block = run.held, self.backend.block
        end = min(len(slot.tokens), slot.position) // block * block
        if end <= run.kept or self.memory.reproducible:
            return
        run.kept = end
        if self.cache is None or run.keys is None:
            return
        known = self.cache.get(run.keys.of(slot.tokens, end // block)[-1])
        node = self.cache.keep_state(slot.number, run.keys, slot.tokens, end)
        if node is None or (known is not None and known.state is not None):
            return
        if end % self.memory.state_tokens:
            run.passing.append(node)
        if len(run.passing) > PASSING_STATES:
            self.cache.drop_state(run.passing.pop(0))

    def end(self, run: Run) -> None:
        """The run has ended, and its slot holds what it leaves."""
        if self.cache is not None and run.keys is not None:
            slot = run.held
            self.cache.shelve(run.keys, slot.tokens[: slot.position])

    def _cached(self, run: Run) -> int:
        if self.cache is None or run.keys is None:
            return 0
        return self.cache.depth(run.keys, run.ids, self.usable(len(run.ids), len(run.ids)))

    def _marks(self, run: Run, known: int) -> set[int]:
        count, every = len(run.ids), self.memory.state_tokens
        last = self.usable(count, count)
        marks = {last, self.usable(known, count), *range(every, last, every)}
        if self.memory.turn_id in run.ids:
            marks.add(self.usable(run.ids.index(self.memory.turn_id), count))
        return marks


def _line(tokens: int, cached: int, alike: int) -> str:
    if alike == 0:
        return f"prompt of {tokens} tokens: nothing like it is remembered"
    return (
        f"prompt of {tokens} tokens: {cached} are not computed again; what is remembered is "
        f"like it up to token {alike}"
    )
