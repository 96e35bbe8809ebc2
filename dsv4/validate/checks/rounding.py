"""What rounding cost, judged from the emitted bytes and the source.

Three limits, from the weakest to the strongest. Every element: its code is the nearest one, so it
is at most half a step of its block away. Every tensor: the loss is the one that was recorded. Every
tensor, or a sample of a large one's tiles: no block scales would have lost less.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv4.convert.outputs.decode import read_mxfp4, read_nvfp4, read_value_rows
from dsv4.convert.sources.base import Source
from dsv4.formats.checkpoint import PackedCheckpoint, Stored, values_of
from dsv4.formats.model.source_tensor import Encoding, SourceTensor
from dsv4.formats.numeric.codecs import E2M1_MAX, dequantize_mxfp4, e4m3_decode
from dsv4.formats.numeric.loss import Loss
from dsv4.formats.numeric.mxfp4 import cast_mxfp4_to_nvfp4
from dsv4.formats.numeric.nvfp4 import (
    NVFP4Tensor,
    dequantize_nvfp4,
    global_scale_for,
    quantize_nvfp4,
)
from dsv4.formats.numeric.operands import NVFP4_BLOCK
from dsv4.validate.checks.manifest_claims import check_blocks, check_loss
from dsv4.validate.report import Report, TensorVerdict

Optimum = Literal["full", "sample"]
Span = tuple[int, int]

OPTIMUM_SLACK = 1e-6  # float64 sums over tiles of different sizes; not a quality margin
BOUND_SLACK = 1e-5  # of float32 arithmetic
LARGE = 1 << 24  # elements from which on a sample is rounded again
SAMPLED_TILES = 12


class SourceValues:
    """The values of a tensor of the source, rows at a time."""

    def __init__(self, source: Source, tensor: SourceTensor) -> None:
        self.source = source
        self.tensor = tensor

    def rows(self, start: int, stop: int) -> Tensor:
        """Float32 `[stop - start, K]`; `start` is a multiple of 128. Raises SourceError."""
        tensor = self.tensor
        match tensor.encoding:
            case Encoding.MXFP4:
                assert tensor.scale is not None
                parts = (
                    self.source.read_rows(entry, start, stop).view(torch.uint8)
                    for entry in (tensor.weight, tensor.scale)
                )
                return dequantize_mxfp4(*parts)
            case Encoding.NVFP4:
                return self._nvfp4[start:stop]
            case _:
                return read_value_rows(self.source, tensor, start, stop)

    @functools.cached_property
    def _nvfp4(self) -> Tensor:
        return dequantize_nvfp4(read_nvfp4(self.source, self.tensor))

    @functools.cached_property
    def _cast(self) -> Tensor:
        cast, _ = cast_mxfp4_to_nvfp4(*read_mxfp4(self.source, self.tensor), name=self.tensor.name)
        return dequantize_nvfp4(cast)

    def optimum(self, start: int, stop: int, amax: float) -> Tensor:
        """The best that NVFP4 can do for these rows of a matrix whose largest magnitude is `amax`.

        Float32 `[stop - start, K]`, recomputed from the source.
        """
        if self.tensor.encoding is Encoding.MXFP4:
            return self._cast[start:stop]
        g = global_scale_for(amax)
        values = self.rows(start, stop)
        return dequantize_nvfp4(quantize_nvfp4(values, global_scale=g, name=self.tensor.name))


def stored_tiles(
    packed: PackedCheckpoint, name: str, spans: Sequence[Span]
) -> Iterator[tuple[Span, Stored]]:
    """-> (rows, what is stored of them), tile by tile; mappings are dropped behind."""
    for span in spans:
        yield span, packed.stored_rows(name, *span)
        packed.store.forget()


def judge_rounding(
    packed: PackedCheckpoint,
    source: Source,
    tensor: SourceTensor,
    spans: Sequence[Span],
    verdict: TensorVerdict,
    facts: Mapping[str, Any],
    optimum: Optimum,
    report: Report,
) -> TensorVerdict:
    """`verdict` with loss, largest error and optimum of a tensor whose format was changed.

    facts: what the store says of the tensor. Findings go into `report`.
    """
    name, values = tensor.name, SourceValues(source, tensor)
    loss, worst, blocks, nearest = Loss(), 0.0, 0, True
    if not verdict.exact:
        for span, stored in stored_tiles(packed, name, spans):
            original, emitted = values.rows(*span), values_of(stored)
            loss.add(original, emitted)
            if isinstance(stored, NVFP4Tensor):
                worst = max(worst, largest_error(original, emitted, stored))
                blocks += differing_blocks(original, emitted)
            elif isinstance(stored, Tensor):
                nearest &= torch.equal(stored, original.to(stored.dtype))
        check_blocks(tensor, facts, blocks, report)
    check_loss(tensor, facts, loss, report)
    if verdict.exact:
        return verdict
    if verdict.format == "plain":
        report.count("dequantised tensors held against the nearest values")
        if not nearest:
            report.add("bound", name, "a value is not the nearest to the source's; convert again")
        return dataclasses.replace(verdict, loss=loss.to_dict())
    report.count("rounded tensors held against the bound of each block")
    if not worst <= 1.0 + BOUND_SLACK:
        report.add(
            "bound",
            name,
            f"an element is {worst:.3g} times as far from its weight as half a step of its block "
            "allows; convert again",
        )
    verdict = dataclasses.replace(
        verdict, loss=loss.to_dict(), max_error=worst, rounded_blocks=blocks
    )
    if verdict.format != "nvfp4" or not loss.errors > 0.0:
        return verdict
    return _judge_optimum(packed, values, _sample(name, spans, tensor, optimum), verdict, report)


def _judge_optimum(
    packed: PackedCheckpoint,
    values: SourceValues,
    spans: Sequence[Span],
    verdict: TensorVerdict,
    report: Report,
) -> TensorVerdict:
    """Round the rows in `spans` again, and hold the emitted ones against that."""
    assert verdict.loss is not None
    name, amax, rel_mse = verdict.name, verdict.loss["amax"] or 0.0, verdict.loss["rel_mse"] or 0.0
    found, best = Loss(), Loss()
    for span, stored in stored_tiles(packed, name, spans):
        original = values.rows(*span)
        found.add(original, values_of(stored))
        best.add(original, values.optimum(*span, amax))
    rows = sum(stop - start for start, stop in spans)
    report.count("rounded tensors held against the optimum")
    if found.errors > best.errors * (1 + OPTIMUM_SLACK):
        report.add(
            "optimum",
            name,
            f"relative MSE {found.rel_mse:.3e} is above {best.rel_mse:.3e}, which the format "
            "allows; convert again",
        )
    share = rows / values.tensor.shape[0]
    allowed = rel_mse * (best.errors / found.errors) if found.errors else rel_mse
    return dataclasses.replace(verdict, optimum=allowed, optimum_share=share)


def _sample(
    name: str, spans: Sequence[Span], tensor: SourceTensor, optimum: Optimum
) -> Sequence[Span]:
    """The tiles to round again: all, or of a large tensor some that its name decides."""
    large = math.prod(tensor.shape) >= LARGE and len(spans) > SAMPLED_TILES
    if optimum == "full" or not large or tensor.encoding is Encoding.MXFP4:
        return spans
    return sorted(random.Random(name).sample(list(spans), SAMPLED_TILES))


def largest_error(original: Tensor, emitted: Tensor, stored: NVFP4Tensor) -> float:
    """The largest error of an element of `[N, K]`, as a multiple of what its block allows.

    With u = block scale * global scale, the nearest code is at most u/4 away up to 2u, u/2 up to
    4u, and u up to 6u, the largest value. What lies above is clipped; a best block does so by no
    more than 4 u', where u' is the smallest unit that clips nothing: with that, all sixteen squared
    errors together are at most 16 u'^2. u' is at most amax / 6 * 9 / 8 + 2^-9 global scales, since
    neighbouring E4M3 numbers are an eighth, or 2^-9, apart.
    """
    w = _blocks(original)
    g = float(stored.global_scale)
    u = e4m3_decode(stored.scales).mul_(g).view(*w.shape[:-1], 1)
    magnitude = w.abs()
    error = w.sub_(_blocks(emitted)).abs_()
    reference = magnitude.amax(dim=-1, keepdim=True) * (9 / 8 / E2M1_MAX) + g * 2.0**-9
    step = torch.where(magnitude <= 2 * u, 0.25, torch.where(magnitude <= 4 * u, 0.5, 1.0)) * u
    bound = torch.maximum(step, torch.minimum(magnitude - E2M1_MAX * u, 4 * reference))
    ratio = torch.where(error > 0, error / bound, error)
    return float(ratio.amax()) if ratio.numel() else 0.0


def differing_blocks(original: Tensor, emitted: Tensor) -> int:
    """Blocks of 16 columns of `[N, K]` in which a value differs, be it the sign of a zero."""
    other = _blocks(original).view(torch.int32) != _blocks(emitted).view(torch.int32)
    return int(other.any(dim=-1).sum())


def _blocks(values: Tensor) -> Tensor:
    """`[N, K]` -> a copy `[N, ceil(K / 16), 16]`, zero-padded."""
    padded = pad(values, (0, -values.shape[1] % NVFP4_BLOCK))
    return padded.view(values.shape[0], -1, NVFP4_BLOCK).clone()
