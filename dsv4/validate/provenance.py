"""What a store says of itself, and how its block scales are spread: shown, not judged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.model.recipes import Role, role_of
from dsv4.formats.numeric.codecs import e4m3_decode
from dsv4.formats.numeric.operands import NVFP4_BLOCK
from dsv4.formats.store.nodes import EXPERT, QuantizedGroup
from dsv4.formats.store.reader import PackedStore
from dsv4.validate.report import SCALE_OCTAVES, Report

ADMITTED = ("rounded_blocks", "rel_mse", "max_abs_error")
"""What a stack says of each expert that was to be carried and is not exact."""

_ROUNDED_BLOCKS = 7  # column of a stack's lineage


def role(name: str) -> Role:
    """The role of a tensor, or of the template that names the experts of a stack."""
    return role_of(name.replace(EXPERT, "0"))


def quantized_groups(store: PackedStore) -> list[QuantizedGroup]:
    """Every quantised matrix and stack, once."""
    contents = store.contents
    groups = (*contents.matrices.values(), *contents.stacks.values())
    return list({group.path: group for group in groups}.values())


def describe(packed: PackedCheckpoint, report: Report) -> None:
    """Fill in tool, recipe, and the losses that were recorded at conversion."""
    recipe = packed.store.manifest.get("recipe")
    report.tool = str(packed.store.manifest.get("tool"))
    report.recipe = str(recipe.get("name") if isinstance(recipe, dict) else recipe)
    for group in quantized_groups(packed.store):
        loss = group.attributes if group.experts else group.attributes.get("loss")
        rel_mse = loss.get("rel_mse") if isinstance(loss, dict) else None
        if isinstance(rel_mse, float) and 0.0 < rel_mse < math.inf:
            report.recorded |= dict.fromkeys(group.names, rel_mse)


def admitted(
    group: QuantizedGroup,
) -> Iterator[tuple[str, tuple[int, int], Mapping[str, Any]]]:
    """-> (name, (expert, projection), figures `ADMITTED`) of each expert that the stack says was to
    be carried and is not exact; what cannot be understood is left out.
    """
    listed = group.attributes.get("inexact")
    if not isinstance(listed, dict):
        return
    places = {
        template.replace(EXPERT, str(expert)): (expert, projection)
        for projection, template in enumerate(group.names)
        for expert in range(group.experts or 0)
    }
    for name, figures in listed.items():
        if name not in places or not isinstance(figures, dict):
            continue
        if all(type(figures.get(key)) in (int, float) for key in ADMITTED):
            yield name, places[name], figures


def said_exact(store: PackedStore) -> int:
    """How many tensors the store says are the source's, each expert's by itself."""
    count = len(store.contents.plain)
    for group in quantized_groups(store):
        lineage = f"{group.path}/lineage"
        if group.experts and lineage in store.hierarchy.arrays:
            count += int((store.array(lineage).tensor()[..., _ROUNDED_BLOCKS] == 0).sum())
        elif group.attributes["exact"]:
            count += (group.experts or 1) * len(group.names)
    return count


def add_scales(
    store: PackedStore, group: QuantizedGroup, tallies: Mapping[str, Tensor], report: Report
) -> None:
    """Count the block scales of an NVFP4 group by octave, without the layout's padding.

    tallies: key of a file -> how often it holds each byte, int64 `[256]`.
    """
    files = store.array(f"{group.path}/scales").spec.files()
    bytes_ = torch.stack([tallies[file.key] for file in files]).sum(dim=0)
    blocks = (group.experts or 1) * group.packed_rows * -(-group.cols // NVFP4_BLOCK)
    bytes_[0] -= int(bytes_.sum()) - blocks
    counts = report.scales.setdefault(str(role(group.names[0])), [0] * len(SCALE_OCTAVES))
    for octave, count in zip(_OCTAVES, bytes_.tolist(), strict=True):
        if octave is not None:
            counts[octave] += count


def _octave(magnitude: float) -> int | None:
    """Index into SCALE_OCTAVES of a block scale; None for NaN."""
    if math.isnan(magnitude):
        return None
    return SCALE_OCTAVES.index(math.frexp(magnitude)[1] - 1) if magnitude else 0


_OCTAVES = [_octave(abs(x)) for x in e4m3_decode(torch.arange(256, dtype=torch.uint8)).tolist()]
