"""One token id from one row of logits: greedy, or temperature with nucleus (top-p) and top-k.

The draw itself is `dsv4.kernels.reference.sampling`; the GPU's kernel draws the same tokens. No
generator has a state: a draw is a function of logits, parameters, seed and a counter of draws. The
global random state is neither read nor written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.kernels.reference.sampling import INVALID_TOKEN, MAX_VOCAB, Parameters, sample

__all__ = ["INVALID_TOKEN", "Sampler"]

_SEED_LIMIT = 1 << 63


class Sampler:
    """Draws token ids from logits. Equal seeds give equal draws, on any device.

    `temperature` 0 is greedy: the largest logit, the lowest id among equals. `top_p` keeps the
    smallest set of most likely ids whose probabilities reach `top_p` (Holtzman et al. 2020),
    equal logits in id order; `top_k` keeps that many at most, None all. `allowed` restricts the
    draw to ids below it: rows of the head beyond the tokenizer's range are padding. `seed` None
    takes one from the system. `drawn` counts the tokens drawn so far. Temperature and `top_p` are
    used as float32.

    Raises RuntimeRefusal for a temperature that is negative or not finite, a `top_p` outside
    (0, 1], a seed outside [0, 2^63), and a `top_k` or an `allowed` below 1.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        *,
        top_k: int | None = None,
        allowed: int | None = None,
    ) -> None:
        if not (0 <= temperature <= torch.finfo(torch.float32).max):
            raise RuntimeRefusal(
                f"temperature is {temperature}, expected a finite number from 0 (greedy) up"
            )
        if not 0 < top_p <= 1:
            raise RuntimeRefusal(f"top_p is {top_p}, expected more than 0 and at most 1")
        if seed is not None and not 0 <= seed < _SEED_LIMIT:
            raise RuntimeRefusal(f"seed is {seed}, expected an integer in [0, 2^63)")
        if top_k is not None and top_k < 1:
            raise RuntimeRefusal(f"top_k is {top_k}, expected at least one token")
        if allowed is not None and allowed < 1:
            raise RuntimeRefusal(f"allowed is {allowed}, expected at least one token id")
        self.temperature = temperature
        self.top_p = top_p
        self.seed = torch.Generator().seed() % _SEED_LIMIT if seed is None else seed
        self.top_k = top_k
        self.allowed = allowed
        self.drawn = 0

    def __call__(self, logits: Tensor) -> Tensor:
        """float [..., vocab] -> int64 [...] on the same device, INVALID_TOKEN for a bad row.

        Raises RuntimeRefusal for more than 2^17 ids.
        """
        if logits.shape[-1] > MAX_VOCAB:
            raise RuntimeRefusal(f"{logits.shape[-1]} logits a row, expected at most {MAX_VOCAB}")
        rows = logits.reshape(-1, logits.shape[-1])
        parameters = self.parameters(len(rows), logits.device)
        self.drawn += len(rows)
        return sample(rows, parameters).view(logits.shape[:-1])

    def parameters(self, rows: int, device: torch.device) -> Parameters:
        """Those of the next `rows` draws."""

        def fill(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=device)

        most = min(self.top_k or 0, MAX_VOCAB)
        allowed = MAX_VOCAB if self.allowed is None else min(self.allowed, MAX_VOCAB)
        return Parameters(
            fill(self.temperature, torch.float32),
            fill(self.top_p, torch.float32),
            fill(most, torch.int32),
            fill(allowed, torch.int32),
            fill(self.seed, torch.int64),
            self.drawn + torch.arange(rows, device=device),
        )
