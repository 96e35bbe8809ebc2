"""Shared measures of the runtime's tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from dsv4.kernels.reference.router import route_by_score
from dsv4.runtime import moe
from dsv4.runtime.cache import CompressedCache
from dsv4.runtime.indexer import Indexer
from dsv4.runtime.positions import Step

# An FP32 forward pass of these small models is exact to about 4e-6 of the logits' spread.
FLOAT32_TOLERANCE = 1e-4


def deviation(found: Tensor, expected: Tensor) -> float:
    """Largest difference, in standard deviations of the expected logits."""
    return float((found - expected).abs().max() / expected.std())


def token_errors(found: Tensor, expected: Tensor) -> Tensor:
    """RMS difference of each token's logits, in the same unit: `[T]`."""
    return (found - expected).square().mean(-1).sqrt() / expected.std()


@contextmanager
def chosen_by_others(choices: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Run the indexers, but attend to what somebody else chose, one `[T, k]` per CSA layer.

    Yields a list that fills, layer by layer and step by step, with each token's largest gap
    between the scores of the blocks this runtime picks and of those the other picked: `[T]`, in
    standard deviations of the scores. Two right choices can differ only among equal scores.
    """
    gaps: list[Tensor] = []
    layers = itertools.cycle(choices)
    own_call = Indexer.__call__

    def call(self: Indexer, x: Tensor, qr: Tensor, step: Step, cache: CompressedCache) -> Tensor:
        own = own_call(self, x, qr, step, cache)
        theirs = next(layers)[step.position : step.position + step.length]
        own = pad(own, (0, theirs.shape[1] - own.shape[1]), value=-1)
        scores = self.scores(x, qr, step, cache)
        visible = torch.arange(scores.shape[1]) < step.visible_blocks(self.ratio)[:, None]
        best = [
            scores.gather(1, picked.clamp(min=0)).masked_fill(picked < 0, 0).sort(1).values
            for picked in (own, theirs)
        ]
        gaps.append((best[0] - best[1]).abs().amax(1) / scores[visible].std())
        return theirs

    with patch.object(Indexer, "__call__", call):
        yield gaps


@contextmanager
def expert_gaps() -> Iterator[list[Tensor]]:
    """Yields a list that fills, router by router, with each token's gap `[T]` between the last
    expert that is chosen and the first that is not, in standard deviations of the scores.

    Where it is within rounding, processors differ in the choice, and one token's logits by much.
    """
    gaps: list[Tensor] = []

    def call(logits: Tensor, bias: Tensor, top_k: int, scaling: float) -> tuple[Tensor, Tensor]:
        scores = softplus(logits).sqrt() + bias
        best = scores.sort(1, descending=True).values
        if best.shape[1] > top_k:
            gaps.append((best[:, top_k - 1] - best[:, top_k]) / scores.std())
        return route_by_score(logits, bias, top_k, scaling)

    with patch.object(moe, "route_by_score", call):
        yield gaps
