"""The reference of the indexer's scores and choice, on the same buffers.

How far scores may be from the reference's: a product of E2M1 values and their scales is exact, a
dot product is a chain of 8 MMAs that may each drop two units of the running sum's last place, its
product with a weight and the sum over 64 heads round up to 12 times (8 sums in a lane, 3 over
lanes, the product): |error| <= 2^-23 Σ_h |w_h| (2·8 Σ_d |q_d k_d| + 12/2 relu). Where an element of
the query may round to another E2M1 value (see `ranges`), the difference times the key is added.
Where sums fit in 24 bits, scores are exact, hence the choice as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.numeric.codecs import e2m1_decode, e8m0_decode, unpack_nibbles
from dsv4.kernels.core import error_intervals
from dsv4.kernels.core.contract import Buffers, Expected
from dsv4.kernels.core.error_intervals import Range
from dsv4.kernels.reference.indexer import top_blocks

BLOCK = 32  # channels per scale


def weight_scale(config: ModelConfig) -> float:
    """What the heads' weights are multiplied by."""
    return float(config.index_head_dim**-0.5 * config.index_n_heads**-0.5)


def queries(config: ModelConfig, buffers: Buffers) -> tuple[Tensor, Tensor]:
    """E2M1 heads times their scales, float64 `[T, h, 128]`, and how far they may be off."""
    position = buffers["position"].to(torch.int64).clamp(min=0)
    heads = buffers["q"].view(-1, config.index_n_heads, config.index_head_dim)
    turned = error_intervals.rotated(
        Range.exactly(heads), buffers["cos"][position], buffers["sin"][position]
    ).to(torch.bfloat16)
    codes, scales = error_intervals.fp4_row(error_intervals.spread(turned))
    ends = [key_values(code, scale) for code in codes for scale in scales]
    whole = Range.hull(*ends)
    return key_values(codes.low, scales.low), whole.high - whole.low


def key_values(codes: Tensor, scales: Tensor) -> Tensor:
    """Heads or keys as they are stored, E2M1 bytes and E8M0 bytes, -> float64."""
    values = e2m1_decode(unpack_nibbles(codes.to(torch.uint8))).to(torch.float64)
    powers = e8m0_decode(scales.to(torch.uint8)).to(torch.float64)
    return values * powers.repeat_interleave(BLOCK, -1)


def expect(config: ModelConfig, buffers: Buffers) -> dict[str, Expected]:
    """Scores with their bounds, and the chosen blocks where the scores are exact."""
    q, off = queries(config, buffers)
    weights = (buffers["weights"].to(torch.bfloat16) * weight_scale(config)).to(torch.float64)
    visible = (buffers["position"].to(torch.int64) + 1) // config.csa_ratio
    scores, bound = buffers["scores"].to(torch.float64), torch.zeros_like(buffers["scores"])
    bound = bound.to(torch.float64)
    exact = True
    for row in range(q.shape[0]):
        seen = int(visible[row])
        if seen <= config.index_topk:
            continue
        cache = int(buffers["slot"][row])
        for first in range(0, seen, 1 << 14):
            part = slice(first, min(first + (1 << 14), seen))
            keys = key_values(buffers["keys"][cache, part], buffers["key_scales"][cache, part])
            score, error, certain = _scores(q[row], off[row], weights[row], keys)
            scores[row, part], bound[row, part] = score, error
            exact = exact and certain
    found = {"scores": Expected(scores, bound)}
    if exact:
        found["blocks"] = chosen(config, scores.to(torch.float32), buffers["position"])
    return found


def chosen(config: ModelConfig, scores: Tensor, position: Tensor) -> Expected:
    """The best visible blocks: ascending, then -1."""
    visible = (position.to(torch.int64) + 1) // config.csa_ratio
    return Expected(_ascending(top_blocks(scores, visible, config.index_topk), config.index_topk))


def _scores(q: Tensor, off: Tensor, weights: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Of one row and some keys: values, bounds, and whether float32 makes no error at all."""
    dots, sizes = q @ keys.T, q.abs() @ keys.abs().T
    hits = dots.clamp(min=0)
    size = weights.abs()[:, None]
    scores = (weights[:, None] * hits).sum(0)
    units = _unit(q).amin() * _unit(keys).amin() * _unit(weights).amin()
    largest = (size * sizes).sum(0).amax()
    certain = bool(largest < units * 2.0**24) and not bool(off.any())
    error = 2.0**-23 * (size * (16 * sizes + 6 * hits)).sum(0)
    error += (size * (off @ keys.abs().T)).sum(0)
    return scores, torch.zeros_like(error) if certain else error, certain


def _unit(values: Tensor) -> Tensor:
    """The power of two that each value is an odd multiple of; infinite for 0."""
    mantissa, exponent = torch.frexp(values)
    whole = (mantissa * 2.0**53).to(torch.int64)
    trailing = (whole & -whole).to(torch.float64)
    unit = torch.ldexp(trailing, exponent.to(torch.float64) - 53)
    return unit.masked_fill(values == 0, float("inf"))


def _ascending(best: Tensor, topk: int) -> Tensor:
    """int32 `[T, topk]`: ascending, then -1."""
    padded = torch.full((best.shape[0], topk), -1, device=best.device)
    padded[:, : best.shape[1]] = best
    last = padded.masked_fill(padded < 0, 1 << 40).sort(-1).values
    return last.masked_fill(last == 1 << 40, -1).to(torch.int32)
