"""`dsv4 bench prompt`: how fast a prompt is read, in chunks of several sizes and by steps alone.

Weights are random bytes of the real shapes and formats (see `random_weights`). Correctness: the
logits of a prompt's first COMPARED tokens, against the reference in float32, beside how far the
reference in bfloat16 is from it; a second reading has to give the same bytes, and so has a reading
in chunks of another size.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dsv4.bench.kernels import Machine, measure_machine
from dsv4.bench.logits import (
    ON_A_GPU,
    Distance,
    distance,
    forward_whole,
    random_ids,
    reference,
)
from dsv4.bench.random_weights import RandomWeights
from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.core.library import Library
from dsv4.kernels.reference.accumulate import temporaries
from dsv4.runtime.gpu.model import GpuModel
from dsv4.runtime.gpu.prefill_plan import LEAST_ROWS

COMPARED = 2112  # the largest chunk and another one; CSA layers choose at the end
BY_STEPS = 1024  # tokens at most that are read by steps: they take long
TURNS = 3


@dataclasses.dataclass(frozen=True)
class Line:
    """chunk: most tokens at once, 0 for steps of 8. seconds: the median, for `tokens` tokens and
    the logits of the last. distance: of the logits from float32. right: within what bfloat16 does,
    and the same bytes every time and in every chunk.
    """

    chunk: int
    tokens: int
    seconds: float
    distance: Distance
    right: bool


@dataclasses.dataclass(frozen=True)
class Report:
    """One run. rounded: how far the reference in bfloat16 is from float32."""

    machine: Machine
    model: str
    layers: int
    tokens: int
    rounded: Distance
    lines: tuple[Line, ...]


def measure(
    config: ModelConfig,
    model: str,
    library: Library,
    device: torch.device,
    *,
    tokens: int,
    chunks: Sequence[int],
) -> Report:
    """Prompts of `tokens` tokens, by chunks of each of `chunks` tokens."""
    weights = RandomWeights(config, device)
    gpu = GpuModel(weights, library, device)
    ids = random_ids(config.vocab_size, max(tokens, COMPARED), 1)
    first = ids[:COMPARED]
    with temporaries(ON_A_GPU):
        exact = forward_whole(reference(weights, torch.float32), first)
        rounded = distance(forward_whole(reference(weights, torch.bfloat16), first), exact)
    lines = tuple(_lines(gpu, ids[:tokens], first, exact, rounded, chunks))
    torch.cuda.empty_cache()
    machine = measure_machine(device)
    return Report(machine, model, config.num_hidden_layers, tokens, rounded, lines)


def _lines(
    gpu: GpuModel,
    ids: Tensor,
    first: Tensor,
    exact: Tensor,
    rounded: Distance,
    chunks: Sequence[int],
) -> Iterator[Line]:
    by_chunks: Tensor | None = None
    for chunk in chunks:
        session = gpu.session(max(len(ids), COMPARED), chunk=chunk)
        found = session.forward(first)
        session.reset()
        same = torch.equal(session.forward(first), found)
        if _in_chunks(chunk, len(first)):
            by_chunks = found if by_chunks is None else by_chunks
            same = same and torch.equal(found, by_chunks)
        ours = distance(found, exact)
        prompt, seconds = ids if chunk else ids[:BY_STEPS], []
        for _ in range(TURNS):
            session.reset()
            begin = time.perf_counter()
            session.forward(prompt, "last").cpu()
            seconds.append(time.perf_counter() - begin)
        right = same and ours.within(rounded)
        yield Line(chunk, len(prompt), statistics.median(seconds), ours, right)


def _in_chunks(chunk: int, tokens: int) -> bool:
    """Whether none of `tokens` tokens are left for steps, whose sums have another order."""
    return chunk >= LEAST_ROWS and not 0 < tokens % chunk < LEAST_ROWS
