"""What a model launches, found without a GPU: its plan is carried out on tensors without memory.

So kernels are built for the released models and for any store, and looked for before one is
loaded. Every launch is checked as if it happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.store.matrix_views import Nodes
from dsv4.kernels.core.signature import Kernel
from dsv4.kernels.limits import few, refusals
from dsv4.kernels.ops.experts.contract import Shape
from dsv4.kernels.ops.experts.fetch_contract import fetch
from dsv4.kernels.ops.gemv.contract import MAX_ROWS
from dsv4.kernels.ops.xxh3.contract import xxh3
from dsv4.runtime.gpu import draft_plan, plan, prefill_plan
from dsv4.runtime.gpu.activations import CAPACITIES, first
from dsv4.runtime.gpu.draft_plan import block_pass, propose
from dsv4.runtime.gpu.engine import META, Buffers
from dsv4.runtime.gpu.operands import Model, read_model
from dsv4.runtime.gpu.plan import StepPass
from dsv4.runtime.gpu.prefill_plan import SIZES, ChunkPass
from dsv4.runtime.gpu.program import arguments
from dsv4.runtime.gpu.weights import Loaded
from dsv4.runtime.load.outline import OutlinedWeights
from dsv4.runtime.positions import RopeTable, RopeTables
from dsv4.runtime.text.sampling import Sampler


def refuse_sizes(store: Nodes) -> None:
    """Raise RuntimeRefusal for a model of sizes that no kernel takes."""
    if refused := list(refusals(store.config)):
        raise RuntimeRefusal(f"no GPU runs {store.root.name}: {few(refused)}")


def outlined_model(store: Nodes, *, drafts: bool = False) -> Model:
    """The operands of a store without their bytes: of the first layer of every kind, in which
    something is of another kind, format or shape. drafts: and of its DSpark layers.

    Raises as `refuse_sizes`, and RuntimeRefusal naming a tensor in a format that no kernel reads,
    or draft layers of sizes that none takes.
    """
    refuse_sizes(store)
    if drafts:
        draft_plan.require(store.config)
    kinds: dict[int, list[object]] = {
        layer: [store.config.compress_ratio(layer), store.config.is_hash_layer(layer), not layer]
        for layer in range(store.config.num_hidden_layers)
    }
    for path, spec in store.hierarchy.arrays.items():
        top, _, rest = path.partition("/")
        number, _, member = rest.partition("/")
        if top == "layers":
            kinds[int(number)].append((member, spec.element, spec.shape, spec.chunk))
    found: dict[tuple[object, ...], int] = {}
    for layer, kind in kinds.items():
        found.setdefault(tuple(kind), layer)
    return read_model(Loaded(OutlinedWeights(store)), found.values(), drafts=drafts)


def all_kernels(model: Model) -> Iterator[Kernel]:
    """What a model needs, whatever the length of its sequences; some more than once."""
    model = model.different_layers()
    yield xxh3()  # compares what is loaded with its checksums
    yield draw_kernel(model)
    yield fetch_kernel(model.config)
    for capacity in CAPACITIES:
        for rows in range(1, MAX_ROWS + 1):
            yield from step_kernels(model, rows, capacity)
        for rows in SIZES:
            yield from chunk_kernels(model, rows, capacity)
        yield from proposal_kernels(model, capacity)


def fetch_kernel(config: ModelConfig) -> Kernel:
    """What brings a step's experts that are not on the GPU, and counts them."""
    return fetch(Shape.of(config).record.nbytes, config.n_routed_experts)


def step_kernels(model: Model, rows: int, capacity: int) -> list[Kernel]:
    """What a step of `rows` tokens launches with caches for `capacity`, in order; no draw."""
    rehearsal = Rehearsal(model, rows, capacity, 0)
    plan.step(rehearsal.step_pass(), model, rehearsal.own.caches)
    return rehearsal.kernels


def chunk_kernels(model: Model, rows: int, capacity: int) -> list[Kernel]:
    """What a chunk of `rows` tokens launches with caches for `capacity`, in order."""
    rehearsal = Rehearsal(model, rows, capacity, rows)
    prefill_plan.chunk(rehearsal.chunk_pass(), model, rehearsal.own.caches)
    return rehearsal.kernels


def draw_kernel(model: Model) -> Kernel:
    """The kernel that draws."""
    rehearsal = Rehearsal(model, 1, 1, 0)
    run = rehearsal.step_pass()
    parameters = Sampler(seed=0).parameters(1, META)
    plan.draw(run, rehearsal.own.step.logits[:1], parameters, run.tokens)
    return rehearsal.kernels[0]


def proposal_kernels(model: Model, capacity: int) -> list[Kernel]:
    """What a proposal launches with caches for `capacity`, in order; none without draft layers."""
    if model.draft is None:
        return []
    rehearsal = Rehearsal(model, model.draft.block, capacity, 0)
    assert rehearsal.own.draft is not None
    own = rehearsal.own.draft.proposal
    propose(block_pass(rehearsal.step_pass(), own), model, rehearsal.own.caches, own)
    return rehearsal.kernels


def _nothing(function: Callable[[], object]) -> None:
    """Nothing is computed."""


class Rehearsal:
    """A pass of `rows` tokens, and the kernels that it launched."""

    def __init__(self, model: Model, rows: int, capacity: int, chunk: int) -> None:
        self.config, self.rows, self.capacity = model.config, rows, capacity
        self.draft = model.draft
        drafts = 0 if model.draft is None else len(model.draft.stages)
        self.own = Buffers.allocate(model.config, 1, capacity, chunk, META, drafts=drafts)
        self.kernels: list[Kernel] = []

    def note(self, kernel: Kernel, **given: Tensor | int) -> None:
        """See `program.Launch`."""
        arguments(kernel, given)
        self.kernels.append(kernel)

    def step_pass(self) -> StepPass:
        """For a step."""
        return StepPass(
            self.config,
            self.note,
            first(self.own.tokens, self.rows),
            first(self.own.activations, self.rows),
            self._tables(),
            self.capacity,
            None,
            _nothing,
            self.own.observer(self.draft, self.rows),
            self.own.step,
            ctas=1,
        )

    def chunk_pass(self) -> ChunkPass:
        """For a chunk."""
        assert self.own.chunk is not None
        return ChunkPass(
            self.config,
            self.note,
            first(self.own.tokens, self.rows),
            first(self.own.activations, self.rows),
            self._tables(),
            self.capacity,
            None,
            _nothing,
            self.own.observer(self.draft, self.rows),
            self.own.chunk.first(self.rows),
        )

    def _tables(self) -> RopeTables:
        angles = torch.empty(self.capacity, self.config.qk_rope_head_dim // 2, device=META)
        table = RopeTable(angles, angles)
        return RopeTables(table, table)
