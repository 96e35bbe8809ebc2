"""What a store says about itself, held against itself: layouts, counts, padding."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dsv4.formats.numeric.layouts import LAYOUTS, pack_nvfp4, unpack_nvfp4
from dsv4.formats.numeric.operands import NVFP4_BLOCK, NVFP4_K_ALIGN, SF_ROWS, Matrix, Nvfp4Matrix
from dsv4.formats.store.nodes import QuantizedGroup
from dsv4.formats.store.reader import PackedStore
from dsv4.validate.provenance import admitted, quantized_groups
from dsv4.validate.report import Report


def check_layouts(store: PackedStore, report: Report) -> None:
    """The manifest describes the layouts that are used, with the parameters they have."""
    used = {str(group.attributes["layout"]) for group in quantized_groups(store)}
    described = store.manifest["layouts"]
    report.count("layouts described", len(used))
    for layout in sorted(used):
        found = described.get(layout)
        if not isinstance(found, dict) or found.keys() != LAYOUTS[layout].parameters.keys():
            report.add("layouts", layout, "is used, but not described with its parameters")


def check_counts(store: PackedStore, group: QuantizedGroup, report: Report) -> None:
    """A stack's counts are the sums of its experts'."""
    lineage = store.array(f"{group.path}/lineage").tensor()
    recoded, rounded = (int(lineage[..., column].sum()) for column in (6, 7))
    blocks = group.packed_rows * -(-group.cols // NVFP4_BLOCK) * (group.experts or 0)
    expected = {
        "blocks": blocks if group.format == "nvfp4" else 0,
        "recoded_blocks": recoded,
        "rounded_blocks": rounded,
        "exact": rounded == 0,
    }
    for name, (expert, projection), figures in admitted(group):
        value = int(lineage[expert, projection, 7])
        if (said := figures["rounded_blocks"]) != value:
            what = f"rounded_blocks is said to be {said}, its lineage: {value}"
            report.add("counts", name, what)
    report.count("stacks whose counts add up")
    for what, value in expected.items():
        if (said := group.attributes.get(what)) != value:
            report.add("counts", group.path, f"{what} is said to be {said}, its experts: {value}")


def check_padding(store: PackedStore, group: QuantizedGroup, report: Report) -> None:
    """What the layout adds to an NVFP4 matrix is zero."""
    if group.format == "nvfp4" and (group.packed_rows % SF_ROWS or group.cols % NVFP4_K_ALIGN):
        report.count("value ranges")
        if not all(map(_is_padded, _matrices(store, group))):
            report.add("values", group.path, "its padding is not zero")


def _matrices(store: PackedStore, group: QuantizedGroup) -> Iterator[Matrix]:
    if group.experts is None:
        yield store.matrix(group.names[0])
    else:
        stack = store.stack(group)
        yield from (stack.matrix(expert) for expert in range(group.experts))


def _is_padded(matrix: Matrix) -> bool:
    """Whether what the layout adds to an NVFP4 matrix is zero."""
    assert isinstance(matrix, Nvfp4Matrix)
    slabs = matrix.codes.shape[0]
    packed = pack_nvfp4(unpack_nvfp4(matrix), slabs=slabs, interleave=matrix.interleave)
    return torch.equal(packed.codes, matrix.codes) and torch.equal(packed.scales, matrix.scales)
