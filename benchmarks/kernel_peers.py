"""`python -m benchmarks kernels`: other libraries' kernels beside ours, on the same values.

torch (cuBLAS) on BF16 weights, plain Triton kernels that dequantise (`triton_peers`), and
humming-kernels (`humming_peers`), imported only here and where they are called. Each takes the
codes in the layout that it wants, made beforehand; its figure is what a CUDA graph of its launches
takes with weights outside the L2 cache, as ours. Its bound is the bytes that it reads itself.

A peer's result is held against our reference in FP64, at the tolerance of bfloat16: of a product
2^-8 (|y| + 8 √Σ(x w)²), its rounding and that of four partial sums; of experts 2^-5 of the token's
root mean square, several roundings one after another.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.peer_work import Product, Routed, Subject, Work, subjects
from dsv4.bench.kernels import Machine, copies_of, graph_seconds
from dsv4.formats.errors import KernelError
from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.core.library import Library
from dsv4.kernels.core.verify import launcher
from dsv4.kernels.reference.moe import swiglu

Run = Callable[[], Tensor]
Timer = Callable[[Sequence[Callable[[], object]]], float]


@dataclasses.dataclass(frozen=True)
class PeerLine:
    """One kernel on one shape. ratio: its time over ours; error: its largest difference from the
    reference over its tolerance, right up to 1; fault: why there is no figure.
    """

    shape: str
    model: str
    rows: int
    peer: str
    form: str
    seconds: float | None = None
    nbytes: int = 0
    fraction: float | None = None
    ratio: float | None = None
    error: float | None = None
    fault: str = ""

    @property
    def right(self) -> bool:
        """Whether it ran and every element was within its tolerance."""
        return not self.fault and self.error is not None and self.error <= 1


Prepare = Callable[[Work], Run]
"""Own copies of the weights, then what is timed."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """name; forms: those to try, by name; nbytes: what it reads of the weights."""

    name: str
    forms: Callable[[Work], Mapping[str, Prepare]]
    nbytes: Callable[[Work], int]


def bfloat16_bytes(work: Work) -> int:
    """Two for each weight."""
    if isinstance(work, Product):
        return work.codes.shape[0] * work.x.shape[2] * 2
    return sum(codes[0].numel() * 4 for codes in (work.up[0], work.down[0])) * len(work.chosen)


def torch_forms(work: Work) -> Mapping[str, Prepare]:
    """F.linear, or a product for each group; experts one by one or by grouped products."""
    if isinstance(work, Routed):
        return {"loop over experts": _torch_loop, "grouped_mm": _torch_grouped}
    return {"linear" if work.x.shape[1] == 1 else "bmm": _torch_product}


def _torch_product(work: Work) -> Run:
    assert isinstance(work, Product)
    x, w = work.x, work.plain()
    groups = x.shape[1]
    if groups == 1:
        return lambda: functional.linear(x[:, 0], w)
    cut = w.view(groups, -1, w.shape[1]).transpose(1, 2)
    return lambda: torch.bmm(x.transpose(0, 1), cut).transpose(0, 1).flatten(1)


def _torch_loop(work: Work) -> Run:
    """As transformers' own: who chose what is known beforehand here."""
    assert isinstance(work, Routed)
    up, down, flat = work.plain("up"), work.plain("down"), work.topk_idx.flatten()
    top_k = work.topk_idx.shape[1]
    slots = {e: (flat == e).nonzero().flatten() for e in work.chosen}
    rows = {e: (found // top_k, work.weights.flatten()[found, None]) for e, found in slots.items()}

    def run() -> Tensor:
        total = torch.zeros_like(work.x, dtype=torch.float32)
        for e, (tokens, weight) in rows.items():
            gate, out = functional.linear(work.x[tokens], up[e]).chunk(2, -1)
            act = (swiglu(gate, out, work.limit) * weight).to(torch.bfloat16)
            total.index_add_(0, tokens, functional.linear(act, down[e]).to(torch.float32))
        return total

    return run


def _torch_grouped(work: Work) -> Run:
    """torch's grouped product over choices sorted by expert, sorted beforehand."""
    assert isinstance(work, Routed)
    up, down = work.plain("up").transpose(1, 2), work.plain("down").transpose(1, 2)
    flat, top_k = work.topk_idx.flatten(), work.topk_idx.shape[1]
    order = flat.argsort(stable=True)
    back, tokens = order.argsort(), order // top_k
    ends = torch.bincount(flat, minlength=len(up)).cumsum(0).to(torch.int32)
    weights = work.weights.flatten()[order, None]

    def run() -> Tensor:
        gate, out = functional.grouped_mm(work.x[tokens], up, offs=ends).chunk(2, -1)
        act = (swiglu(gate, out, work.limit) * weights).to(torch.bfloat16)
        parts = functional.grouped_mm(act, down, offs=ends)[back]
        return parts.view(-1, top_k, parts.shape[1]).sum(1, dtype=torch.float32)

    return run


def triton_forms(work: Work) -> Mapping[str, Prepare]:
    """Tiles of a few sizes. Raises ImportError without Triton."""
    triton = importlib.import_module("benchmarks.triton_peers")

    def product(form: object) -> Prepare:
        def prepare(work: Work) -> Run:
            assert isinstance(work, Product)
            own = work.codes.clone(), work.scales.clone(), work.factor
            return lambda: triton.product(work.x, *own, form)

        return prepare

    def routed(form: object) -> Prepare:
        def prepare(work: Work) -> Run:
            assert isinstance(work, Routed)
            stacks = [
                triton.Stack(codes.clone(), scales.clone(), factors)
                for codes, scales, factors in (work.up, work.down)
            ]
            places = triton.slots_by_expert(work.topk_idx)
            return lambda: triton.experts(work.x, *stacks, places, work.weights, work.limit, form)

        return prepare

    if isinstance(work, Routed):
        return {str(form): routed(form) for form in triton.GROUPED_FORMS}
    forms = triton.FORMS if work.factor is None else triton.FP4_FORMS
    return {str(form): product(form) for form in forms}


def humming_forms(work: Work) -> Mapping[str, Prepare]:
    """What its heuristics choose. Raises ImportError without humming-kernels."""
    humming = importlib.import_module("benchmarks.humming_peers")
    return {"its heuristics": humming.routed if isinstance(work, Routed) else humming.product}


def humming_bytes(work: Work) -> int:
    """It holds FP8's scales in bfloat16, one for each row and 128 columns."""
    if isinstance(work, Product) and work.factor is None:
        return work.codes.nbytes + work.codes.nbytes // 64
    return work.nbytes


PEERS = (
    Peer("torch BF16", torch_forms, bfloat16_bytes),
    Peer("Triton", triton_forms, lambda work: work.nbytes),
    Peer("humming-kernels", humming_forms, humming_bytes),
)


def compare(
    config: ModelConfig,
    model: str,
    rows: Sequence[int],
    library: Library,
    machine: Machine,
    device: torch.device,
    *,
    shapes: str = "",
    peers: Iterable[Peer] = PEERS,
    timer: Timer = graph_seconds,
) -> Iterator[PeerLine]:
    """Ours and then every peer, for each shape whose name contains `shapes` and each of `rows`."""
    peers = tuple(peers)
    for subject in subjects(config, model, max(rows), device, shapes):
        for count in rows:
            ours = time_ours(subject, count, library, machine, device, timer)
            yield ours
            for peer in peers:
                yield time_peer(peer, subject, count, machine, device, timer, ours.seconds)


def time_ours(
    subject: Subject,
    rows: int,
    library: Library,
    machine: Machine,
    device: torch.device,
    timer: Timer,
) -> PeerLine:
    """Our kernel at its derived bound."""
    case, buffers = subject.case(rows), subject.of_rows(rows)
    copies = copies_of(sum(buffers[name].nbytes for name in case.cold), device)
    sets = [buffers]
    for _ in range(copies - 1):
        sets.append(buffers | {name: buffers[name].clone() for name in case.cold})
    line = PeerLine(subject.shape, subject.model, rows, "dsv4", "", nbytes=case.nbytes)
    try:
        runs = [launcher(case, library, one) for one in sets]
        runs[0]()
        error = excess(subject.found(buffers), subject.value[:rows], subject.bound[:rows])
        return _timed(line, timer(runs), machine, None, error)
    except KernelError as problem:
        return dataclasses.replace(line, fault=str(problem))


def time_peer(
    peer: Peer,
    subject: Subject,
    rows: int,
    machine: Machine,
    device: torch.device,
    timer: Timer,
    ours: float | None,
) -> PeerLine:
    """The fastest right form of a peer, or the least wrong. What it raises is its line's fault."""
    work = subject.work.front(rows)
    nbytes = peer.nbytes(work)
    line = PeerLine(subject.shape, subject.model, rows, peer.name, "", nbytes=nbytes)
    found = []
    try:
        for form, prepare in peer.forms(work).items():
            runs = [prepare(work) for _ in range(copies_of(nbytes, device))]
            error = excess(runs[0](), subject.value[:rows], subject.tolerance[:rows])
            timed = _timed(dataclasses.replace(line, form=form), timer(runs), machine, ours, error)
            found.append(timed)
            del runs
    except ImportError as problem:
        return dataclasses.replace(line, fault=f"not installed: {problem.name}")
    except Exception as problem:  # it is somebody else's code
        if not found:
            said = f"{type(problem).__name__}: {problem}".splitlines()[0]
            return dataclasses.replace(line, fault=said)
    return min(found, key=lambda one: (not one.right, one.seconds))


def _timed(
    line: PeerLine, seconds: float, machine: Machine, ours: float | None, error: float
) -> PeerLine:
    return dataclasses.replace(
        line,
        seconds=seconds,
        fraction=line.nbytes / machine.bandwidth / seconds,
        ratio=seconds / ours if ours else None,
        error=error,
    )


def excess(found: Tensor, value: Tensor, tolerance: Tensor) -> float:
    """The largest difference over its tolerance; infinite for another shape or for NaN."""
    if found.shape != value.shape:
        return math.inf
    difference = (found.to(torch.float64) - value).abs()
    ratio = torch.where(difference == 0, 0.0, difference / tolerance)
    return float(ratio.nan_to_num(math.inf, math.inf).max())
