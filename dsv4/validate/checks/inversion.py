"""Inversion with the source: undo every transform from the emitted bytes and compare.

Exact tensors must give the source's bytes (plain, FP8, NVFP4; integers widened to 64 bits) or
values, sign of zero included (MXFP4 carried into NVFP4). What becomes of rounded ones is in
`rounding`. What was left behind as a copy must be one. Tensors are compared by tiles of rows, a few
at once, so memory does not grow with the model.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Set

import torch
from torch import Tensor

from dsv4.convert.outputs.base import is_weight, tile_rows
from dsv4.convert.outputs.decode import read_nvfp4
from dsv4.convert.outputs.verbatim import widened
from dsv4.convert.sources.base import Source
from dsv4.formats.checkpoint import PackedCheckpoint, Stored, values_of
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.safetensors_header import TensorEntry
from dsv4.formats.model.source_inventory import check_inventory
from dsv4.formats.model.source_tensor import Encoding, SourceTensor
from dsv4.formats.numeric.layouts import unpack_fp8
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor
from dsv4.formats.numeric.operands import FP8_BLOCK, SF_ROWS, Fp8Matrix
from dsv4.formats.numeric.zeros import nvfp4_is_zero
from dsv4.formats.threads import one_torch_thread
from dsv4.validate.checks.content import in_parallel
from dsv4.validate.checks.manifest_claims import (
    check_admission,
    check_claims,
    check_origin,
    check_stack_loss,
)
from dsv4.validate.checks.rounding import Optimum, SourceValues, judge_rounding, stored_tiles
from dsv4.validate.checks.router_gates import compare_gates
from dsv4.validate.report import Report, TensorVerdict
from dsv4.validate.watch import Watch

TILE_BYTES = 4 << 20  # of float32; the largest thing of which a thread holds about ten
BATCH = 1024
SAMPLED = 24  # tensors that tell another checkpoint
_WRONG_BYTES = ("inversion", "bound", "optimum")


def invert(
    packed: PackedCheckpoint,
    source: Source,
    report: Report,
    *,
    workers: int = 1,
    optimum: Optimum = "sample",
    watch: Watch | None = None,
) -> None:
    """Compare every tensor of `source` with what `packed` holds; findings go into `report`.

    `packed` need not verify checksums. Raises FormatError for values no source may hold.
    """
    watch = watch or Watch()
    config = ModelConfig.from_hf(source.config)
    others = check_claims(packed, source, report)
    if config != packed.config:
        report.add("config", "manifest", "the model config is not the source's")
    inventory = check_inventory(source.entries, config)
    tensors = inventory.by_name
    names = set(packed.names())
    for name in sorted(name for name in tensors.keys() - names if not packed.store.lacks(name)):
        report.add("inventory", name, "in the source, but not in the store")
    for name in sorted(names - tensors.keys()):
        report.add("inventory", name, "in the store, but not in the source")

    def compare(tensor: SourceTensor) -> Report:
        part = Report(report.path)
        part.tensors.append(_compare(packed, source, tensor, part, optimum, others))
        packed.store.forget()
        return part

    admissions = {tensor.name: tensor for tensor in report.inexact}
    losses: dict[str, float] = {}
    common = [tensor for name, tensor in tensors.items() if name in names]
    with one_torch_thread():
        for begin in range(0, len(common), BATCH):
            batch = common[begin : begin + BATCH]
            parts = in_parallel(compare, batch, workers, watch)
            for tensor, part in zip(batch, parts, strict=True):
                report.absorb(part)
                watch.read("comparing", tensor.nbytes)
                (verdict,) = part.tensors
                losses[verdict.name] = (verdict.loss or {}).get("rel_mse") or 0.0
                check_admission(verdict, admissions.get(verdict.name), report)
        compare_gates(packed, source, tensors, report)
    zero = [verdict.name for verdict in report.tensors if verdict.zero]
    for name in sorted(set(report.zero) - set(zero)):
        report.add("loss", name, "is said to be zero throughout, but is not")
    report.zero = zero
    report.count("tensors compared with the source", len(report.tensors))
    for copy, original in inventory.copies:
        report.count("draft copies compared with what they copy")
        if not _equal(source, copy, tensors[original]):
            report.add("inversion", copy.name, f"was left behind, but differs from {original}")
    _check_stacks(packed, losses, report)


def _check_stacks(packed: PackedCheckpoint, losses: Mapping[str, float], report: Report) -> None:
    """A stack's recorded loss is that of its worst expert."""
    worst: dict[str, float] = {}
    for name, stack, *_ in packed.store.contents.expert_names():
        if name in losses:
            worst[stack.path] = max(worst.get(stack.path, 0.0), losses[name])
    for path, rel_mse in worst.items():
        check_stack_loss(packed.store.contents.stacks[path], rel_mse, report)


