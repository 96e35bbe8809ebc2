"""How far logits may be from the reference: as far as the reference in bfloat16 is, and a little.

The kernels round to bfloat16 where the reference in bfloat16 does and sum in float32 where it sums
in FP64, so their distance from the reference in float32 is another sample of the same errors. What
is allowed is therefore what the reference in bfloat16 does in the same run, times a factor that
covers the chance in it: MEDIAN of the median token, RMS of the root mean square, which tokens
dominate whose experts or blocks were chosen otherwise, WORST of the worst token.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dsv4.bench.random_weights import RandomWeights
from dsv4.kernels.reference.numerics import Numerics
from dsv4.runtime.model import Model, load

MEDIAN, RMS, WORST = 1.25, 1.5, 2.0
AT_ONCE = 128  # tokens whose differences are in memory
ON_A_GPU = 1 << 25  # elements of a temporary of the reference


@dataclasses.dataclass(frozen=True)
class Distance:
    """Of logits from others. errors: root mean square of each token, in units of the deviation of
    all logits; same: tokens with the same likeliest id.
    """

    errors: Tensor
    same: Tensor

    def __getitem__(self, tokens: slice) -> Distance:
        return Distance(self.errors[tokens], self.same[tokens])

    @property
    def figures(self) -> tuple[float, float, float]:
        """Median, root mean square and largest of the tokens' errors."""
        e = self.errors
        return float(e.median()), float(e.square().mean().sqrt()), float(e.max())

    def __str__(self) -> str:
        median, rms, worst = self.figures
        return f"{median:.4f} {rms:.4f} {worst:.4f} {float(self.same.float().mean()):.1%}"

    def within(self, rounded: Distance) -> bool:
        """Whether this is as good as `rounded`, the reference in bfloat16."""
        factors = MEDIAN, RMS, WORST
        pairs = zip(self.figures, rounded.figures, factors, strict=True)
        return all(ours <= factor * theirs for ours, theirs, factor in pairs)


def distance(found: Tensor, wanted: Tensor) -> Distance:
    """Of logits `[T, V]`."""
    errors, spreads, same = [], [], []
    for first in range(0, len(found), AT_ONCE):
        ours, theirs = found[first : first + AT_ONCE], wanted[first : first + AT_ONCE]
        errors.append((ours - theirs).double().square().mean(1).sqrt())
        spreads.append(theirs.double().var(1))
        same.append(ours.argmax(1) == theirs.argmax(1))
    unit = torch.cat(spreads).mean().sqrt()
    return Distance((torch.cat(errors) / unit).cpu(), torch.cat(same).cpu())


def reference(
    weights: RandomWeights, dtype: torch.dtype, numerics: Numerics = Numerics.CACHES
) -> Model:
    """The reference on the weights' device."""
    return load(weights, device=weights.device, dtype=dtype, numerics=numerics)


def random_ids(vocab: int, count: int, seed: int) -> Tensor:
    """int64 `[count]` in host memory."""
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed))


def forward_whole(model: Model, ids: Tensor) -> Tensor:
    """Logits of all `ids` as one step of the reference: an expert is unpacked once."""
    session = model.session(len(ids))
    session.step_tokens = len(ids)
    return session.forward(ids)
