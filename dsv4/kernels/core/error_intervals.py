"""What a value may be when float32 sums stand before a rounding: the reference of cache rows.

A rounding hides an error or doubles it, depending on how near the value is to a boundary. So the
reference carries a range, the smallest and the largest value that float32 arithmetic may have made
of the exact inputs, through every step: each step here is monotonous, a range's ends are rounded as
a value is, and where both ends round alike the bytes are certain. Steps whose float32 operations
are the reference's own, one by one (products, RoPE), add nothing to a range.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.formats.numeric.codecs import E2M1_MAX, E4M3_MAX, e2m1_encode, e4m3_encode
from dsv4.kernels.core.contract import Expected
from dsv4.kernels.reference.indexer import hadamard
from dsv4.kernels.reference.quant_sim import INDEXER_BLOCK, KV_BLOCK, power_of_two_scale

ROOT_ERROR = 2.0**-40  # of `x^-0.5` before it is rounded, relative
UNIT = 2.0**-24  # half a unit of float32's last place, relative
HADAMARD_OPERATIONS = 10  # stages of sums (an MMA of 16 counts as four), scaling, and one to spare
SMALLEST_KV_AMAX = 1e-4
SMALLEST_INDEXER_AMAX = 6.0 * 2.0**-126


class Range(NamedTuple):
    """The ends, tensors of one shape."""

    low: Tensor
    high: Tensor

    @classmethod
    def exactly(cls, value: Tensor) -> Range:
        """Both ends alike."""
        return cls(value, value)

    @classmethod
    def hull(cls, *values: Tensor) -> Range:
        """Of values of which each may be the one."""
        stacked = torch.stack(values)
        return cls(stacked.amin(0), stacked.amax(0))

    def to(self, dtype: torch.dtype) -> Range:
        """Rounded."""
        return Range(self.low.to(dtype), self.high.to(dtype))

    def part(self, start: int, stop: int | None = None) -> Range:
        """Columns."""
        return Range(self.low[..., start:stop], self.high[..., start:stop])

    def magnitude(self) -> Range:
        """Of the absolute value."""
        low, high = self.low.abs(), self.high.abs()
        crosses = (self.low < 0) & (self.high > 0)
        return Range(torch.minimum(low, high).masked_fill(crosses, 0), torch.maximum(low, high))


def inverse_root_mean(x: Range, eps: float) -> Range:
    """`rsqrt(mean(x²) + eps)` as float32 `[..., 1]`: FP64 sums, a root that may be off a little."""
    squares = x.magnitude().to(torch.float64)
    mean = Range(*(end.square().mean(-1, keepdim=True) + eps for end in squares))
    return Range(
        (mean.high.rsqrt() * (1 - ROOT_ERROR)).to(torch.float32),
        (mean.low.rsqrt() * (1 + ROOT_ERROR)).to(torch.float32),
    )


def normed(x: Range, weight: Tensor | None, eps: float) -> Range:
    """`weight · (x · rsqrt(mean(x²) + eps))`, float32 products, rounded to bfloat16."""
    inverse = inverse_root_mean(x, eps)
    x = x.to(torch.float32)
    scaled = Range.hull(*(a * b for a in x for b in inverse))
    if weight is not None:
        scaled = Range.hull(weight * scaled.low, weight * scaled.high)
    return scaled.to(torch.bfloat16)


def rotated(x: Range, cos: Tensor, sin: Tensor) -> Range:
    """RoPE on the last dimensions of `[T, ..., D]`, rounded to bfloat16; the others as they are."""
    width = 2 * cos.shape[-1]
    while cos.dim() < x.low.dim():
        cos, sin = cos[:, None], sin[:, None]
    wide = x.part(-width).to(torch.float32)
    even, odd = (Range(wide.low[..., i::2], wide.high[..., i::2]) for i in range(2))

    def times(a: Range, b: Tensor) -> Range:
        return Range.hull(a.low * b, a.high * b)

    ec, es, oc, osin = times(even, cos), times(even, sin), times(odd, cos), times(odd, sin)
    ends = []
    for first, other in ((0, 1), (1, 0)):
        pair = torch.stack((ec[first] - osin[other], es[first] + oc[first]), -1).flatten(-2)
        ends.append(torch.cat((x[first][..., :-width], pair.to(torch.bfloat16)), -1))
    return Range(*ends)


def spread(x: Range) -> Range:
    """Hadamard transform of bfloat16 vectors, rounded to bfloat16.

    Where all sums of a vector fit in float32's 24 bits they are exact, and only the scaling may
    differ from the reference's.
    """
    low, high = x.low.to(torch.float64), x.high.to(torch.float64)
    center, radius = (low + high) / 2, (high - low) / 2
    sizes = torch.maximum(low.abs(), high.abs())
    scale = x.low.shape[-1] ** -0.5
    exact = hadamard(center)
    bits = torch.where(sizes > 0, torch.frexp(sizes).exponent - 8, 1 << 12)  # of the last place
    unit = torch.ldexp(torch.ones_like(sizes[..., :1]), bits.amin(-1, keepdim=True).clamp(max=0))
    whole = sizes.sum(-1, keepdim=True)
    certain = (whole / unit < 2.0**24) & (radius.sum(-1, keepdim=True) == 0)
    error = radius.sum(-1, keepdim=True) * scale + HADAMARD_OPERATIONS * UNIT * whole * scale
    error = error.masked_fill(certain, 0.0)
    sums, factor = (exact / scale).to(torch.float32), torch.tensor(scale, dtype=torch.float32)
    own = sums * factor.to(exact.device)
    return Range.hull(exact - error, exact + error, own.to(torch.float64)).to(torch.bfloat16)


class Codes(NamedTuple):
    """Bytes of codes and of their scales, each as the range they may be in."""

    codes: Range
    scales: Range


def _exponents(x: Range, block: int, smallest: float, largest: float) -> Range:
    amax = x.magnitude().to(torch.float32)
    blocks = Range(
        *(torch.unflatten(end, -1, (-1, block)).amax(-1).clamp(min=smallest) for end in amax)
    )
    return Range(*(power_of_two_scale(end, largest).view(torch.int32) >> 23 for end in blocks))


def _scaled(x: Range, exponents: Range, block: int) -> list[Tensor]:
    """The ends over the ends of their scales."""
    scales = [(end << 23).view(torch.float32).repeat_interleave(block, -1) for end in exponents]
    return [end.to(torch.float32) / scale for end in x for scale in scales]


def fp8_row(x: Range) -> Codes:
    """E4M3 bytes `[..., D]` and E8M0 bytes `[..., D / 64]` of bfloat16 vectors."""
    exponents = _exponents(x, KV_BLOCK, SMALLEST_KV_AMAX, E4M3_MAX)
    bytes_ = [e4m3_encode(end).to(torch.int32) for end in _scaled(x, exponents, KV_BLOCK)]
    return Codes(Range.hull(*bytes_), exponents)


def fp4_row(x: Range) -> Codes:
    """E2M1 bytes `[..., D / 2]`, even columns low, and E8M0 bytes `[..., D / 32]`."""
    exponents = _exponents(x, INDEXER_BLOCK, SMALLEST_INDEXER_AMAX, E2M1_MAX)
    codes = Range.hull(
        *(e2m1_encode(end).to(torch.int32) for end in _scaled(x, exponents, INDEXER_BLOCK))
    )
    packed = Range(*(end[..., 0::2] + 16 * end[..., 1::2] for end in codes))
    return Codes(packed, exponents)


def bf16_bytes(x: Range) -> Range:
    """The bytes of bfloat16 values, as ranges of each byte."""
    return Range.hull(*(end.contiguous().view(torch.uint8).to(torch.int32) for end in x))


def expected(x: Range) -> Expected:
    """Anything in the range."""
    low, high = x.low.to(torch.float64), x.high.to(torch.float64)
    return Expected((low + high) / 2, (high - low) / 2)
