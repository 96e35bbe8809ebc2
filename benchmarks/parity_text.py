"""Greedy text of the GPU's kernels against the reference, token by token along the same text.

Both continue a random prompt; where the reference would take another token it is given the kernels'
(so one pass of it sees all of them). A difference is explained where the reference's own margin
between the two tokens is within the error of a difference of two logits: SIGMAS times
the root mean square by which the reference in bfloat16 is off in such differences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from benchmarks.parity_logits import Proof
from dsv4.bench.logits import forward_whole, random_ids, reference
from dsv4.bench.random_weights import RandomWeights
from dsv4.runtime.gpu.model import GpuModel
from dsv4.runtime.text.generate import generate
from dsv4.runtime.text.sampling import Sampler

SIGMAS = 4.0


@dataclasses.dataclass(frozen=True)
class Difference:
    """At token `place` the kernels took `ours`, the reference `theirs`, by `margin`."""

    place: int
    ours: int
    theirs: int
    margin: float

    def __str__(self) -> str:
        return f"token {self.place}: {self.ours} for {self.theirs}, margin {self.margin:.4f}"


def greedy_text(
    gpu: GpuModel, weights: RandomWeights, tokens: int, prompt: int = 64
) -> Iterator[Proof]:
    """`tokens` tokens after a random prompt."""
    ids = random_ids(gpu.config.vocab_size, prompt, 3)
    drawn = list(generate(gpu.session(prompt + tokens), ids, tokens, Sampler()))
    text = torch.tensor(drawn, device=weights.device)
    whole = torch.cat((ids, text.cpu()))[:-1]
    exact = forward_whole(reference(weights, torch.float32), whole)[prompt - 1 :]
    rounded = forward_whole(reference(weights, torch.bfloat16), whole)[prompt - 1 :]
    spread = (rounded - exact).double().square().mean().sqrt()
    bound = SIGMAS * 2**0.5 * float(spread)
    best, theirs = exact.topk(2, 1)
    margins = best[:, 0] - exact.gather(1, text[:, None])[:, 0]
    places = (theirs[:, 0] != text).nonzero()[:, 0].tolist()
    found = [Difference(n, drawn[n], int(theirs[n, 0]), float(margins[n])) for n in places]
    others = int((rounded.argmax(1) != theirs[:, 0]).sum())
    clear = int((best[:, 0] - best[:, 1] > bound).sum())
    first = places[0] if places else tokens
    yield Proof(
        f"greedy text of {tokens} tokens, {len(set(drawn))} different",
        f"{tokens - len(found)} equal, the first {first} in a row; {len(found)} differ",
        f"the reference in bfloat16 differs at {others}; {clear} margins exceed the bound",
        len(found) <= 2 * others + 3,
    )
    yield Proof(
        f"margin of the reference between its token and the kernels', {len(found)} times",
        f"at most {max((one.margin for one in found), default=0.0):.4f}",
        f"{bound:.4f}, {SIGMAS:g} deviations",
        all(one.margin <= bound for one in found),
        tuple(str(one) for one in found),
    )