def is_another(packed: PackedCheckpoint, source: Source) -> bool:
    """Whether most tensors of a sample are not what `packed` was made from.

    Tells another checkpoint from the same one in other files, or with some of it damaged.
    """
    tensors = check_inventory(source.entries, ModelConfig.from_hf(source.config)).by_name
    names = [name for name in packed.names() if name in tensors]
    sample = names[:: max(len(names) // SAMPLED, 1)]
    different = 0
    for name in sample:
        part = Report(packed.store.root)
        _compare(packed, source, tensors[name], part, "sample", set(source.sizes))
        different += any(finding.check in _WRONG_BYTES for finding in part.findings)
        packed.store.forget()
    return 2 * different >= len(sample)


def _equal(source: Source, copy: SourceTensor, original: SourceTensor) -> bool:
    """Whether two unquantised tensors have the same values, whatever their dtypes."""
    return all(
        torch.equal(
            source.read_rows(copy.weight, *span).float(),
            source.read_rows(original.weight, *span).float(),
        )
        for span in _spans(copy.shape)
    )


def _compare(
    packed: PackedCheckpoint,
    source: Source,
    tensor: SourceTensor,
    report: Report,
    optimum: Optimum,
    others: Set[str],
) -> TensorVerdict:
    begin = time.perf_counter()
    name, kind = tensor.name, packed.format_of(tensor.name)
    if packed.shape(name) != tensor.shape:
        found = f"inverts to shape {packed.shape(name)}, expected {tensor.shape}"
        report.add("inversion", name, found)
        return TensorVerdict(name, kind, False)
    own_format = kind == tensor.encoding
    spans = _spans(tensor.shape)
    same = _same_bytes if own_format else _same_values
    exact = same(packed, source, tensor, spans)
    facts = packed.provenance(name, statistics=False)
    check_origin(tensor, facts, others, report)
    # What kept its own format was never rounded, whatever the store claims.
    if not exact and (own_format or facts["exact"]):
        report.add(
            "inversion",
            name,
            "carried as it was, but the emitted bytes do not invert to the source's",
        )
    elif exact and not facts["exact"]:
        report.add("loss", name, "equals the source, but is said to be rounded")
    carried = own_format or tensor.encoding is Encoding.MXFP4
    zero = is_weight(name) and _is_zero(packed, name, tensor.shape[0])
    verdict = TensorVerdict(name, kind, exact, carried=carried, zero=zero)
    if not own_format:
        verdict = judge_rounding(packed, source, tensor, spans, verdict, facts, optimum, report)
    return dataclasses.replace(verdict, seconds=time.perf_counter() - begin)


def _is_zero(packed: PackedCheckpoint, name: str, rows: int) -> bool:
    """Whether all emitted values are zero: as a rule the first rows tell."""
    for start in range(0, rows, SF_ROWS):
        stored = packed.stored_rows(name, start, min(start + SF_ROWS, rows))
        if isinstance(stored, NVFP4Tensor):
            zero = nvfp4_is_zero(stored)
        else:
            zero = not bool(values_of(stored).any())
        if not zero:
            return False
    return True


def _spans(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Rows of each tile; tiles begin where tiles of scales do."""
    rows = shape[0]
    step = tile_rows(rows, math.prod(shape[1:]) * 4, SF_ROWS, TILE_BYTES)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _same_values(
    packed: PackedCheckpoint, source: Source, tensor: SourceTensor, spans: list[tuple[int, int]]
) -> bool:
    """Whether the emitted values are the source's, the sign of zero included."""
    values = SourceValues(source, tensor)
    return all(
        torch.equal(_bytes(values_of(stored)), _bytes(values.rows(*span)))
        for span, stored in stored_tiles(packed, tensor.name, spans)
    )


def _same_bytes(
    packed: PackedCheckpoint, source: Source, tensor: SourceTensor, spans: list[tuple[int, int]]
) -> bool:
    """Whether a tensor carried in its own format has the source's very bytes."""
    if tensor.encoding is Encoding.NVFP4:
        whole, expected = packed.stored(tensor.name), read_nvfp4(source, tensor)
        return isinstance(whole, NVFP4Tensor) and all(
            torch.equal(_bytes(found), _bytes(part))
            for found, part in (
                (whole.codes, expected.codes),
                (whole.scales, expected.scales),
                (whole.global_scale, expected.global_scale),
            )
        )
    for (start, stop), stored in stored_tiles(packed, tensor.name, spans):
        pairs: list[tuple[Stored, TensorEntry | None, int, int]] = []
        pairs.append((stored, tensor.weight, start, stop))
        if isinstance(stored, Fp8Matrix):
            codes, scales = unpack_fp8(stored)
            tiles = (start // FP8_BLOCK, -(-stop // FP8_BLOCK))
            pairs = [(codes, tensor.weight, start, stop), (scales, tensor.scale, *tiles)]
        for found, entry, *rows in pairs:
            if not _rows_equal(source, found, entry, *rows):
                return False
    return True


def _rows_equal(source: Source, found: Stored, entry: TensorEntry | None, *rows: int) -> bool:
    """Whether `found` has dtype and bytes of these rows of a stored tensor of the source."""
    if not isinstance(found, Tensor) or entry is None:
        return False
    part = widened(source.read_rows(entry, *rows))
    return found.dtype == part.dtype and torch.equal(_bytes(found), _bytes(part))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
