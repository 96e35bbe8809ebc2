"""`dsv4 bench decode`: a step of a real model's layers on a GPU, checked, then timed.

Weights are random bytes of the real shapes and formats (see `random_weights`). The bound is the
bytes that a step has to read, at the bandwidth measured in the same run. Correctness: logits
against the reference in float32, beside how far the reference in bfloat16 is from it; the same
bytes one by one and several tokens at once, launched and as a graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dsv4.bench.kernels import Machine, graph_seconds, measure_machine
from dsv4.bench.random_weights import RandomWeights
from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.core.library import Library
from dsv4.kernels.ops.gemv.contract import MAX_ROWS
from dsv4.kernels.reference.numerics import Numerics
from dsv4.runtime.gpu import plan
from dsv4.runtime.gpu.activations import Tokens
from dsv4.runtime.gpu.caches import read_nbytes
from dsv4.runtime.gpu.model import GpuModel
from dsv4.runtime.gpu.operands import parts
from dsv4.runtime.gpu.plan import StepPass
from dsv4.runtime.gpu.program import Call, Program
from dsv4.runtime.gpu.session import GpuSession
from dsv4.runtime.gpu.weights import DeviceWeights
from dsv4.runtime.model import load
from dsv4.runtime.text.sampling import Sampler

PROMPT = 41  # tokens of the comparison, read eight at once, and
MORE = 7  # one by one


@dataclasses.dataclass(frozen=True)
class Step:
    """rows tokens at once. seconds: of a step with the head and the draw; layer_seconds: without
    them, of a layer; layer_bound: of a layer's bytes; nbytes: what the step has to read; fraction:
    of the bound; experts: how many a layer reads on average, of those that its rows chose.
    """

    rows: int
    seconds: float
    layer_seconds: float
    layer_bound: float
    nbytes: int
    fraction: float
    experts: float
    launches: int


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Logits against the float32 reference, root mean square in units of their deviation.

    ours: of the GPU's kernels; bfloat16: of the reference in that dtype. top1: how often both have
    the same likeliest token. repeatable: equal bytes whatever the cuts, eager or graph.
    """

    ours: float
    bfloat16: float
    top1: float
    repeatable: bool

    @property
    def right(self) -> bool:
        """Whether the kernels are as good as bfloat16 is: roundings alike, in other places."""
        return self.repeatable and self.ours <= 1.5 * self.bfloat16


@dataclasses.dataclass(frozen=True)
class Report:
    """One run."""

    machine: Machine
    model: str
    layers: int
    context: int
    steps: tuple[Step, ...]
    agreement: Agreement | None

    @property
    def right(self) -> bool:
        """Whether nothing that was compared differs by more than it may."""
        return self.agreement is None or self.agreement.right


def few_layers(config: ModelConfig, layers: int) -> ModelConfig:
    """The first `layers` layers of a model, which are of all kinds; draft layers read the last."""
    ratios, tapped = config.compress_ratios[:layers], config.dspark_target_layer_ids
    return dataclasses.replace(
        config,
        num_hidden_layers=layers,
        compress_ratios=ratios,
        dspark_target_layer_ids=tapped and tuple(range(layers - len(tapped), layers)),
    )


def decode(
    config: ModelConfig,
    model: str,
    library: Library,
    device: torch.device,
    *,
    context: int,
    rows: Sequence[int],
    check: bool,
) -> Report:
    """Measure steps of `rows` tokens after `context` others; check: compare logits first."""
    weights = RandomWeights(config, device)
    gpu = GpuModel(weights, library, device)
    session = gpu.session(context + MAX_ROWS, chunk=0)
    return measure(session, weights, model, context, rows, check=check)


def measure(
    session: GpuSession,
    weights: RandomWeights,
    model: str,
    context: int,
    rows: Sequence[int],
    *,
    check: bool = True,
) -> Report:
    """The same with a session that is there, of a model of `weights`."""
    agreement = compare(session, weights) if check else None
    machine = measure_machine(session.model.device)
    steps = tuple(time_steps(session, context, rows, machine))
    layers = session.model.config.num_hidden_layers
    return Report(machine, model, layers, context, steps, agreement)


