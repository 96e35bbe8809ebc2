"""What a drafter proposes: tokens that the model itself then confirms or rejects."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Draft:
    """Proposals for the tokens that follow one that is drawn and not yet fed.

    ids: int64 `[k]`. logits: float32 `[k, vocab]`, of which each id is the argmax. confidence:
    float32 `[k]`, whose sigmoid estimates that the model accepts a row where it accepted all rows
    before; None of a drafter without a confidence head.
    """

    ids: Tensor
    logits: Tensor
    confidence: Tensor | None
