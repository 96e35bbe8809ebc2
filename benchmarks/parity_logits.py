"""Logits of the GPU's kernels against the reference on the same GPU, at short and long contexts.

What is allowed is in `dsv4.bench.logits`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.reference_state import take_over
from dsv4.bench.logits import (
    MEDIAN,
    RMS,
    WORST,
    Distance,
    distance,
    forward_whole,
    random_ids,
    reference,
)
from dsv4.bench.random_weights import RandomWeights
from dsv4.kernels.reference.numerics import Numerics
from dsv4.runtime.gpu.model import GpuModel
from dsv4.runtime.session import Session


@dataclasses.dataclass(frozen=True)
class Proof:
    """One thing that was to be shown. found and beside it what is allowed, in words; details: of
    single tokens.
    """

    what: str
    found: str
    allowed: str
    right: bool
    details: tuple[str, ...] = ()


def from_the_start(
    gpu: GpuModel, weights: RandomWeights, tokens: int, bounds: Sequence[int]
) -> Iterator[Proof]:
    """All logits of a sequence of `tokens`, in spans that end at `bounds` and at its end."""
    ids = random_ids(gpu.config.vocab_size, tokens, 1)
    exact = forward_whole(reference(weights, torch.float32), ids)
    rounded = distance(forward_whole(reference(weights, torch.bfloat16), ids), exact)
    ours = distance(gpu.session(tokens).forward(ids), exact)
    ends = [*(bound for bound in bounds if bound < tokens), tokens]
    for first, end in zip([0, *ends], ends, strict=False):
        span = slice(first, end)
        yield _proof(f"logits of tokens {first} to {end - 1}", ours[span], rounded[span])
    plain = forward_whole(reference(weights, torch.float32, Numerics.EXACT), ids)
    yield Proof(
        "the same reference with caches that are not rounded, for comparison",
        str(distance(plain, exact)),
        "",
        True,
    )


def after_long_context(
    gpu: GpuModel, weights: RandomWeights, context: int, tokens: int
) -> Iterator[Proof]:
    """Logits of `tokens` tokens after `context` others, which the GPU's kernels have read.

    The references take over what the kernels left in their caches. Others, whose compressed
    entries are wrong in layers of one kind, must not pass: else the comparison would not tell.
    """
    ids = random_ids(gpu.config.vocab_size, context + tokens, 2)
    session = gpu.session(context + tokens)
    session.forward(ids[:context], "last")

    def continued(dtype: torch.dtype, spoil: Callable[[Session], None] | None = None) -> Tensor:
        other = reference(weights, dtype).session(context + tokens)
        other.step_tokens = tokens
        take_over(other, session)
        if spoil is not None:
            spoil(other)
        return other.forward(ids[context:])

    exact = continued(torch.float32)
    rounded = distance(continued(torch.bfloat16), exact)
    faults = {what: distance(continued(torch.float32, f), exact) for what, f in FAULTS.items()}
    ours = distance(session.forward(ids[context:]), exact)
    yield _proof(f"logits of tokens {context} to {context + tokens - 1}", ours, rounded)
    for what, wrong in faults.items():
        noticed = not wrong.within(rounded)
        yield Proof(f"planted in the reference: {what}", str(wrong), "more than that", noticed)


def _other_entries(session: Session) -> None:
    """CSA: the entry of the block before the one whose key was chosen."""
    for layer, cache in enumerate(session.caches):
        if cache.compressed is not None and cache.index_keys is not None:
            blocks = session.position // session.model.config.compress_ratio(layer)
            filled = cache.compressed.entries[:blocks]
            filled.copy_(filled.roll(1, 0))


def _lost_entries(session: Session) -> None:
    """HCA: what is there is lost. Of a half the logits tell less than of rounding to bfloat16."""
    for layer, cache in enumerate(session.caches):
        if cache.compressed is not None and cache.index_keys is None:
            blocks = session.position // session.model.config.compress_ratio(layer)
            cache.compressed.entries[:blocks] = 0


FAULTS = {"CSA entries off by one": _other_entries, "HCA's entries lost": _lost_entries}


def _proof(what: str, ours: Distance, rounded: Distance) -> Proof:
    allowed = f"bfloat16: {rounded}; times {MEDIAN}, {RMS}, {WORST}"
    return Proof(what, str(ours), allowed, ours.within(rounded))
