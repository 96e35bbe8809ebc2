"""Logits made ready for a draw: biases, penalties, the tokens that top-k, top-p and min-p leave.

In the order of transformers' `generate`: bias, repetition penalty, then temperature, top-k, top-p
of what top-k leaves, min-p of what is left. Probabilities are the integer weights of
`dsv4.kernels.reference.sampling`, and equal logits rank by id, so that the k-th of equals is
decided where transformers keeps them all.

`repetition_penalty` (Keskar et al. 2019) divides a positive logit of a token that is in the prompt
or the answer, and multiplies a negative one. `presence_penalty` and `frequency_penalty` are those
of OpenAI's interface, on the answer alone: a logit loses the first if its token is there, and the
second for each time it is.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dsv4.kernels.reference.sampling import Parameters, mass_limit, weights


@dataclasses.dataclass(frozen=True)
class Penalties:
    """On tokens that were there before. Neutral: 1, 0, 0."""

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0

    @property
    def neutral(self) -> bool:
        """Whether no logit changes."""
        return self == Penalties()


class Context:
    """The tokens that penalties look at: all of them, and how often the answer has each."""

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        self._seen = set(prompt)
        self._drawn: Counter[int] = Counter()

    def add(self, token: int) -> None:
        """One more token of the answer."""
        self._seen.add(token)
        self._drawn[token] += 1

    def penalised(self, logits: Tensor, penalties: Penalties) -> Tensor:
        """float32 `[T, V]` -> the same, in new memory if anything changes; finite ones stay so."""
        vocab, result = logits.shape[-1], logits.float()
        if penalties.repetition != 1.0:
            ids = _ids([token for token in self._seen if token < vocab], logits)
            value = result[:, ids]
            changed = torch.where(
                value < 0, value * penalties.repetition, value / penalties.repetition
            )
            result = result.index_copy(1, ids, changed)
        counted = {token: n for token, n in self._drawn.items() if token < vocab}
        if counted and (penalties.presence or penalties.frequency):
            ids = _ids(list(counted), logits)
            often = torch.tensor(list(counted.values()), dtype=torch.float64, device=logits.device)
            loss = penalties.presence + penalties.frequency * often
            result = result.index_add(1, ids, -loss.float().expand(len(result), -1))
        limit = torch.finfo(torch.float32).max
        return result.clamp(-limit, limit).where(logits.isfinite(), logits.float())


def biased(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    """float32 `[T, V]` -> the same in new memory, with `bias` added to the logits of its ids; those
    beyond the vocabulary have none.
    """
    found = {token: value for token, value in bias.items() if token < logits.shape[-1]}
    more = torch.tensor(list(found.values()), dtype=torch.float32, device=logits.device)
    return logits.float().index_add(-1, _ids(list(found), logits), more.expand(len(logits), -1))


def keep(logits: Tensor, parameters: Parameters, min_p: float) -> Tensor:
    """float32 `[T, V]` -> the same, -infinity where a token is not to be drawn.

    parameters: temperatures above 0; seeds and counters are not looked at. A row that is no
    distribution (NaN, infinity, nothing but -infinity) stays as it is.
    """
    p = parameters
    vocab = logits.shape[-1]
    ids = torch.arange(vocab, device=logits.device)
    logits = logits.float().where(ids < p.allowed[:, None], -torch.inf)
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    bad = ~ranked[:, 0].isfinite()
    weight = weights(ranked, ranked[:, 0].masked_fill(bad, 0), p.temperature)
    most = p.top_k.masked_fill(p.top_k == 0, vocab)
    weight = weight.where(ids < most[:, None], 0)
    before = weight.cumsum(-1) - weight
    left = (ids < most[:, None]) & (before < mass_limit(weight.sum(-1), p.top_p)[:, None])
    left &= weight.double() >= min_p * weight[:, :1].double()
    left |= bad[:, None]
    return logits.masked_fill(~torch.zeros_like(left).scatter(-1, order, left), -torch.inf)


def _ids(tokens: list[int], like: Tensor) -> Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=like.device)
