"""One sequence on the GPU: a slot of an engine, a position, and a draw that needs no host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from dsv4.kernels.ops.gemv.contract import MAX_ROWS
from dsv4.kernels.reference.sampling import Parameters
from dsv4.runtime.draft import Draft
from dsv4.runtime.gpu import plan
from dsv4.runtime.gpu.activations import Tokens
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
        # The next token, where the draw leaves it and a step of one token reads it.
        self._next = Tokens.allocate(1, engine.model.device)
        self._next.slot.fill_(slot)
        self._parameters: Parameters = Sampler(seed=0).parameters(1, engine.model.device)
        self._sampler: Sampler | None = None  # whose draw `_next` holds
        self._decode: Program | None = None
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
                self._decode_program().replay()
                self._position += 1
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

    def _decode_program(self) -> Program:
        """A step of the drawn token, and the draw of the one after it."""
        if self._decode is None:

            def put(run: StepPass) -> None:
                logits = self.engine.put_step(run)
                plan.draw(run, logits, self._parameters, self._next)

            self._decode = self.engine.program(self._next, put)
        return self._decode

    def _draw_program(self) -> Program:
        """The draw alone, from the first row of logits."""
        if self._draw is None:
            logits = self.engine.buffers.step.logits[:1]
            self._draw = self.engine.program(
                self._next, lambda run: plan.draw(run, logits, self._parameters, self._next)
            )
        return self._draw

    def _set_sampler(self, sampler: Sampler) -> None:
        self._sampler = sampler
        given = sampler.parameters(1, self.model.device)
        for mine, value in zip(self._parameters, given, strict=True):
            mine.copy_(value)
