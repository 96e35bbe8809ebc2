"""Inversion with the source: undo every transform from the emitted bytes and compare.

Exact tensors must give the source's bytes (plain, FP8, NVFP4) or values, sign of zero included
(MXFP4 carried into NVFP4). Rounded tensors must be no worse than the optimum of the format,
recomputed here from the source, and their recorded loss must be the measured one. What was left
behind as a copy must be one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dsv4.convert.read import read_fp8, read_mxfp4, read_nvfp4, read_values
from dsv4.convert.source import Source
from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.config import ModelConfig
from dsv4.formats.layouts import unpack_fp8
from dsv4.formats.metrics import Loss
from dsv4.formats.mxfp4 import cast_mxfp4_to_nvfp4
from dsv4.formats.nvfp4 import NVFP4Tensor, dequantize_nvfp4, quantize_nvfp4
from dsv4.formats.source_inventory import check_inventory
from dsv4.formats.source_tensor import Encoding, SourceTensor
from dsv4.validate.claims import check_claims, check_loss, check_origin, check_stack_loss
from dsv4.validate.provenance import quantized_groups
from dsv4.validate.report import Report, TensorVerdict

TILE_ROWS = 4096
OPTIMUM_SLACK = 1e-6  # float64 sums over tiles of different sizes; not a quality margin


def invert(packed: PackedCheckpoint, source: Source, report: Report) -> None:
    """Compare every tensor of `source` with what `packed` holds; findings go into `report`."""
    config = ModelConfig.from_hf(source.config)
    if config != packed.config:
        report.add("config", "manifest", "the model config is not the source's")
    inventory = check_inventory(source.entries, config)
    tensors = inventory.by_name
    names = set(packed.names())
    for name in sorted(tensors.keys() - names):
        report.add("inventory", name, "in the source, but not in the store: convert again")
    for name in sorted(names - tensors.keys()):
        report.add("inventory", name, "in the store, but not in the source: the wrong source?")
    worst: dict[str, float] = {}
    for name, tensor in tensors.items():
        if name in names:
            verdict = _compare(packed, source, tensor, report, worst)
            report.tensors.append(verdict)
    for group in quantized_groups(packed.store):
        if group.experts and group.path in worst:
            check_stack_loss(group, worst[group.path], report)
    report.count("tensors compared with the source", len(report.tensors))
    for copy, original in inventory.copies:
        report.count("draft copies compared with what they copy")
        if not _equal(source, copy, tensors[original]):
            report.add("inversion", copy.name, f"was left behind, but differs from {original}")
    check_claims(packed, source, report)


def _equal(source: Source, copy: SourceTensor, original: SourceTensor) -> bool:
    """Whether two unquantised tensors have the same values, whatever their dtypes."""
    return all(
        torch.equal(part.float(), source.read_rows(original.weight, start, stop).float())
        for start, stop, part in _rows(source, copy)
    )


def _compare(
    packed: PackedCheckpoint,
    source: Source,
    tensor: SourceTensor,
    report: Report,
    worst: dict[str, float],
) -> TensorVerdict:
    """worst: path of a node -> the largest relative MSE of its tensors so far; grows."""
    begin = time.perf_counter()
    name = tensor.name
    kind = packed.format_of(name)
    provenance = packed.provenance(name)
    claimed_exact = bool(provenance["exact"])
    check_origin(tensor, provenance, report)
    same = _same_bytes(packed, source, tensor) if kind == tensor.encoding else None
    if same is None:
        loss, optimum = _loss(packed, source, tensor, provenance, report)
        exact = loss.errors == 0.0 and not loss.sign_flips
        losses = None if exact else loss.to_dict()
        rel_mse = loss.rel_mse
    else:
        exact, losses, optimum, rel_mse = same, None, None, 0.0
    path = str(provenance["path"])
    worst[path] = max(worst.get(path, 0.0), rel_mse)
    # What kept its own format was never rounded, whatever the store claims.
    if not exact and (claimed_exact or same is not None):
        report.add(
            "inversion",
            name,
            "carried as it was, but the emitted bytes do not invert to the source's; "
            "convert the source again",
        )
    elif exact and not claimed_exact:
        report.add("loss", name, "equals the source, but is said to be rounded")
    return TensorVerdict(name, kind, exact, losses, optimum, time.perf_counter() - begin)


def _same_bytes(packed: PackedCheckpoint, source: Source, tensor: SourceTensor) -> bool:
    """Whether a tensor carried in its own format has the source's very bytes."""
    stored = packed.stored(tensor.name)
    if isinstance(stored, NVFP4Tensor):
        expected = read_nvfp4(source, tensor)
        return all(
            torch.equal(_bytes(found), _bytes(part))
            for found, part in (
                (stored.codes, expected.codes),
                (stored.scales, expected.scales),
                (stored.global_scale, expected.global_scale),
            )
        )
    if isinstance(stored, Tensor):
        if str(stored.dtype) != str(source.read_rows(tensor.weight, 0, 0).dtype):
            return False
        return tuple(stored.shape) == tensor.shape and all(
            torch.equal(_bytes(part), _bytes(stored[start:stop] if stored.dim() else stored))
            for start, stop, part in _rows(source, tensor)
        )
    pairs = zip(unpack_fp8(stored), read_fp8(source, tensor), strict=True)
    return all(
        found.dtype == part.dtype and torch.equal(_bytes(found), _bytes(part))
        for found, part in pairs
    )


def _rows(source: Source, tensor: SourceTensor) -> Iterator[tuple[int, int, Tensor]]:
    if not tensor.shape:
        yield 0, 0, source.read(tensor.weight)
        return
    for start in range(0, tensor.shape[0], TILE_ROWS):
        stop = min(start + TILE_ROWS, tensor.shape[0])
        yield start, stop, source.read_rows(tensor.weight, start, stop)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _loss(
    packed: PackedCheckpoint,
    source: Source,
    tensor: SourceTensor,
    provenance: Mapping[str, Any],
    report: Report,
) -> tuple[Loss, float | None]:
    """-> (the measured loss, the optimum's relative MSE where the tensor is rounded)."""
    original = read_values(source, tensor)
    emitted = packed.dequantize(tensor.name)
    loss = Loss()
    if emitted.shape != original.shape:
        report.add(
            "inversion",
            tensor.name,
            f"inverts to shape {tuple(emitted.shape)}, expected {tuple(original.shape)}",
        )
        loss.add(original, torch.zeros_like(original))
        return loss, None
    loss.add(original, emitted)
    check_loss(tensor, provenance, loss, report)
    if not loss.errors > 0.0:
        return loss, None
    optimum = Loss()
    optimum.add(original, _optimum(source, tensor, original))
    report.count("rounded tensors held against the optimum")
    if loss.errors > optimum.errors * (1 + OPTIMUM_SLACK):
        report.add(
            "optimum",
            tensor.name,
            f"relative MSE {loss.rel_mse:.3e} is above {optimum.rel_mse:.3e}, which the format "
            "allows; convert again",
        )
    return loss, optimum.rel_mse


def _optimum(source: Source, tensor: SourceTensor, original: Tensor) -> Tensor:
    """The best the packed format can do for this tensor, recomputed from the source."""
    if tensor.encoding is Encoding.MXFP4:
        cast, _ = cast_mxfp4_to_nvfp4(*read_mxfp4(source, tensor), name=tensor.name)
        return dequantize_nvfp4(cast)
    return dequantize_nvfp4(quantize_nvfp4(original, name=tensor.name))
