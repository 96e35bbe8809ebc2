"""One sequence on the GPU: a slot of an engine, a position, and a draw that needs no host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsv4.kernels.ops.gemv.contract import MAX_ROWS
from dsv4.kernels.reference.sampling import Parameters
from dsv4.runtime.draft import Draft
from dsv4.runtime.gpu import plan
from dsv4.runtime.gpu.activations import Tokens, first
from dsv4.runtime.gpu.plan import StepPass
from dsv4.runtime.gpu.prefill_plan import LEAST_ROWS
from dsv4.runtime.gpu.program import Program
from dsv4.runtime.session import SequenceBase, check_room
from dsv4.runtime.text.sampling import Sampler

if TYPE_CHECKING:
    from dsv4.runtime.gpu.engine import Engine


class GpuSession(SequenceBase):
    """A sequence that grows by `forward`, in slot `slot` of `engine`. One user at a time.

    A prompt is read in chunks, by matrix products; its last tokens, and what comes after, by steps
    of up to MAX_ROWS, whose results are the same bytes however they are cut.

    To go back costs nothing where no more than a chunk of tokens, or 8, has been written since.
    What is fed again gives the bytes that it gave before: it is cut into the same chunks and steps.
    """

    def __init__(self, engine: Engine, slot: int) -> None:
        self.engine, self.slot, self.model = engine, slot, engine.model
        super().__init__(engine.model.config, engine.capacity, engine.model.device)
        self.slack = engine.most_rows
        if (draft := engine.model.operands.draft) is not None:
            self.most_drafts = draft.block
        memory = engine.model.operands.memory
        self.experts_on_host = memory is not None and memory.placement.cold > 0
        # What is drawn, where a step of as many tokens reads it.
        self._tokens = Tokens.allocate(MAX_ROWS, engine.model.device)
        self._tokens.slot.fill_(slot)
        self._next = first(self._tokens, 1)
        self._parameters = Sampler(seed=0).parameters(MAX_ROWS, engine.model.device)
        self._set: Sampler | None = None  # whose parameters they are, but for counters
        self._sampler: Sampler | None = None  # whose draw `_next` holds
        self._decode: dict[int, Program] = {}
        self._draw: Program | None = None
        self.reset()

    def close(self) -> None:
        """Give the slot back: another sequence may have it. This one must not be used again."""
        self.engine.close(self.slot)

    def append_and_draw(self, ids: Tensor, sampler: Sampler) -> Tensor:
        """Append `ids` and draw the next id: int32 `[1]` on the device, which may be fed as it is.

        Everything that a draw needs lies on the device: a step of one token is a single graph. But
        what the kernel does not know (`Sampler.host_reason`) is drawn on the host: int64 `[1]`.
        """
        if sampler.host_reason() is not None:
            return sampler(self.forward(ids, "last").cpu())
        drawn = self._next.ids
        if ids is drawn and sampler is self._sampler:
            self._check_whole()
            check_room(1, self._position, self.max_seq_len)
            with self._changing():
                self._note(self._position + 1, chunk=False)
                self._decode_program(1).replay()
                self._position += 1
        elif ids.shape == (1,):
            self.append_and_draw_each(ids, sampler)
            self._sampler = sampler
        else:
            logits = self.forward(ids, "last")
            with self._changing():
                self.engine.buffers.step.logits[:1] = logits
                self._set_sampler(sampler)
                self._next.position.fill_(self._position - 1)
                self._draw_program().replay()
        if self._position < self.max_seq_len:
            self._ids[self._position : self._position + 1] = drawn
        sampler.drawn += 1
        return drawn

    def append_and_draw_each(self, ids: Tensor, sampler: Sampler) -> Tensor:
        """Append `ids`, at most MAX_ROWS, and draw what follows each: int32 `[T]` on the device.

        The draws are numbers `sampler.drawn` and up, which stays as it is: those after the first
        count only if the ids turn out to be what was drawn. Not for what the kernel cannot draw.
        """
        self._check(ids)
        rows, start = ids.shape[0], self._position
        tokens = first(self._tokens, rows)
        with self._changing():
            self._note(start + rows, chunk=False)
            self._set_sampler(sampler)
            self._sampler = None  # `_next` is the draw after the first of them
            tokens.ids.copy_(ids)
            self._ids[start : start + rows] = tokens.ids
            torch.arange(start, start + rows, out=tokens.position)
            self._decode_program(rows).replay()
            self._position += rows
        return tokens.ids

    def _propose(self, token: int, count: int) -> Draft:
        return self.engine.propose(token, count, self._position, self.slot)

    def _clear(self) -> None:
        for cache in self.engine.buffers.caches:
            cache.clear(self.slot)

    def _forget(self, position: int) -> None:
        super()._forget(position)
        self._sampler = None

    def _is_chunk(self, left: int) -> bool:
        return min(left, self.engine.chunk) >= LEAST_ROWS

    def _most_rows(self, chunk: bool) -> int:
        return self.engine.chunk if chunk else MAX_ROWS

    def _append(self, ids: Tensor, logits: Tensor, *, chunk: bool) -> None:
        self._sampler = None
        if chunk:
            return self.engine.run_chunk(ids, self._position, self.slot, logits)
        found = self.engine.run_step(ids, self._position, self.slot)
        if len(logits):
            logits.copy_(found[-len(logits) :])
        return None

    def _decode_program(self, rows: int) -> Program:
        """A step of the first tokens of `_tokens`, and the draws of those after them."""
        if rows not in self._decode:
            tokens = first(self._tokens, rows)

            def put(run: StepPass) -> None:
                logits = self.engine.put_step(run)
                plan.draw(run, logits, self._row_parameters(rows), tokens)

            self._decode[rows] = self.engine.program(tokens, put)
        return self._decode[rows]

    def _draw_program(self) -> Program:
        """The draw alone, from the first row of logits."""
        if self._draw is None:
            logits = self.engine.buffers.step.logits[:1]
            own = self._row_parameters(1)
            self._draw = self.engine.program(
                self._next, lambda run: plan.draw(run, logits, own, self._next)
            )
        return self._draw

    def _row_parameters(self, rows: int) -> Parameters:
        return Parameters(*(one[:rows] for one in self._parameters))

    def _set_sampler(self, sampler: Sampler) -> None:
        self._sampler = sampler
        if sampler is not self._set:
            given = sampler.parameters(MAX_ROWS, self.model.device)
            for mine, value in zip(self._parameters, given, strict=True):
                mine.copy_(value)
            self._set = sampler
        counter = self._parameters.counter
        torch.arange(sampler.drawn, sampler.drawn + MAX_ROWS, out=counter)
