"""What a store says of its source and of what became of it, held against the source.

No kernel reads these claims, so nothing else would notice that they are false: which files it was
made from, what travelled along, the recipe, and of each tensor where it lay and what it lost.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

from dsv4.convert.exactness import Inexact
from dsv4.convert.plan import make_plan
from dsv4.convert.recipes import make_recipe
from dsv4.convert.source import Source
from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.errors import Dsv4Error
from dsv4.formats.metrics import Loss
from dsv4.formats.source_tensor import SourceTensor
from dsv4.formats.store.contents import QuantizedGroup
from dsv4.validate.report import Report, TensorVerdict

SLACK = 1e-6  # float64 sums over tiles of different sizes
HASH_BLOCK = 8 << 20


def check_claims(packed: PackedCheckpoint, source: Source, report: Report) -> None:
    """Source files, files that travelled along, and the recipe."""
    _check_source_files(packed, source, report)
    _check_assets(packed, source, report)
    _check_recipe(packed, source, report)


def _check_source_files(packed: PackedCheckpoint, source: Source, report: Report) -> None:
    """The manifest's listing is that of the source: names, sizes, SHA-256."""
    sha256 = {file: source.published_sha256(file) or _sha256(source, file) for file in source.sizes}
    listed = packed.store.manifest["source"].get("files")
    expected = source.description(sha256)["files"]
    if listed != expected:
        listed = listed if isinstance(listed, list) else []
        wrong = next((e["name"] for e in expected if e not in listed), "another file")
        report.add("source", str(wrong), "is not the file that the manifest lists")
    report.count("source files hashed", len(expected))


def _sha256(source: Source, file: str) -> str:
    digest, left = hashlib.sha256(), source.sizes[file]
    buffer = memoryview(bytearray(min(HASH_BLOCK, left)))
    with source.stream(file) as stream:
        while left:
            piece = buffer[: min(len(buffer), left)]
            stream.readinto(piece)
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


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
    found = {path: spec.element for path, spec in packed.store.hierarchy.arrays.items()}
    report.count("arrays held against the recipe", len(expected))
    for path in sorted(expected.keys() | found.keys()):
        if expected.get(path) != found.get(path):
            what = f"is {found.get(path)}, recipe {plan.recipe.name} makes {expected.get(path)}"
            report.add("recipe", path, what)


def check_origin(tensor: SourceTensor, provenance: Mapping[str, Any], report: Report) -> None:
    """The recorded ranges are those where the source has the tensor."""
    found = provenance["sources"]
    for role, entry in tensor.entries.items():
        if role not in ("weight", "scale") and "expert" in provenance:
            continue  # lineage has no column for it
        expected = {"file": entry.file, "begin": entry.begin, "end": entry.end}
        if found.get(role) != expected:
            report.add("origin", tensor.name, f"{role} is at {expected}, not at {found.get(role)}")


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
