"""Sequences of an engine that go on together: rows of a step, drawn where the logits are.

What a sequence's next step needs (its token, position, and what its draws are by) lies in its slot;
a step gathers the slots of its rows. As long as rows stay the same, nothing is moved: the draw
leaves tokens where the next step reads them. With drafts a sequence has several rows, at positions
that follow one another, each with the draw of its place; the one that counts goes back to the slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsv4.kernels.ops.gemv.contract import MAX_ROWS
from dsv4.kernels.reference.sampling import Parameters
from dsv4.runtime.gpu import plan
from dsv4.runtime.gpu.activations import Tokens, first
from dsv4.runtime.gpu.plan import StepPass
from dsv4.runtime.gpu.program import Program
from dsv4.runtime.text.sampling import Sampler

if TYPE_CHECKING:
    from dsv4.runtime.gpu.engine import Engine


class Batch:
    """Of all slots of `engine`, which nobody else may use."""

    def __init__(self, engine: Engine) -> None:
        self.engine, device = engine, engine.model.device
        neutral = Sampler(seed=0)
        self._slots = Tokens.allocate(engine.slots, device)
        self._slots.slot.copy_(torch.arange(engine.slots))
        self._slot_parameters = neutral.parameters(engine.slots, device)
        self._rows = Tokens.allocate(MAX_ROWS, device)
        self._row_parameters = neutral.parameters(MAX_ROWS, device)
        self._placed: tuple[int, ...] = ()
        self._indices: dict[tuple[int, ...], Tensor] = {}
        self._steps: dict[int, Program] = {}
        self._draws: dict[int, Program] = {}

    def begin(self, slot: int, position: int, sampler: Sampler) -> None:
        """The sequence in `slot` has `position` tokens; what follows is drawn by `sampler`."""
        self._place(())
        self._slots.position[slot] = position - 1  # a draw moves it on
        given = sampler.parameters(1, self._slots.ids.device)
        for every, value in zip(self._slot_parameters, given, strict=True):
            every[slot : slot + 1] = value

    def forward(self, slots: Sequence[int], drafts: Sequence[Sequence[int]] = ()) -> Tensor:
        """Append each slot's token, at most MAX_ROWS: logits `[rows, vocab]`, overwritten by the
        next step.

        drafts: for each slot, what is appended behind its token: it has a row more for each. All
        rows are then to be drawn, and `keep` comes before anything else.
        """
        rows = len(slots) + sum(map(len, drafts))
        if rows == len(slots):
            self._place(tuple(slots))
        else:
            self._place_drafts(slots, drafts)
        self._program(self._steps, rows, self.engine.put_step).replay()
        return self.engine.buffers.step.logits[:rows]

    def draw(self, slots: Sequence[int]) -> Tensor:
        """A token for each slot from the first rows of logits: int32 `[rows]`, where the next step
        reads it. INVALID_TOKEN for logits that are not finite, which must not be appended.
        """
        self._place(tuple(slots))
        rows = len(slots)

        def put(run: StepPass) -> None:
            logits = self.engine.buffers.step.logits[:rows]
            own = Parameters(*(one[:rows] for one in self._row_parameters))
            plan.draw(run, logits, own, run.tokens)

        self._program(self._draws, rows, put).replay()
        return self._rows.ids[:rows]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on behind these rows of the last step, which had drafts: one of each slot."""
        kept = [[self._placed[row], row] for row in rows]
        slots, index = torch.tensor(kept, device=self._slots.ids.device).T
        for every, row in self._changing():
            every.index_copy_(0, slots, row.index_select(0, index))
        self._placed = ()

    def _program(
        self, known: dict[int, Program], rows: int, put: Callable[[StepPass], object]
    ) -> Program:
        if rows not in known:
            known[rows] = self.engine.program(first(self._rows, rows), put)
        return known[rows]

    def _place(self, slots: tuple[int, ...]) -> None:
        """Put rows back into their slots, and those of `slots` into rows."""
        if slots == self._placed:
            return
        if self._placed:
            index = self._index(self._placed)
            for every, row in self._changing():
                every.index_copy_(0, index, row[: len(index)])
        self._placed = slots
        if slots:
            self._gather(self._index(slots))

    def _place_drafts(self, slots: Sequence[int], drafts: Sequence[Sequence[int]]) -> None:
        """Put the token of each slot and its drafts into rows."""
        self._place(())
        placed = [
            (slot, ahead, token)
            for slot, some in zip(slots, drafts, strict=True)
            for ahead, token in enumerate((0, *some))
        ]
        self._placed = tuple(slot for slot, _, _ in placed)
        index, ahead, ids = torch.tensor(placed, device=self._slots.ids.device).T
        self._gather(index.contiguous())
        rows = first(self._rows, len(placed))
        rows.ids.copy_(torch.where(ahead > 0, ids, rows.ids))
        rows.position.add_(ahead)
        self._row_parameters.counter[: len(placed)].add_(ahead)

    def _changing(self) -> list[tuple[Tensor, Tensor]]:
        """What a step and its draw change: in slots, and in rows."""
        return [
            (self._slots.ids, self._rows.ids),
            (self._slots.position, self._rows.position),
            (self._slot_parameters.counter, self._row_parameters.counter),
        ]

    def _gather(self, index: Tensor) -> None:
        """Slots into the first rows."""
        parameters = zip(self._slot_parameters, self._row_parameters, strict=True)
        for every, row in [
            *parameters,
            *((getattr(self._slots, n), getattr(self._rows, n)) for n in _TOKENS),
        ]:
            torch.index_select(every, 0, index, out=row[: len(index)])

    def _index(self, slots: tuple[int, ...]) -> Tensor:
        """Made once where the same rows come again and again: a new one waits for the device."""
        if slots not in self._indices:
            if len(self._indices) >= _MOST_INDICES:
                self._indices.clear()
            self._indices[slots] = torch.tensor(slots, device=self._slots.ids.device)
        return self._indices[slots]


_MOST_INDICES = 256
_TOKENS = "ids", "position", "slot"
