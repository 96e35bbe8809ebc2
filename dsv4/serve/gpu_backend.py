"""The scheduler's backend over an engine of the GPU: rows of a step for each sequence.

Nothing here waits for the device but what needs its numbers: tokens that are read, draws that its
kernel does not know, and `synchronize`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.kernels.ops.gemv.contract import MAX_ROWS
from dsv4.runtime.gpu.batch import Batch
from dsv4.runtime.gpu.engine import Engine
from dsv4.runtime.gpu.prefill_plan import LEAST_ROWS
from dsv4.runtime.snapshots import block_tokens, gpu_memory
from dsv4.runtime.text.drafting import Proposer
from dsv4.runtime.text.sampling import Sampler
from dsv4.serve import logprobs
from dsv4.serve.backend import Draw, right_drafts
from dsv4.serve.jobs import TokenLogprob

_BLOCKS_AT_ONCE = 64  # of a device's memory while they are copied


class GpuBackend:
    """engine: with all its slots free, and chunks of at least twice LEAST_ROWS tokens. block: see
    `CpuBackend`. Raises RuntimeRefusal for shorter chunks.
    """

    most_rows = MAX_ROWS
    least_chunk = LEAST_ROWS
    most_drafts = 0

    def __init__(self, engine: Engine, *, block: int | None = None) -> None:
        if engine.chunk < 2 * LEAST_ROWS:
            raise RuntimeRefusal(
                f"chunks of a prompt have {engine.chunk} tokens, expected at least "
                f"{2 * LEAST_ROWS}; serve with a larger --max-seq-len"
            )
        config = engine.model.config
        self.engine, self.batch = engine, Batch(engine)
        self.slots, self.capacity, self.vocab = engine.slots, engine.capacity, config.vocab_size
        self.chunk, self.slack = engine.chunk, engine.most_rows
        self.block = block_tokens(config) if block is None else block
        caches = engine.buffers.caches
        self.memory = [gpu_memory(config, caches, slot, self.block) for slot in range(self.slots)]
        self.block_bytes = self.memory[0].block_bytes
        self.state_bytes = self.memory[0].state_bytes
        sizes = f"{self.block} {self.block_bytes} {self.state_bytes}"
        self.layout = f"{engine.model!r} {sizes}".encode()
        self._device = engine.model.device
        memory = engine.model.operands.memory
        self.experts_on_host = memory is not None and memory.placement.cold > 0
        self._positions = [0] * self.slots
        self._state = torch.empty(self.state_bytes, dtype=torch.uint8, device=self._device)
        self._rows: list[int] = []  # slots whose logits are there
        self._drafts: list[Sequence[int]] = []  # of each of them

    def reset(self, slot: int) -> None:
        """See `Backend`."""
        for cache in self.engine.buffers.caches:
            cache.clear(slot)
        self._positions[slot] = 0

    def rewind(self, slot: int, position: int) -> None:
        """See `Backend`."""
        self._positions[slot] = position

    @torch.no_grad()
    def read(
        self,
        slot: int,
        ids: Sequence[int],
        *,
        marks: Sequence[int] = (),
        reached: Callable[[int], None] | None = None,
        logits: Callable[[Tensor], None] | None = None,
    ) -> None:
        """See `Backend`. Rings hold what a state needs until the chunk after this one."""
        tokens = torch.tensor(ids, dtype=torch.int32)
        read = self._read_chunk if len(ids) >= LEAST_ROWS else self._read_steps
        read(slot, tokens, logits)
        self._positions[slot] += len(ids)
        self._rows, self._drafts = [slot], [()]
        if reached is not None:
            for mark in marks:
                reached(mark)

    def begin(self, slot: int, sampler: Sampler) -> None:
        """See `Backend`."""
        self.batch.begin(slot, self._positions[slot], sampler)

    @torch.no_grad()
    def forward(self, slots: Sequence[int], drafts: Sequence[Sequence[int]] = ()) -> None:
        """See `Backend`."""
        if drafts:
            self.batch.forward(slots, drafts)
        else:
            self.batch.forward(slots)
        self._rows, self._drafts = list(slots), list(drafts) or [()] * len(slots)
        for slot, some in zip(slots, self._drafts, strict=True):
            self._positions[slot] += 1 + len(some)

    @torch.no_grad()
    def draw(self, draws: Sequence[Draw | None]) -> OnDevice:
        """See `Backend`. What the kernel does not know is drawn here, which waits for the step."""
        sizes = [1 + len(some) for some in self._drafts]
        starts = [0, *itertools.accumulate(sizes)]
        every = self.engine.buffers.step.logits[: starts.pop()]
        raw: dict[int, Tensor] = {}
        likeliest: dict[int, logprobs.Likeliest] = {}
        for row, draw in zip(starts, draws, strict=True):
            if draw is None:
                continue
            if draw.logprobs is not None:
                raw[row] = every[row].clone()
                likeliest[row] = logprobs.Likeliest.of(raw[row], draw.logprobs)
            if draw.mask is not None:
                every[row] = logprobs.without(every[row], draw.mask)
        slots = [slot for slot, size in zip(self._rows, sizes, strict=True) for _ in range(size)]
        tokens = self.batch.draw(slots)
        for row, draw in zip(starts, draws, strict=True):
            if draw is None:
                continue
            if draw.sampler.host_reason() is None:
                draw.sampler.drawn += 1
            else:
                tokens[row : row + 1] = draw.sampler(every[row : row + 1].cpu())
        found = OnDevice(tokens, likeliest, raw, self._drafts, self._settle(draws, starts))
        tokens.clamp_(min=0)  # one that is not a token may be appended before that is known
        return found

    def proposer(self, slot: int) -> Proposer:
        """See `Backend`."""
        raise NotImplementedError  # not called: `most_drafts` is 0 here

    def save_state(self, slot: int, position: int, cells: Sequence[Tensor]) -> None:
        """See `Backend`."""
        self.memory[slot].save_state(position, self._state)
        parts = torch.split(self._state, len(cells[0])) if cells else ()
        for cell, part in zip(cells, parts, strict=True):
            cell[: len(part)].copy_(part, non_blocking=True)

    def save_blocks(self, slot: int, first: int, cells: Sequence[Tensor]) -> None:
        """See `Backend`."""
        for start in range(0, len(cells), _BLOCKS_AT_ONCE):
            some = cells[start : start + _BLOCKS_AT_ONCE]
            blocks = self._blocks(len(some))
            self.memory[slot].save_blocks(first + start, blocks)
            for cell, block in zip(some, blocks, strict=True):
                cell[: self.block_bytes].copy_(block, non_blocking=True)

    def load(
        self, slot: int, position: int, blocks: Sequence[Tensor], state: Sequence[Tensor]
    ) -> None:
        """See `Backend`."""
        for start in range(0, len(blocks), _BLOCKS_AT_ONCE):
            some = blocks[start : start + _BLOCKS_AT_ONCE]
            found = self._blocks(len(some))
            for block, cell in zip(found, some, strict=True):
                block.copy_(cell[: self.block_bytes], non_blocking=True)
            self.memory[slot].load_blocks(start, found)
        parts = torch.split(self._state, len(state[0])) if state else ()
        for part, cell in zip(parts, state, strict=True):
            part.copy_(cell[: len(part)], non_blocking=True)
        self.memory[slot].load_state(position, self._state)
        self._positions[slot] = position

    def cells(self, count: int, size: int) -> Tensor:
        """See `Backend`: pinned."""
        return torch.empty((count, size), dtype=torch.uint8, pin_memory=self._cuda)

    def synchronize(self) -> None:
        """See `Backend`."""
        if self._cuda:
            torch.cuda.synchronize(self._device)

    def _settle(
        self, draws: Sequence[Draw | None], starts: Sequence[int]
    ) -> Callable[[list[int]], None] | None:
        """What is to be told how many drafts of each slot are right, if there are drafts."""
        slots, drafts = self._rows, self._drafts
        if not any(drafts):
            return None

        def settle(right: list[int]) -> None:
            rows = zip(slots, drafts, draws, right, strict=True)
            for slot, some, draw, count in rows:
                self._positions[slot] -= len(some) - count
                if draw is not None:
                    draw.sampler.drawn += count
            self.batch.keep([row + count for row, count in zip(starts, right, strict=True)])

        return settle

    @property
    def _cuda(self) -> bool:
        return self._device.type == "cuda"

    def _blocks(self, count: int) -> Tensor:
        return torch.empty((count, self.block_bytes), dtype=torch.uint8, device=self._device)

    def _read_chunk(self, slot: int, ids: Tensor, logits: Callable[[Tensor], None] | None) -> None:
        engine, count = self.engine, len(ids)
        last = engine.buffers.step.logits[:1]
        engine.run_chunk(ids, self._positions[slot], slot, last)
        if logits is None:
            return
        for start in range(0, count, MAX_ROWS):
            logits(engine.chunk_logits(start, min(MAX_ROWS, count - start)))
        engine.chunk_logits(count - 1, 1)

    def _read_steps(self, slot: int, ids: Tensor, logits: Callable[[Tensor], None] | None) -> None:
        position = self._positions[slot]
        for start in range(0, len(ids), MAX_ROWS):
            part = ids[start : start + MAX_ROWS]
            found = self.engine.run_step(part, position + start, slot)
            if logits is not None:
                logits(found)
        self.engine.buffers.step.logits[:1] = found[-1:].clone()


class OnDevice:
    """Tokens that the device draws, on their way to the host. likeliest, raw: by row. drafts: of
    each slot; settle: is told how many of them are right, once that is known.
    """

    def __init__(
        self,
        tokens: Tensor,
        likeliest: dict[int, logprobs.Likeliest],
        raw: dict[int, Tensor],
        drafts: Sequence[Sequence[int]],
        settle: Callable[[list[int]], None] | None,
    ) -> None:
        cuda = tokens.device.type == "cuda"
        self._host = torch.empty(len(tokens), dtype=tokens.dtype, pin_memory=cuda)
        self._host.copy_(tokens, non_blocking=True)
        self._likeliest, self._drafts, self._settle = likeliest, drafts, settle
        self._logits = {
            row: logits.gather(0, tokens[row : row + 1].clamp(min=0).long()).double()
            for row, logits in raw.items()
        }
        self._event = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        if self._event is not None:
            self._event.record()

    def read(self) -> list[list[tuple[int, TokenLogprob | None]]]:
        """See `Drawn`."""
        if self._event is not None:
            self._event.synchronize()
        tokens, row = self._host.tolist(), 0
        found: list[list[tuple[int, TokenLogprob | None]]] = []
        for drafts in self._drafts:
            token, told = tokens[row], None
            if row in self._likeliest and token >= 0:
                told = self._likeliest[row].told(token, float(self._logits[row]))
            right = right_drafts(drafts, tokens[row:])
            found.append([(token, told), *((one, None) for one in tokens[row + 1 :][:right])])
            row += 1 + len(drafts)
        if self._settle is not None:
            self._settle([len(some) - 1 for some in found])
        return found
