"""What was to be carried exactly and is not: what the store admits, and whether it was accepted.

A stack lists such experts under `inexact` with their blocks and errors, and the manifest's recipe
says `accepted_rounding` when whoever converted it agreed. Without that agreement a store fails.
With the source, `inversion` holds every figure of the list against the bytes.
"""

from __future__ import annotations

from dsv4.convert.exactness import Inexact
from dsv4.formats.numeric.operands import NVFP4_BLOCK
from dsv4.formats.store.reader import PackedStore
from dsv4.validate.provenance import ADMITTED, admitted, quantized_groups
from dsv4.validate.report import Report


def read_admissions(store: PackedStore, report: Report) -> None:
    """Fill in what the store says was not carried exactly, what is zero, and what was accepted."""
    recipe = store.manifest.get("recipe")
    report.accepted_rounding = isinstance(recipe, dict) and bool(recipe.get("accepted_rounding"))
    for group in quantized_groups(store):
        listed = list(admitted(group))
        for name, _, figures in listed:
            blocks = group.rows * -(-group.cols // NVFP4_BLOCK)
            report.inexact.append(Inexact(name, blocks, *(figures[key] for key in ADMITTED)))
        said = group.attributes.get("inexact", {})
        if not isinstance(said, dict) or len(said) != len(listed):
            what = f"inexact is {said!r:.200}, expected names of its experts with figures"
            report.add("counts", group.path, what)
        if group.attributes.get("zero") and group.experts is None:
            report.zero.append(group.names[0])
        elif isinstance(zero := group.attributes.get("zero"), list):
            report.zero += [str(name) for name in zero]
    for name, path in store.contents.plain.items():
        if store.array(path).spec.attributes["dsv4"].get("zero"):
            report.zero.append(name)


def judge_admissions(report: Report) -> None:
    """Findings for what was not carried and not accepted; counts for what was."""
    if report.accepted_rounding and not report.inexact:
        what = "says that rounding was accepted, but lists no tensor that had to be rounded"
        report.add("exact", "manifest", what)
    for tensor in report.inexact:
        if report.accepted_rounding:
            report.count("tensors accepted as rounded")
        else:
            report.add(
                "exact",
                tensor.name,
                f"was to be carried exactly, but {tensor.rounded_blocks} of {tensor.blocks} blocks "
                f"are rounded, with a largest error of {tensor.max_abs_error:.3g}, and nobody "
                "accepted that; convert again with --accept-rounding, or from another source",
            )
