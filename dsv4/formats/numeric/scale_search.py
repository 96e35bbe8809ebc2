"""The E4M3 scale of least squared error for each block of 16, and its codes.

Blocks come divided by the global scale. Given a scale, rounding each value to the nearest code is
optimal, so the search is over scale bytes. Let b0 = RNE(max|block| / 6) and v(b) a byte's value.
The result is the optimum over all 126 bytes, by three arguments:

* Upwards, v(b - 8) = v(b)/2 for b >= 16. The grid of v(b)/2 holds that of v(b) as far as 3 v(b),
  and nothing rounds beyond when max|block| <= 3.5 v(b). So any b >= max(b0 + 8, 16) loses to
  b - 8, value by value: bytes above b0 + 7 matter only for b0 < 8, and then up to 15.
* Downwards, bytes under b0 - 3 saturate so much that some byte of the window loses less
  (ScaleSweep, arXiv 2606.07618; tests/formats/test_scale_search.py proves it in exact rationals).
  With an importance per value no fixed offset will do: there a block is searched on as long as
  sum(importance * max(0, |z| - 6 v(b))^2), a bound that grows as b falls, is under its best error.
* In between every byte is tried.

Errors that agree to 19 bits count as equal. Of equals normal scales (bytes >= 0x08) come first,
then the smallest |b - b0|, then the lower byte.

Values lie lane-major, `[16, B]`, so that a block's scale is broadcast along contiguous memory.
Only element-wise IEEE operations are used, in a fixed order: every machine and thread count finds
the same bytes.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dsv4.formats.numeric.codecs import (
    E2M1_MAX,
    FP32_EXPONENT,
    ROUND_TO_HALF_OCTAVE,
    e2m1_codes_of,
    e4m3_encode,
)
from dsv4.formats.numeric.operands import NVFP4_BLOCK

ONE_BYTE = 0x38  # E4M3 1.0, the scale of blocks whose codes are all zero
ROUNDS_TO_ZERO = 2.0**-11  # half a code of the smallest scale

_FIRST_NORMAL = 0x08
_LAST_BYTE = 0x7E
_WINDOW = (0, -1, 1, -2, 2, -3, 3, 4, 5, 6, 7)
_RANK_BITS = 15  # the last bits of an error, given up to hold a place in _WINDOW
_PLAIN_START = _FIRST_NORMAL + 3  # from here on the window holds normal scales only
_LOW_NORMALS = (0, -1, 1, -2, 2, *range(3, 15))
_SUBNORMALS = (0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6, -7, -8, -9)

_NORMAL_TO_FP32 = (127 - 7) << 23  # added to an E4M3 byte shifted to its place


class BlockEncoder:
    """Encodes tiles of up to `blocks` blocks; owns the scratch memory this takes."""

    def __init__(self, blocks: int, device: torch.device | str = "cpu") -> None:
        self._memory = torch.empty(3, blocks * NVFP4_BLOCK, device=device)
        self._scratch = _Scratch.of(self._memory, blocks)

    def encode(self, lanes: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Float32 values `[16, B]` with max / 6 <= 256 -> (code bytes `[B, 8]`, scales `[B]`).

        `weights` `[16, B]` is the importance of each value, none of them negative.
        """
        byte = self._search(lanes.abs(), weights)
        codes = e2m1_codes_of(torch.div(lanes, _scale(byte), out=self._scratch_for(byte).y))
        pairs = torch.add(codes[0::2], codes[1::2], alpha=1 << 4)
        quads = torch.add(pairs[0::2], pairs[1::2], alpha=1 << 8)
        words = quads[0::2] | (quads[1::2] << 16)
        return words.t().contiguous().view(torch.uint8), byte.to(torch.uint8)

    def _search(self, magnitude: Tensor, weights: Tensor | None) -> Tensor:
        """The best scale byte, int32 `[B]`, of each block of magnitudes `[16, B]`."""
        counted = magnitude if weights is None else magnitude * (weights > 0)
        amax = counted.amax(dim=0)
        start = e4m3_encode(amax / E2M1_MAX).clamp_(1).to(torch.int32)
        best, best_byte = self._search_window(magnitude, weights, start.clamp(_PLAIN_START))
        low = (start < _PLAIN_START).nonzero().flatten()
        if low.numel():
            lanes = magnitude.index_select(1, low)
            lane_weights = None if weights is None else weights.index_select(1, low)
            best_byte[low] = self._search_low(lanes, lane_weights, start[low])
            best[low] = 0.0  # all bytes were tried
        if weights is not None:
            self._search_down(magnitude, weights, start, best, best_byte)
        return best_byte.masked_fill_(amax <= ROUNDS_TO_ZERO, ONE_BYTE)

    def _search_window(
        self, magnitude: Tensor, weights: Tensor | None, start: Tensor
    ) -> tuple[Tensor, Tensor]:
        """-> (least error, its byte) over the window around `start` >= 11."""
        scratch = self._scratch_for(start)
        offsets = torch.tensor(_WINDOW, dtype=torch.int32, device=start.device)
        bytes_ = (start + offsets.unsqueeze(1)).clamp_(max=_LAST_BYTE)
        scales = (bytes_ << 20).add_(_NORMAL_TO_FP32).view(torch.float32)
        errors = torch.empty_like(scales)
        for offset, scale, error in zip(_WINDOW, scales, errors, strict=True):
            _error(scratch, magnitude, weights, scale, saturates=offset < 0, out=error)
        keys = _comparable(errors.mul_(scales.square_())).view(torch.int32)
        ranks = torch.arange(len(_WINDOW), dtype=torch.int32, device=start.device)
        key = keys.add_(ranks.unsqueeze(1)).amin(dim=0)
        best_byte = offsets[key & _RANK_BITS].add_(start).clamp_(max=_LAST_BYTE)
        return _comparable(key.view(torch.float32)), best_byte

    def _search_low(self, magnitude: Tensor, weights: Tensor | None, start: Tensor) -> Tensor:
        """The best byte of blocks that start below 11: all candidates, normal scales first."""
        scratch = self._scratch_for(start)
        best = torch.full_like(magnitude[0], torch.inf)
        best_byte = start.clone()
        passes = ((_LOW_NORMALS, _FIRST_NORMAL, _LAST_BYTE), (_SUBNORMALS, 1, _FIRST_NORMAL - 1))
        for offsets, low, high in passes:
            for offset in offsets:
                byte = (start + offset).clamp_(low, high)
                _try(scratch, magnitude, weights, byte, best, best_byte)
        return best_byte

    def _search_down(
        self, magnitude: Tensor, weights: Tensor, start: Tensor, best: Tensor, best_byte: Tensor
    ) -> None:
        """Lower `best_byte` in place where bytes below the window have less weighted error."""
        index = torch.arange(start.numel(), device=start.device)
        for offset in range(-4, -_LAST_BYTE, -1):
            byte = start + offset
            limit = _scale(byte.clamp(min=1)).mul_(E2M1_MAX)
            lost = _sum_lanes((magnitude - limit).clamp_(min=0.0).square_().mul_(weights))
            kept = ((lost < best[index]) & (byte >= 1)).nonzero().flatten()
            if not kept.numel():
                return
            index, start, byte = index[kept], start[kept], byte[kept]
            magnitude = magnitude.index_select(1, kept)
            weights = weights.index_select(1, kept)
            part, part_byte = best[index], best_byte[index]
            _try(self._scratch_for(kept), magnitude, weights, byte, part, part_byte)
            best[index], best_byte[index] = part, part_byte

    def _scratch_for(self, per_block: Tensor) -> _Scratch:
        blocks = per_block.numel()
        if blocks != self._scratch.y.shape[1]:
            return _Scratch.of(self._memory, blocks)
        return self._scratch


