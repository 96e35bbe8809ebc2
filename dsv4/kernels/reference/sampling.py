"""Drawing a token from logits: the same token on every device, to the last bit.

A token's weight is an integer, `2^46 exp((logit - largest) / temperature)` with a relative error
below 2^-30, from operations that every device rounds alike (float64 without fusing, then integers).
Sums of weights are therefore exact in any order, and so is every decision made with them.

Tokens are ranked by logit, equal ones by id. A token is kept when the weights ranked before it make
less than `top_p` of all, and fewer than `top_k` tokens are ranked before it. A draw is from all
tokens; one that is not kept is drawn again from those ranked before it, which the kept ones are
among. That samples the kept tokens by their weights and needs no sorting. Draw number `attempt` of
a row uses 64 bits of Philox4x32-10 with the row's seed as key and `(counter, attempt, 0)` as
counter (Salmon et al. 2011), and takes the token in whose part of the running sum they fall.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MAX_VOCAB = 1 << 17  # so that a sum of weights stays below 2^63
WEIGHT_BITS = 46
LOG2E = math.log2(math.e)
LOWEST = 64.0  # powers of two below the largest weight; there is nothing from 46 on
EXPONENT_BASE = 2.0**20  # added to an exponent, its fraction is the low word
POLYNOMIAL = (0xB1721809, 0x3D7F7A4A, 0x0E3593C3, 0x027614E8, 0x0057F160, 0x00096C19, 0x0001678C)
"""`(2^x - 1) / x` on [0, 1), times 2^32; each product rounded down. Relative error below 2^-31."""

INVALID_TOKEN = -1
"""The token of a row whose logits hold NaN or infinity, or are all -infinity."""

_WORD = 0xFFFFFFFF
_MANTISSA = (1 << 52) - 1
_ROUNDS = 10


class Parameters(NamedTuple):
    """Of each row `[T]`. temperature: float32, 0 is greedy; top_p: float32, from 1 on all; top_k:
    int32, 0 is all; allowed: int32, ids from it on are never drawn; seed, counter: int64.
    """

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    allowed: Tensor
    seed: Tensor
    counter: Tensor


@torch.no_grad()
def sample(logits: Tensor, parameters: Parameters) -> Tensor:
    """float32 `[T, V]` -> int64 `[T]`: a token of each row, or INVALID_TOKEN."""
    p = parameters
    ids = torch.arange(logits.shape[-1], device=logits.device)
    logits = logits.float().where(ids < p.allowed[:, None], -math.inf)
    peak, token = logits.max(dim=-1)  # the first of equals; NaN wins over all
    bad = ~peak.isfinite()
    undecided = ((p.temperature > 0) & ~bad).nonzero()[:, 0]
    weight = weights(logits[undecided], peak[undecided], p.temperature[undecided])
    limit = mass_limit(weight.sum(-1), p.top_p[undecided])
    attempt = 0
    while len(undecided):
        rows = logits[undecided]
        seed, counter = p.seed[undecided], p.counter[undecided]
        place = scale(random_bits(seed, counter, attempt), weight.sum(-1))
        drawn = (weight.cumsum(-1) <= place[:, None]).sum(-1)
        token[undecided] = drawn
        value = rows.gather(-1, drawn[:, None])
        ahead = (rows > value) | ((rows == value) & (ids < drawn[:, None]))
        weight = weight.where(ahead, 0)
        most = p.top_k[undecided]
        refused = (weight.sum(-1) >= limit) | ((most > 0) & (ahead.sum(-1) >= most))
        undecided, weight, limit = undecided[refused], weight[refused], limit[refused]
        attempt += 1
    return token.masked_fill(bad, INVALID_TOKEN)


def weights(logits: Tensor, peak: Tensor, temperature: Tensor) -> Tensor:
    """Finite peaks, temperatures above 0 -> int64 `[T, V]`, each below 2^46."""
    factor = LOG2E / temperature.double()
    exponent = (peak.double()[:, None] - logits.double()) * factor[:, None]
    fixed = (exponent.clamp(max=LOWEST) + EXPONENT_BASE).view(torch.int64) & _MANTISSA
    whole, part = fixed >> 32, ~fixed & _WORD  # 2^-e = 2^-(whole + 1) 2^(part / 2^32)
    result = torch.full_like(part, POLYNOMIAL[-1])
    for coefficient in reversed(POLYNOMIAL[:-1]):
        result = coefficient + _high(result, part)
    mantissa = (1 << 32) + _high(result, part)
    return (mantissa << (WEIGHT_BITS - 33)) >> whole.clamp(max=63)


def mass_limit(total: Tensor, top_p: Tensor) -> Tensor:
    """int64: a token is kept when the weights before it are less. The first always is."""
    part = (total.double() * top_p.double()).ceil().to(torch.int64).clamp(min=1)
    return part.where(top_p < 1, torch.iinfo(torch.int64).max)


def random_bits(seed: Tensor, counter: Tensor, attempt: int) -> tuple[Tensor, Tensor]:
    """The low and the high word of 64 random bits of each row."""
    words = philox(
        (counter & _WORD, counter >> 32 & _WORD, torch.full_like(counter, attempt), counter * 0),
        (seed & _WORD, seed >> 32 & _WORD),
    )
    return words[0], words[1]


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10. Words are int64 below 2^32."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c  # wrap as unsigned numbers do
        a, b, c, d = (
            (second >> 32 & _WORD) ^ b ^ k0,
            second & _WORD,
            (first >> 32 & _WORD) ^ d ^ k1,
            first & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return a, b, c, d


def scale(bits: tuple[Tensor, Tensor], total: Tensor) -> Tensor:
    """64 random bits to a number from 0 to total - 1: the high half of the 128-bit product."""
    low, high = bits
    t0, t1 = total & _WORD, total >> 32
    inner, outer = high * t0, low * t1
    carried = _high(low, t0) + (inner & _WORD) + (outer & _WORD)
    return high * t1 + (inner >> 32 & _WORD) + (outer >> 32 & _WORD) + (carried >> 32)


def _high(a: Tensor, b: Tensor) -> Tensor:
    """The high word of a product of two words."""
    return (a * b) >> 32 & _WORD
