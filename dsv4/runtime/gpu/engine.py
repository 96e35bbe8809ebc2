"""A model at work: the tensors that its launches write, its programs, and slots for sequences.

Everything is allocated once. What a sequence remembers lies in its slot of the caches; activations
and scratch are of whoever runs. Programs are put together when they are first wanted and serve
every sequence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.ops.gemv.contract import MAX_ROWS
from dsv4.runtime.draft import Draft
from dsv4.runtime.gpu import plan, prefill_plan
from dsv4.runtime.gpu.activations import (
    Activations,
    ChunkScratch,
    StepScratch,
    Tokens,
    first,
)
from dsv4.runtime.gpu.caches import LayerCaches, allocate_caches
from dsv4.runtime.gpu.draft_plan import DraftBuffers, Observed, block_pass, propose
from dsv4.runtime.gpu.operands import DSpark, nbytes
from dsv4.runtime.gpu.plan import StepPass
from dsv4.runtime.gpu.prefill_plan import ChunkPass, chunk_rows
from dsv4.runtime.gpu.program import Between, Launch, Program
from dsv4.runtime.load.arena import require_memory
from dsv4.runtime.positions import RopeTables

if TYPE_CHECKING:
    from dsv4.runtime.gpu.model import GpuModel
    from dsv4.runtime.gpu.session import GpuSession

META = torch.device("meta")


@dataclasses.dataclass(frozen=True, eq=False)
class Buffers:
    """All that launches write, and the host before them. chunk: absent where steps do it all;
    draft: where no draft layers are loaded.
    """

    caches: tuple[LayerCaches, ...]
    tokens: Tokens
    activations: Activations
    step: StepScratch
    chunk: ChunkScratch | None
    draft: DraftBuffers | None

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        slots: int,
        capacity: int,
        chunk: int,
        device: torch.device,
        *,
        drafts: int = 0,
    ) -> Buffers:
        """For `slots` sequences of up to `capacity` tokens; chunk: most tokens of a chunk, or 0;
        drafts: draft layers that are loaded.
        """
        rows = max(chunk, MAX_ROWS)
        return cls(
            allocate_caches(config, slots, capacity, rows, device, drafts=drafts),
            Tokens.allocate(rows, device),
            Activations.allocate(config, rows, capacity, device),
            StepScratch.allocate(config, device),
            ChunkScratch.allocate(config, chunk, device) if chunk else None,
            DraftBuffers.allocate(config, rows, drafts, device) if drafts else None,
        )

    def observer(self, draft: DSpark | None, rows: int) -> Observed | None:
        """What draft layers keep of a pass of `rows` tokens, where they are loaded."""
        if draft is None or self.draft is None:
            return None
        return Observed(draft, self.draft.projections.first(rows))


class Engine:
    """slots: sequences that it holds at once, each of up to `capacity` tokens.

    chunk: most tokens of a chunk, by default as many as are worth it; 0 for steps alone. graphs:
    False to launch a step's kernels one by one. Raises OutOfSpaceError, before anything is
    allocated, if the device has not the room.
    """

    def __init__(
        self,
        model: GpuModel,
        capacity: int,
        *,
        slots: int = 1,
        chunk: int | None = None,
        graphs: bool = True,
    ) -> None:
        config, device = model.config, model.device
        self.model, self.capacity, self.slots, self.graphs = model, capacity, slots, graphs
        self.chunk = chunk_rows(capacity) if chunk is None else chunk
        self.most_rows = max(self.chunk, MAX_ROWS)
        draft = model.operands.draft
        self.drafts = 0 if draft is None else len(draft.stages)
        sizes = config, slots, capacity, self.chunk
        what = (
            f"a session of {capacity} tokens needs"
            if slots == 1
            else (f"{slots} sessions of {capacity} tokens need")
        )
        require_memory(
            session_sizes(*sizes, drafts=self.drafts).nbytes,
            device,
            what,
            "open it with a smaller max_seq_len",
        )
        self.buffers = Buffers.allocate(*sizes, device, drafts=self.drafts)
        self.tables = RopeTables.build(config, capacity + MAX_ROWS, device)
        self.ctas = model.multiprocessors()
        self._free = set(range(slots))
        self._steps: dict[int, Program] = {}
        self._whole_chunk: Program | None = None
        self._proposal: Program | None = None

    def session(self) -> GpuSession:
        """An empty sequence in a slot of its own. Raises RuntimeRefusal when none is free."""
        from dsv4.runtime.gpu.session import GpuSession

        if not self._free:
            raise RuntimeRefusal(
                f"all {self.slots} slots hold a sequence; close() one of them before another"
            )
        slot = min(self._free)
        self._free.remove(slot)
        return GpuSession(self, slot)

    def close(self, slot: int) -> None:
        """The sequence in `slot` has ended: another one may have it."""
        self._free.add(slot)

    def step_pass(self, launch: Launch, between: Between, tokens: Tokens) -> StepPass:
        """For a step of `tokens`, at most MAX_ROWS."""
        own, rows = self.buffers, tokens.ids.shape[0]
        return StepPass(
            self.model.config,
            launch,
            tokens,
            first(own.activations, rows),
            self.tables,
            self.capacity,
            self.model.operands.memory,
            between,
            own.observer(self.model.operands.draft, rows),
            own.step,
            self.ctas,
        )

    def program(self, tokens: Tokens, put: Callable[[StepPass], object]) -> Program:
        """What `put` launches in a step of `tokens`."""
        program = Program(self.model.functions, self.graphs)
        put(self.step_pass(program.record, program.between, tokens))
        return program

    def propose(self, token: int, count: int, position: int, slot: int) -> Draft:
        """What draft layers, which are loaded, expect after `token`, which comes at `position`."""
        draft, buffers = self.model.operands.draft, self.buffers.draft
        assert draft is not None and buffers is not None
        own = buffers.proposal
        own.place(token, draft.noise, position, slot)
        if self._proposal is None:
            self._proposal = self.program(own.tokens, self.put_proposal)
        self._proposal.replay()
        return own.drafted(count)

    def put_proposal(self, run: StepPass) -> None:
        """All of a proposal, for the tokens of `buffers.draft.proposal`."""
        assert self.buffers.draft is not None
        own = self.buffers.draft.proposal
        propose(block_pass(run, own), self.model.operands, self.buffers.caches, own)

    def run_step(self, ids: Tensor, position: int, slot: int) -> Tensor:
        """Run up to MAX_ROWS tokens: their logits, overwritten by the next step."""
        tokens = self._place(ids, position, slot)
        rows = ids.shape[0]
        if rows not in self._steps:
            self._steps[rows] = self.program(tokens, self.put_step)
        self._steps[rows].replay()
        return self.buffers.step.logits[:rows]

    def put_step(self, run: StepPass) -> Tensor:
        """All of a step but the draw: -> logits."""
        return plan.step(run, self.model.operands, self.buffers.caches)

    def run_chunk(self, ids: Tensor, position: int, slot: int, logits: Tensor) -> None:
        """Run many tokens. logits: of the last of them, as many as it has rows, go there.

        A whole chunk is put together once. Another size is launched as it is planned: the device
        begins with the first kernel while the host is at the next ones.
        """
        tokens = self._place(ids, position, slot)
        rows, wanted = ids.shape[0], logits.shape[0]
        if rows == self.chunk:
            if self._whole_chunk is None:
                program = Program(self.model.functions, graphs=False)
                self._put_chunk(program.record, program.between, tokens)
                self._whole_chunk = program
            self._whole_chunk.launch()
        else:
            self._put_chunk(self.model.functions.launch, at_once, tokens)
        for start in range(0, wanted, MAX_ROWS):
            few = min(MAX_ROWS, wanted - start)
            logits[start : start + few] = self.chunk_logits(rows - wanted + start, few)

    def chunk_logits(self, start: int, rows: int) -> Tensor:
        """Of at most MAX_ROWS tokens of the last chunk; overwritten by what is next."""
        x = self.buffers.activations.x[start : start + rows]
        tokens = first(self.buffers.tokens, rows)
        run = self.step_pass(self.model.functions.launch, at_once, tokens)
        return plan.head(run, self.model.operands.head, x)

    def _put_chunk(self, launch: Launch, between: Between, tokens: Tokens) -> None:
        own, rows = self.buffers, tokens.ids.shape[0]
        assert own.chunk is not None
        run = ChunkPass(
            self.model.config,
            launch,
            tokens,
            first(own.activations, rows),
            self.tables,
            self.capacity,
            self.model.operands.memory,
            between,
            own.observer(self.model.operands.draft, rows),
            own.chunk.first(rows),
        )
        prefill_plan.chunk(run, self.model.operands, own.caches)

    def _place(self, ids: Tensor, position: int, slot: int) -> Tokens:
        """Tell the device what comes next."""
        rows = ids.shape[0]
        tokens = first(self.buffers.tokens, rows)
        tokens.ids.copy_(ids)
        torch.arange(position, position + rows, out=tokens.position)
        tokens.slot.fill_(slot)
        return tokens


def at_once(function: Callable[[], object]) -> None:
    """Where launches are carried out as they are planned."""
    function()


class SessionSizes(NamedTuple):
    """What an engine takes of its device, in bytes. caches: of all slots; scratch: activations and
    what kernels hand on; tables: of angles, with what they need while they are computed.
    """

    caches: int
    scratch: int
    tables: int

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.caches + self.scratch + self.tables


def session_sizes(
    config: ModelConfig, slots: int, capacity: int, chunk: int | None = None, *, drafts: int = 0
) -> SessionSizes:
    """Of an engine for `slots` sequences of up to `capacity` tokens. chunk: as `Engine` has it;
    drafts: draft layers that are loaded.
    """
    chunk = chunk_rows(capacity) if chunk is None else chunk
    buffers = Buffers.allocate(config, slots, capacity, chunk, META, drafts=drafts)
    caches = nbytes(buffers.caches) + slots * capacity * 4  # the ids that each slot keeps
    whole = nbytes(buffers) + slots * capacity * 4
    return SessionSizes(caches, whole - caches, tables_nbytes(config, capacity + MAX_ROWS))


def tables_nbytes(config: ModelConfig, positions: int) -> int:
    """What angles by position take, with what they need while they are computed in FP64."""
    return positions * config.qk_rope_head_dim // 2 * (4 * 4 + 3 * 8)
