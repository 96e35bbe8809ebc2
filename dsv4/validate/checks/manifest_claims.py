"""What a store says of its source and of what became of it, held against the source.

No kernel reads these claims, so nothing else would notice that they are false: which files it was
made from, what travelled along, the recipe, and of each tensor where it lay and what it lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import Any

from dsv4.convert.exactness import Inexact
from dsv4.convert.plan import make_plan
from dsv4.convert.sources.base import Source
from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.errors import Dsv4Error
from dsv4.formats.model.recipes import make_recipe
from dsv4.formats.model.source_tensor import SourceTensor
from dsv4.formats.numeric.loss import Loss
from dsv4.formats.store.nodes import QuantizedGroup
from dsv4.validate.made_from import file_fault, listed_files, sha256_of
from dsv4.validate.report import Report, TensorVerdict

SLACK = 1e-6  # float64 sums over tiles of different sizes


def check_claims(packed: PackedCheckpoint, source: Source, report: Report) -> set[str]:
    """Source files, files that travelled along, and the recipe; -> as `check_source_files`."""
    others = check_source_files(packed, source, report)
    _check_assets(packed, source, report)
    _check_recipe(packed, source, report)
    return others


def check_source_files(packed: PackedCheckpoint, source: Source, report: Report) -> set[str]:
    """The manifest's list is that of the source: names, sizes, SHA-256, order.

    -> names of the source's files that the store was not made from.
    """
    sha256 = {file: sha256_of(source, file) for file in source.sizes}
    expected = source.description(sha256)["files"]
    report.count("source files hashed", len(expected))
    if packed.store.manifest["source"].get("files") == expected:
        return set()
    listed, found = listed_files(packed.store), {entry["name"]: entry for entry in expected}
    faults: dict[str, str] = {}
    for name in sorted(listed.keys() | found.keys()):
        entry = found.get(name, {})
        if fault := file_fault(listed.get(name), entry.get("bytes"), entry.get("sha256")):
            faults[name] = fault
    name, fault = next(iter(faults.items()), ("manifest", "the list of source files is malformed"))
    more = f"; {len(faults) - 1} more files differ" if len(faults) > 1 else ""
    report.add("source", name, f"this is not what the store was made from: {fault}{more}")
    return set(faults)


def _check_assets(packed: PackedCheckpoint, source: Source, report: Report) -> None:
    assets, expected = packed.store.assets, source.aux_files()
    for name in sorted(assets.keys() | expected.keys()):
        report.count("assets compared with the source")
        if name not in assets or name not in expected:
            where = "source" if name in expected else "store"
            report.add("assets", f"assets/{name}", f"is in the {where} only")
        elif assets[name].read_bytes() != expected[name]:
            report.add("assets", f"assets/{name}", "is not the source's")


def _check_recipe(packed: PackedCheckpoint, source: Source, report: Report) -> None:
    """Every array is what the recipe makes of this source."""
    recipe = packed.store.manifest["recipe"]
    try:
        plan = make_plan(source, make_recipe(recipe["name"], recipe["keep"]))
    except (Dsv4Error, LookupError, TypeError) as error:
        report.add("recipe", "manifest", f"the recipe {recipe!r:.200} is none: {error}")
        return
    expected = {spec.path: spec.element for output in plan.outputs for spec in output.arrays()}
    found = {path: spec.element for path, spec in packed.store.whole.arrays.items()}
    report.count("arrays held against the recipe", len(expected))
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            what = f"is {found.get(path)}, recipe {plan.recipe.name} makes {expected.get(path)}"
            report.add("recipe", path, what)


def check_origin(
    tensor: SourceTensor, provenance: Mapping[str, Any], others: Set[str], report: Report
) -> None:
    """The recorded ranges are those where the source has the tensor.

    others: files that the store was not made from, of which it cannot know ranges.
    """
    found = provenance["sources"]
    for role, entry in tensor.entries.items():
        if entry.file in others:
            continue
        if role not in ("weight", "scale") and "expert" in provenance:
            continue  # lineage has no column for it
        expected = {"file": entry.file, "begin": entry.begin, "end": entry.end}
        if found.get(role) != expected:
            said = _place(found.get(role))
            report.add("origin", tensor.name, f"{role} is {_place(expected)}, not {said}")


def _place(place: Any) -> str:
    """A range of a file of the source, as a person writes it."""
    try:
        return f"bytes {place['begin']} to {place['end']} of {place['file']}"
    except (LookupError, TypeError):
        return "recorded at all"


def check_loss(
    tensor: SourceTensor, provenance: Mapping[str, Any], loss: Loss, report: Report
) -> None:
    """The recorded loss of a rounded matrix is the measured one, in all figures."""
    recorded = provenance.get("loss")
    if recorded is None:
        if "expert" not in provenance and not provenance["exact"]:
            report.add("loss", tensor.name, "was rounded, but no loss is recorded")
        return
    for figure, value in loss.to_dict().items():
        said = recorded.get(figure) if isinstance(recorded, dict) else None
        if not _close(said, value):
            report.add("loss", tensor.name, f"{figure} is {value}, but {said} was recorded")


def check_admission(verdict: TensorVerdict, said: Inexact | None, report: Report) -> None:
    """What a store admits of an expert that was to be carried is what was measured."""
    measured = not verdict.exact and verdict.carried and verdict.loss is not None
    if measured and said is None:
        report.add("loss", verdict.name, "was to be carried and is not equal, but is not listed so")
    elif said is not None and not measured:
        report.add("loss", verdict.name, "is said to be rounded where it was to be carried")
    elif said is not None and verdict.loss is not None:
        for figure in ("rel_mse", "max_abs_error"):
            if not _close(recorded := getattr(said, figure), value := verdict.loss[figure]):
                what = f"{figure} is {value}, but {recorded} was recorded"
                report.add("loss", verdict.name, what)


def check_blocks(
    tensor: SourceTensor, provenance: Mapping[str, Any], blocks: int, report: Report
) -> None:
    """The recorded number of rounded blocks of an expert is the measured one."""
    said = provenance.get("rounded_blocks", blocks)
    if said != blocks:
        what = f"{blocks} blocks have other values than the source's, but {said} were recorded"
        report.add("loss", tensor.name, what)


def check_stack_loss(group: QuantizedGroup, rel_mse: float, report: Report) -> None:
    """The recorded loss of a stack is that of its worst expert."""
    said = group.attributes.get("rel_mse")
    if not _close(said, rel_mse):
        report.add("loss", group.path, f"rel_mse is {rel_mse}, but {said} was recorded")


def _close(said: object, value: float | None) -> bool:
    if value is None or type(said) not in (int, float):
        return said is value
    return math.isclose(float(said), value, rel_tol=SLACK, abs_tol=1e-30)  # type: ignore[arg-type]
