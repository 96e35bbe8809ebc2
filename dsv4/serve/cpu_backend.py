"""The scheduler's backend over sessions of the CPU: a session a slot, one row after another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.core.sizes import STEP_ROWS
from dsv4.runtime.session import STEP_TOKENS, Session, capacity_of
from dsv4.runtime.snapshots import block_tokens, cpu_memory
from dsv4.runtime.text.drafting import DraftLayers
from dsv4.runtime.text.sampling import Sampler
from dsv4.serve import logprobs
from dsv4.serve.backend import Draw
from dsv4.serve.jobs import TokenLogprob

FEW_ROWS = 64  # whose logits are held at once where all are asked for


class SessionModel(Protocol):
    """What makes sessions: `runtime.model.Model`."""

    @property
    def config(self) -> ModelConfig:
        """Its vocabulary, and what its caches look like."""

    def session(self, max_seq_len: int | None = None) -> Session:
        """An empty sequence."""


class CpuBackend:
    """slots: sessions, each of up to `max_seq_len` tokens. block: tokens of a block, a multiple of
    every ratio, by default `block_tokens`.

    Raises RuntimeRefusal for a length that the model cannot have.
    """

    most_rows = STEP_ROWS
    least_chunk = 1
    experts_on_host = False

    def __init__(
        self,
        model: SessionModel,
        slots: int,
        max_seq_len: int | None = None,
        *,
        block: int | None = None,
    ) -> None:
        config = model.config
        self.slots, self.vocab = slots, config.vocab_size
        self.capacity = capacity_of(config, max_seq_len)
        self.chunk = STEP_TOKENS
        self.block = block_tokens(config) if block is None else block
        self.sessions = [model.session(self.capacity) for _ in range(slots)]
        self.slack = self.sessions[0].slack
        self.most_drafts = self.sessions[0].most_drafts
        self.memory = [
            cpu_memory(config, one.caches, self.block, one.context) for one in self.sessions
        ]
        self.block_bytes = self.memory[0].block_bytes
        self.state_bytes = self.memory[0].state_bytes
        self.layout = f"{model!r} {self.block} {self.block_bytes} {self.state_bytes}".encode()
        self._next = [0] * slots
        self._rows: list[int] = []
        self._drafts: list[Sequence[int]] = []  # of each of them
        self._logits = torch.empty((0, self.vocab))

    def reset(self, slot: int) -> None:
        """See `Backend`."""
        self.sessions[slot].reset()

    def rewind(self, slot: int, position: int) -> None:
        """See `Backend`."""
        self.sessions[slot].rewind(position)

    def read(
        self,
        slot: int,
        ids: Sequence[int],
        *,
        marks: Sequence[int] = (),
        reached: Callable[[int], None] | None = None,
        logits: Callable[[Tensor], None] | None = None,
    ) -> None:
        """See `Backend`. The prompt is cut at every mark: cuts change nothing here."""
        session, tokens = self.sessions[slot], torch.tensor(ids)
        start = session.position
        end = start + len(ids)
        ends = sorted({*marks, end})
        if logits is not None:
            ends = sorted({*ends, *range(start + FEW_ROWS, end, FEW_ROWS)})
        for first, last in itertools.pairwise([start, *ends]):
            part = tokens[first - start : last - start]
            found = session.forward(part, "all" if logits is not None else "last")
            if logits is not None:
                logits(found)
            if reached is not None and last in marks:
                reached(last)
        self._rows, self._drafts, self._logits = [slot], [()], found[-1:]

    def begin(self, slot: int, sampler: Sampler) -> None:
        """See `Backend`."""

    def forward(self, slots: Sequence[int], drafts: Sequence[Sequence[int]] = ()) -> None:
        """See `Backend`."""
        self._rows, self._drafts = list(slots), list(drafts) or [()] * len(slots)
        self._logits = torch.cat(
            [
                self.sessions[slot].forward(torch.tensor([self._next[slot], *some]))
                for slot, some in zip(slots, self._drafts, strict=True)
            ]
        )

    def draw(self, draws: Sequence[Draw | None]) -> Done:
        """See `Backend`."""
        parts = torch.split(self._logits, [1 + len(some) for some in self._drafts])
        return Done(
            [self._draw(*one) for one in zip(self._rows, parts, self._drafts, draws, strict=True)]
        )

    def proposer(self, slot: int) -> DraftLayers:
        """See `Backend`."""
        return DraftLayers(self.sessions[slot])

    def save_state(self, slot: int, position: int, cells: Sequence[Tensor]) -> None:
        """See `Backend`."""
        if not self.state_bytes:
            return
        state = torch.empty(self.state_bytes, dtype=torch.uint8)
        self.memory[slot].save_state(position, state)
        for cell, part in zip(cells, torch.split(state, len(cells[0])), strict=True):
            cell[: len(part)] = part

    def save_blocks(self, slot: int, first: int, cells: Sequence[Tensor]) -> None:
        """See `Backend`."""
        blocks = torch.empty((len(cells), self.block_bytes), dtype=torch.uint8)
        self.memory[slot].save_blocks(first, blocks)
        for cell, block in zip(cells, blocks, strict=True):
            cell[: self.block_bytes] = block

    def load(
        self, slot: int, position: int, blocks: Sequence[Tensor], state: Sequence[Tensor]
    ) -> None:
        """See `Backend`."""
        session, memory = self.sessions[slot], self.memory[slot]
        session.reset()
        memory.load_blocks(0, torch.stack([one[: self.block_bytes] for one in blocks]))
        if self.state_bytes:
            memory.load_state(position, torch.cat(list(state))[: self.state_bytes])
        session.skip_to(position)

    def cells(self, count: int, size: int) -> Tensor:
        """See `Backend`."""
        return torch.empty((count, size), dtype=torch.uint8)

    def synchronize(self) -> None:
        """See `Backend`."""

    def _draw(
        self, slot: int, rows: Tensor, drafts: Sequence[int], draw: Draw | None
    ) -> list[tuple[int, TokenLogprob | None]]:
        """Row by row, as long as the draft behind a row is what was drawn of it."""
        if draw is None:
            return [(0, None)]
        found: list[tuple[int, TokenLogprob | None]] = []
        for row, draft in zip(rows, (*drafts, None), strict=True):
            masked = row if draw.mask is None else logprobs.without(row, draw.mask)
            token = int(draw.sampler(masked[None]))
            told = None
            if draw.logprobs is not None and token >= 0:
                (told,) = logprobs.of_rows(row[None], [token], draw.logprobs)
            found.append((token, told))
            if token != draft:
                break
        session, wrong = self.sessions[slot], len(rows) - len(found)
        session.rewind(session.position - wrong)
        self._next[slot] = max(token, 0)
        return found


class Done:
    """Tokens that are there."""

    def __init__(self, found: list[list[tuple[int, TokenLogprob | None]]]) -> None:
        self._found = found

    def read(self) -> list[list[tuple[int, TokenLogprob | None]]]:
        """See `Drawn`."""
        return self._found
