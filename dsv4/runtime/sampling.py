"""One token id from one row of logits: greedy, or temperature and nucleus (top-p) sampling.

Sampling is an exponential race (Gumbel-max): with q_i ~ Exp(1) drawn independently,
argmax_i p_i / q_i is distributed as p. It needs no cumulative search and no host
synchronisation, so a decode step stays one stream of kernels. Probabilities and noise are
float64: a float32 uniform has a granularity of 2^-24, too coarse for the tail of a
vocabulary of 129,280 rows.

Every sampler owns its torch.Generator; the global random state is neither read nor written.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal

INVALID_TOKEN = -1
"""What a sampler returns for a row of logits holding NaN or infinity; never a token id."""

_SEED_LIMIT = 1 << 63


class Sampler:
    """Draws token ids from logits. Equal seeds give equal draws on the same kind of device.

    `temperature` 0 is greedy: the largest logit, the lowest id among equals. `top_p` keeps the
    smallest set of most likely ids whose probabilities reach `top_p` (Holtzman et al. 2020),
    equal probabilities in id order. `allowed` restricts the draw to ids below it: rows of the
    head beyond the tokenizer's range are padding. `seed` None takes one from the system.

    Raises RuntimeRefusal for a temperature that is negative or not finite, a `top_p` outside
    (0, 1], a seed outside [0, 2^63) and an `allowed` below 1.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        *,
        allowed: int | None = None,
    ) -> None:
        if not (math.isfinite(temperature) and temperature >= 0):
            raise RuntimeRefusal(
                f"temperature is {temperature}, expected a finite number from 0 (greedy) up"
            )
        if not 0 < top_p <= 1:
            raise RuntimeRefusal(f"top_p is {top_p}, expected more than 0 and at most 1")
        if seed is not None and not 0 <= seed < _SEED_LIMIT:
            raise RuntimeRefusal(f"seed is {seed}, expected an integer in [0, 2^63)")
        if allowed is not None and allowed < 1:
            raise RuntimeRefusal(f"allowed is {allowed}, expected at least one token id")
        self.temperature = temperature
        self.top_p = top_p
        self.seed = torch.Generator().seed() % _SEED_LIMIT if seed is None else seed
        self.allowed = allowed
        self._generator: torch.Generator | None = None

    @torch.no_grad()
    def __call__(self, logits: Tensor) -> Tensor:
        """float [..., vocab] -> int64 [...] on the same device, INVALID_TOKEN for a bad row."""
        logits = logits[..., : self.allowed]
        peak, chosen = logits.max(dim=-1)  # the first of equals; NaN wins over all
        if self.temperature > 0:
            # Less the peak first: a tiny temperature then underflows instead of overflowing.
            scaled = (logits.double() - peak[..., None]) / self.temperature
            probabilities = scaled.softmax(dim=-1)
            if self.top_p < 1:
                probabilities = nucleus(probabilities, self.top_p)
            chosen = self._race(probabilities)
        return torch.where(peak.isfinite(), chosen, INVALID_TOKEN)

    def _race(self, probabilities: Tensor) -> Tensor:
        noise = torch.empty_like(probabilities)
        noise.exponential_(generator=self._generator_on(probabilities.device))
        return (probabilities / noise.clamp_min_(torch.finfo(noise.dtype).tiny)).argmax(dim=-1)

    def _generator_on(self, device: torch.device) -> torch.Generator:
        if self._generator is None or self._generator.device != device:
            self._generator = torch.Generator(device).manual_seed(self.seed)
        return self._generator


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of largest entries whose sum reaches `top_p`.

    `probabilities` [..., vocab] -> the same shape and dtype, not renormalised. The largest
    entry always stays; equal entries are taken in index order.
    """
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1).roll(1, dims=-1)
    before[..., 0] = 0
    kept = ordered.where(before < top_p, 0.0)
    return torch.zeros_like(probabilities).scatter_(-1, ids, kept)
