"""The metadata of a finished conversion: attributes of every node, and the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv4.convert.outputs.base import Losses, Output, Unit
from dsv4.convert.outputs.plain import PlainOutput
from dsv4.convert.outputs.results import Outcome, Result
from dsv4.convert.outputs.stack import ExpertsOutput
from dsv4.convert.plan import Plan
from dsv4.formats.numeric.layouts import LAYOUTS
from dsv4.formats.numeric.loss import Loss
from dsv4.formats.numeric.operands import NVFP4_BLOCK
from dsv4.formats.store.matrix_views import PlannedNodes
from dsv4.formats.store.nodes import read_contents
from dsv4.formats.store.specs import ArraySpec
from dsv4.formats.store.zarr_json import Hierarchy
from dsv4.formats.version import TOOL


def describe(
    plan: Plan, results: Mapping[str, Result]
) -> tuple[dict[str, dict[str, Any]], list[ArraySpec], Losses]:
    """-> (group attributes by path, arrays, losses of the rounded tensors).

    results: what every unit of the plan measured, by its key.
    """
    files = {name: index for index, name in enumerate(plan.source_files)}
    groups: dict[str, dict[str, Any]] = {}
    arrays: list[ArraySpec] = []
    losses: Losses = {}
    for output in plan.outputs:
        measured = [results[unit.key] for unit in output.units()]
        attributes = {"dsv4": output.attributes(measured, files)}
        if isinstance(output, PlainOutput):
            arrays += _with_attributes(output, attributes)
        else:
            groups[output.path] = attributes
            arrays += output.arrays()
        losses |= output.losses(measured)
    return groups, arrays, losses


def unmeasured(output: Output, global_scale: float = 1.0) -> Iterator[tuple[Unit, Result]]:
    """Every unit of an output, with what it would have measured had nothing been rounded."""
    outcome = Outcome(loss=Loss().to_dict())
    if isinstance(output, ExpertsOutput):
        rows, cols = output.shape
        outcome = Outcome(blocks=rows * -(-cols // NVFP4_BLOCK), global_scale=global_scale)
    for unit in output.units():
        yield unit, Result((outcome,) * len(unit.inputs))


def planned_nodes(plan: Plan, name: str) -> PlannedNodes:
    """The nodes of the store that `plan` would make of the source `name`."""
    results = {unit.key: result for output in plan.outputs for unit, result in unmeasured(output)}
    groups, arrays, _ = describe(plan, results)
    hierarchy = Hierarchy({}, groups, {spec.path: spec for spec in arrays})
    return PlannedNodes(Path(name), hierarchy, read_contents(hierarchy), plan.config)


def _with_attributes(output: Output, attributes: dict[str, Any]) -> list[ArraySpec]:
    return [dataclasses.replace(array, attributes=attributes) for array in output.arrays()]


def manifest_of(
    plan: Plan,
    description: Mapping[str, Any],
    origin: Mapping[str, str],
    *,
    accepted: bool = False,
) -> dict[str, Any]:
    """The manifest's sections; description, origin: of the source (see `Source`).

    accepted: whether tensors that were to be carried and could not be were accepted as rounded.
    """
    return {
        "tool": TOOL,
        "layouts": {layout.id: dict(layout.parameters) for layout in LAYOUTS.values()},
        "config": plan.config.to_dict(),
        "recipe": plan.recipe.to_dict() | ({"accepted_rounding": True} if accepted else {}),
        "source": dict(description),
        "origin": dict(origin),
    }