class MeasuredStep:
    """A step of `rows` tokens from `position` on, and the same of layers alone.

    whole draws as well, but elsewhere than into its own input: repeated, its rows would soon be
    the same token, which reads the same experts, and leave the caches at their end. body: without
    the head. Nothing of the sequence is kept: `reset` afterwards.
    """

    def __init__(self, session: GpuSession, position: int, rows: int) -> None:
        engine, config, device = session.engine, session.model.config, session.model.device
        self.tokens = Tokens.allocate(rows, device)
        torch.arange(position, position + rows, out=self.tokens.position)
        rng = torch.Generator().manual_seed(rows)
        self.tokens.ids.copy_(torch.randint(config.vocab_size, (rows,), generator=rng))
        self.tokens.slot.fill_(session.slot)
        drawn = Tokens.allocate(rows, device)
        drawn.position.copy_(self.tokens.position)
        parameters = Sampler().parameters(rows, device)

        def step_and_draw(run: StepPass) -> None:
            plan.draw(run, engine.put_step(run), parameters, drawn)

        def layers(run: StepPass) -> None:
            plan.layers(run, session.model.operands, engine.buffers.caches)

        self._chosen = engine.buffers.activations.topk_idx[:rows]
        self.whole: Program = engine.program(self.tokens, step_and_draw)
        self.body: Program = engine.program(self.tokens, layers)
        for program in (self.whole, self.body):
            program.launch()  # loads the kernels' code

    def choices(self) -> list[Tensor]:
        """What the step chooses, int32 `[T, k]` for each layer."""
        found = []
        for call in self.body.calls:
            call()
            if isinstance(call, Call) and call.kernel.operation == "router":
                found.append(self._chosen.clone())
        return found


def time_steps(
    session: GpuSession, context: int, rows: Sequence[int], machine: Machine
) -> Iterator[Step]:
    """Graph replays, the caches as they are: their content does not change what is read."""
    config = session.model.config
    for count in rows:
        step = MeasuredStep(session, context, count)
        seconds = graph_seconds([step.whole.launch])
        layers = graph_seconds([step.body.launch]) / config.num_hidden_layers
        chosen = [len(set(one.flatten().tolist())) for one in step.choices()]
        nbytes, head = step_bytes(session, context, count, chosen)
        bound = nbytes / machine.bandwidth
        layer_bound = (nbytes - head) / machine.bandwidth / config.num_hidden_layers
        experts = sum(chosen) / len(chosen)
        timed = (seconds, layers, layer_bound, nbytes, bound / seconds)
        yield Step(count, *timed, experts, len(step.whole))


def step_bytes(
    session: GpuSession, context: int, rows: int, chosen: Sequence[int]
) -> tuple[int, int]:
    """Weights, the experts that were chosen (how many, by layer), and caches of one sequence.

    -> bytes of the step; those of them that the head takes. Of embeddings and of the tables that
    choose experts a step reads a few rows, which are not counted.
    """
    config, model = session.model.config, session.model.operands
    whole = head = sum(one.nbytes for one in parts((model.before_head, model.head), Tensor))
    for layer, count in zip(model.layers, chosen, strict=True):
        whole += sum(one.nbytes for one in parts(layer, Tensor))
        if layer.gate.tid2eid is not None:
            whole -= layer.gate.tid2eid.nbytes
        own = layer.experts.routed
        whole -= own.records.nbytes + own.prompt_places.nbytes
        whole += own.records.shape[1] * count
    return whole + read_nbytes(config, context, rows), head


def compare(session: GpuSession, weights: DeviceWeights) -> Agreement:
    """A prompt, and tokens one by one, through the kernels and through the reference."""
    config, device = session.model.config, session.model.device
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(0, config.vocab_size, (PROMPT + MORE,), generator=rng)
    parts = [session.forward(ids[:PROMPT])]
    parts += [session.forward(ids[n : n + 1]) for n in range(PROMPT, PROMPT + MORE)]
    found = torch.cat(parts)
    session.reset()
    repeatable = torch.equal(session.forward(ids), found)
    session.reset()
    references = [
        load(weights, device=device, dtype=dtype, numerics=Numerics.CACHES)  # type: ignore[arg-type]
        .session(PROMPT + MORE)
        .forward(ids)
        .double()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    exact, rounded = references
    unit = exact.std()
    errors = [float((one - exact).square().mean().sqrt() / unit) for one in (found, rounded)]
    same = float((found.argmax(1) == exact.argmax(1)).float().mean())
    return Agreement(errors[0], errors[1], same, repeatable)
