"""`python -m benchmarks parity`: does the GPU compute what the model says? A comparison a line.

Weights are random bytes of the real shapes and formats, as many layers as asked for. Correctness
only; `dsv4 bench decode` has the times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from benchmarks.parity_logits import Proof, after_long_context, from_the_start
from benchmarks.parity_sessions import sessions
from benchmarks.parity_text import greedy_text
from benchmarks.parity_weights import TellingWeights
from benchmarks.soak import soak
from dsv4.bench.logits import ON_A_GPU
from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.core.library import Library
from dsv4.kernels.reference.accumulate import temporaries
from dsv4.runtime.gpu.model import GpuModel

SELECTION = 2048  # tokens from which on a CSA layer of Flash chooses among its blocks
BEYOND = 64  # tokens of a long context that are read before its end: the next ones cross it


@dataclasses.dataclass(frozen=True)
class Sizes:
    """tokens: of a sequence that the reference reads as well; context: that the kernels read
    alone; compared: tokens after it; text: of a greedy answer; soak: generations.
    """

    tokens: int = 4200
    context: int = 65536
    compared: int = 256
    text: int = 256
    soak: int = 0


def parity(
    config: ModelConfig,
    library: Library,
    device: torch.device,
    parts: tuple[str, ...],
    sizes: Sizes,
) -> Iterator[Proof]:
    """Make weights and compare. parts: "logits", "long", "text", "sessions", "soak"."""
    weights = TellingWeights(config, device)
    with temporaries(ON_A_GPU):
        yield from prove(GpuModel(weights, library, device), weights, parts, sizes)


def prove(
    gpu: GpuModel, weights: TellingWeights, parts: tuple[str, ...], sizes: Sizes
) -> Iterator[Proof]:
    """The same with a model that is there."""
    if "logits" in parts:
        yield from from_the_start(gpu, weights, sizes.tokens, (SELECTION, 2 * SELECTION))
    if "long" in parts:
        yield from after_long_context(gpu, weights, sizes.context - BEYOND, sizes.compared)
    if "text" in parts:
        yield from greedy_text(gpu, weights, sizes.text)
    if "sessions" in parts:
        yield from sessions(gpu, 24)
    if "soak" in parts and sizes.soak:
        yield from soak(gpu, sizes.soak)