@dataclasses.dataclass(frozen=True)
class _Scratch:
    """Three `[16, B]` work areas and their views, made once: a view costs as much as a tile row."""

    y: Tensor
    y_bits: Tensor
    power: Tensor
    power_bits: Tensor
    q: Tensor
    halves: tuple[tuple[Tensor, Tensor], ...]
    exponent_mask: Tensor

    @classmethod
    def of(cls, memory: Tensor, blocks: int) -> _Scratch:
        y, power, q = (part[: NVFP4_BLOCK * blocks].view(NVFP4_BLOCK, -1) for part in memory)
        return cls(
            y=y,
            y_bits=y.view(torch.int32),
            power=power,
            power_bits=power.view(torch.int32),
            q=q,
            halves=(*((q[:n], q[n : 2 * n]) for n in (8, 4, 2)), (q[0], q[1])),
            exponent_mask=torch.tensor(FP32_EXPONENT, dtype=torch.int32, device=memory.device),
        )


def _try(
    scratch: _Scratch,
    magnitude: Tensor,
    weights: Tensor | None,
    byte: Tensor,
    best: Tensor,
    best_byte: Tensor,
) -> None:
    """Put `byte` `[B]` and its error in place of the best where the error is less."""
    scale = _scale(byte)
    error = torch.empty_like(scale)
    _error(scratch, magnitude, weights, scale, saturates=True, out=error)
    error = _comparable(error.mul_(scale.square_()))
    torch.where(error < best, byte, best_byte, out=best_byte)
    torch.minimum(error, best, out=best)


def _error(
    scratch: _Scratch,
    magnitude: Tensor,
    weights: Tensor | None,
    scale: Tensor,
    *,
    saturates: bool,
    out: Tensor,
) -> None:
    """Squared rounding error of `magnitude / scale`, summed over the lanes, into `out` `[B]`.

    The step of the E2M1 grid is half the value's power of two, but never below 0.5. `saturates`
    tells whether a quotient may round to more than 6.
    """
    y, power, q = scratch.y, scratch.power, scratch.q
    torch.div(magnitude, scale, out=y)
    torch.bitwise_and(scratch.y_bits, scratch.exponent_mask, out=scratch.power_bits)
    power.clamp_(min=1.0)
    torch.add(y, power, alpha=ROUND_TO_HALF_OCTAVE, out=q)
    q.sub_(power, alpha=ROUND_TO_HALF_OCTAVE)
    if saturates:
        q.clamp_(max=E2M1_MAX)
    q.sub_(y)
    q.mul_(q)
    if weights is not None:
        q.mul_(weights)
    *upper, (first, second) = scratch.halves
    for low, high in upper:
        low.add_(high)
    torch.add(first, second, out=out)


def _comparable(error: Tensor) -> Tensor:
    """Errors >= 0 with the last bits cleared, in place: equal but for noise becomes equal."""
    error.view(torch.int32).bitwise_and_(~_RANK_BITS)
    return error


def _scale(byte: Tensor) -> Tensor:
    """Float32 values of E4M3 bytes 0..0x7E given as int32; several times faster than a cast."""
    # As float16 bits a byte is its value times 2^-8, the subnormal ones included.
    return (byte << 7).to(torch.int16).view(torch.float16).to(torch.float32).mul_(256.0)


def _sum_lanes(x: Tensor) -> Tensor:
    for n in (8, 4, 2, 1):
        x = x[:n] + x[n : 2 * n]
    return x[0]
