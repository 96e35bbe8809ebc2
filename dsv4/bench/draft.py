"""`dsv4 bench decode --draft`: a proposal of DSpark's layers, and rounds that keep a given number.

A round proposes, runs the token and its drafts in one step, draws after each row, and goes back to
behind the rows that were kept, as `generate` does. How many are kept is forced here: random weights
accept nothing. Proposals are compared with the reference of the same weights before they are timed.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dsv4.bench.decode import MeasuredStep
from dsv4.bench.kernels import Machine, graph_seconds, measure_machine
from dsv4.bench.random_weights import RandomWeights
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import DraftKind
from dsv4.kernels.core.library import Library
from dsv4.kernels.ops.gemv.contract import MAX_ROWS
from dsv4.kernels.reference.numerics import Numerics
from dsv4.runtime.draft import Draft
from dsv4.runtime.gpu.model import GpuModel
from dsv4.runtime.gpu.session import GpuSession
from dsv4.runtime.model import load
from dsv4.runtime.session import SequenceBase
from dsv4.runtime.text.sampling import Sampler

PROMPT, MORE = 41, 24  # tokens of the comparison; steps of one behind them, a proposal after each
ROUNDS, WARM = 24, 4  # of each number that is kept; those that are not timed

# Facts of one H200, resident Flash, which `arithmetic` is made of: seconds of a layer beside its
# experts, of one expert, of a step beside its layers, of a proposal.
LAYER, EXPERT, BESIDE, PROPOSAL = 76e-6, 4.3e-6, 95e-6, 0.85e-3


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Of logits and confidence with the float32 reference, root mean square in units of their
    deviations: (logits, confidence). ours: of the GPU; bfloat16: of the reference in that dtype.
    ids: share of the proposals that are the reference's. repeatable: equal bytes, eager or graph,
    and fewer are the first of more.
    """

    ours: tuple[float, float]
    bfloat16: tuple[float, float]
    ids: float
    repeatable: bool

    @property
    def right(self) -> bool:
        """Whether the kernels are as good as bfloat16 is."""
        pairs = zip(self.ours, self.bfloat16, strict=True)
        return self.repeatable and all(mine <= 1.5 * theirs for mine, theirs in pairs)


@dataclasses.dataclass(frozen=True)
class Round:
    """drafts: how many are run beside the token. step_seconds: of that step with its draws, as a
    graph; seconds: of a whole round, the host's part included, by how many tokens it keeps, 1 and
    up; arithmetic: what facts of single kernels make it, 0.0 for other models than Flash.
    """

    drafts: int
    step_seconds: float
    seconds: tuple[float, ...]
    arithmetic: float


@dataclasses.dataclass(frozen=True)
class Report:
    """plain_seconds: of a step of one token with its draw, without draft layers; observed_seconds:
    with them, which keep what they need of it; proposal_seconds: of a proposal, as a graph;
    launches: of that, of kernels and of torch.
    """

    machine: Machine
    model: str
    layers: int
    experts: int
    context: int
    plain_seconds: float
    observed_seconds: float
    proposal_seconds: float
    launches: int
    rounds: tuple[Round, ...]
    comparison: Comparison | None

    @property
    def right(self) -> bool:
        """Whether nothing that was compared differs by more than it may."""
        return self.comparison is None or self.comparison.right


def draft(
    config: ModelConfig,
    model: str,
    library: Library,
    device: torch.device,
    *,
    context: int,
    check: bool,
) -> Report:
    """Measure a model of `config`, which has DSpark's layers, after `context` tokens.

    check: compare proposals first.
    """
    weights, room = RandomWeights(config, device), context + MAX_ROWS * (ROUNDS + WARM + 2)
    plain = GpuModel(weights, library, device).session(room, chunk=0)
    plain_seconds = graph_seconds([MeasuredStep(plain, context, 1).whole.launch])
    del plain
    session = GpuModel(weights, library, device, drafts=True).session(room, chunk=0)
    comparison = compare(session, weights) if check else None
    return dataclasses.replace(
        measure(session, model, context),
        plain_seconds=plain_seconds,
        comparison=comparison,
    )


