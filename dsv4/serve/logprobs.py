"""Logarithms of probabilities by raw logits: a row's do not depend on the rows beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.serve.jobs import TokenLogprob


@dataclasses.dataclass(frozen=True, eq=False)
class Likeliest:
    """Of one row, where its logits are: float64. Nothing of the vocabulary's size is kept.

    total: the logarithm of the sum of exponentials; ids, values: of the likeliest ones.
    """

    total: Tensor
    ids: Tensor
    values: Tensor

    @classmethod
    def of(cls, row: Tensor, count: int) -> Likeliest:
        """row: float32 `[vocab]`."""
        values, ids = row.topk(min(count, row.shape[0]))
        return cls(row.double().logsumexp(0), ids, values.double())

    def told(self, token: int, logit: float) -> TokenLogprob:
        """Of a token with its logit. Waits for the device. Equal logits rank by id."""
        total = float(self.total)
        pairs = zip(self.values.tolist(), self.ids.tolist(), strict=True)
        ranked = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))
        return TokenLogprob(token, logit - total, tuple((i, value - total) for value, i in ranked))


def of_rows(rows: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprob]:
    """rows: float32 `[T, vocab]`, each what one of `tokens` was drawn from, or could have been."""
    found = [Likeliest.of(row, count) for row in rows]
    logits = rows.gather(1, torch.tensor(tokens, device=rows.device)[:, None])[:, 0].double()
    return [
        one.told(token, logit)
        for one, token, logit in zip(found, tokens, logits.tolist(), strict=True)
    ]


def without(row: Tensor, mask: Tensor) -> Tensor:
    """The row `[vocab]` with -infinity where `mask` is False, in new memory."""
    if row.device.type == "cuda":
        mask = mask.pin_memory().to(row.device, non_blocking=True)
    return row.masked_fill(~mask, -torch.inf)
