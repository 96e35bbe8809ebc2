"""Which arithmetic the forward pass follows."""

from __future__ import annotations

import enum


class Numerics(enum.StrEnum):
    """Whether the quantisation the weights were trained with is simulated.

    EXACT: no activation or cache is quantised; the mathematics of the weights as stored. This
    is what transformers computes.
    CACHES: activations are not rounded, but attention's keys and the indexer's queries and keys
    are, as in `OFFICIAL`. This is what the GPU kernels compute.
    OFFICIAL: activations entering FP8 and FP4 weights, the attention's keys and the indexer's
    queries and keys are rounded as DeepSeek's own inference code rounds them.
    """

    EXACT = "exact"
    CACHES = "caches"
    OFFICIAL = "official"