def measure(session: GpuSession, model: str, context: int) -> Report:
    """All times but the plain step's, of a session whose draft layers are loaded."""
    engine, config = session.engine, session.model.config
    draft_layers, buffers = session.model.operands.draft, engine.buffers.draft
    assert draft_layers is not None and buffers is not None
    buffers.proposal.place(1, draft_layers.noise, context, session.slot)
    proposal = engine.program(buffers.proposal.tokens, engine.put_proposal)
    return Report(
        measure_machine(session.model.device),
        model,
        config.num_hidden_layers,
        config.n_routed_experts,
        context,
        0.0,
        graph_seconds([MeasuredStep(session, context, 1).whole.launch]),
        graph_seconds([proposal.launch]),
        len(proposal),
        tuple(_rounds(session, model, context)),
        None,
    )


def _rounds(session: GpuSession, model: str, context: int) -> Iterator[Round]:
    config = session.model.config
    for drafts in range(1, session.most_drafts + 1):
        step = graph_seconds([MeasuredStep(session, context, 1 + drafts).whole.launch])
        kept = tuple(
            _round_seconds(session, context, drafts, keep) for keep in range(1, drafts + 2)
        )
        yield Round(drafts, step, kept, arithmetic(config, 1 + drafts) if model == "flash" else 0.0)


def _round_seconds(session: GpuSession, context: int, drafts: int, keep: int) -> float:
    """Median of rounds one after another, as the host sees them. What caches hold does not matter:
    the sequence is said to be as long as `context`.
    """
    session.reset()
    session._position = session._written = context
    sampler, token, times = Sampler(), 1, []
    for number in range(WARM + ROUNDS):
        begin, start = time.perf_counter(), session.position
        ids = [token, *session.propose(token, drafts).ids.tolist()]
        drawn = session.append_and_draw_each(torch.tensor(ids), sampler).tolist()
        session.rewind(start + keep)
        sampler.drawn += keep
        token = max(drawn[keep - 1], 0)
        if number >= WARM:
            times.append(time.perf_counter() - begin)
    session.reset()
    return statistics.median(times)


def arithmetic(config: ModelConfig, rows: int) -> float:
    """Seconds of a round of Flash with a step of `rows`, whose tokens choose experts alike."""
    share = config.num_experts_per_tok / config.n_routed_experts
    experts = config.n_routed_experts * (1 - (1 - share) ** rows)
    return PROPOSAL + config.num_hidden_layers * (LAYER + EXPERT * experts) + BESIDE


def compare(session: GpuSession, weights: RandomWeights) -> Comparison:
    """A prompt by steps of eight, tokens one by one, and a proposal after each of them."""
    config, device = session.model.config, session.model.device
    rng = torch.Generator().manual_seed(2)
    ids = torch.randint(0, config.vocab_size, (PROMPT + MORE + 1,), generator=rng)
    found = _drafted(session, ids)
    again = [session.propose(int(ids[-1]), session.most_drafts) for _ in range(3)]
    few = session.propose(int(ids[-1]), 1)
    repeatable = all(_equal(one, found[-1]) for one in again)
    repeatable &= torch.equal(few.logits, found[-1].logits[:1])
    session.reset()
    repeatable &= all(_equal(*pair) for pair in zip(_drafted(session, ids), found, strict=True))
    session.reset()
    exact, rounded = (
        _drafted(
            load(
                weights,
                device=device,
                dtype=dtype,
                numerics=Numerics.CACHES,
                draft=DraftKind.DSPARK,
            ).session(PROMPT + MORE + MAX_ROWS),
            ids,
        )
        for dtype in (torch.float32, torch.bfloat16)
    )
    same = [(one.ids == other.ids).double().mean() for one, other in zip(found, exact, strict=True)]
    return Comparison(
        _errors(found, exact),
        _errors(rounded, exact),
        float(torch.stack(same).mean()),
        bool(repeatable),
    )


def _drafted(session: SequenceBase, ids: Tensor) -> list[Draft]:
    found = []
    for end in range(PROMPT, len(ids)):
        session.forward(ids[session.position : end], "last")
        found.append(session.propose(int(ids[end]), session.most_drafts))
    return found


def _equal(one: Draft, other: Draft) -> bool:
    assert one.confidence is not None and other.confidence is not None
    pairs = ((one.ids, other.ids), (one.logits, other.logits), (one.confidence, other.confidence))
    return all(torch.equal(a, b) for a, b in pairs)


def _errors(found: Sequence[Draft], exact: Sequence[Draft]) -> tuple[float, float]:
    parts = []
    for name in ("logits", "confidence"):
        mine, wanted = (
            torch.stack([getattr(one, name) for one in drafts]).double()
            for drafts in (found, exact)
        )
        parts.append(float((mine - wanted).square().mean().sqrt() / wanted.std()))
    return parts[0], parts[1]
