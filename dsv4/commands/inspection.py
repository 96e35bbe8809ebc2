"""`dsv4 inspect`: picks what is asked for and how it is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.table import Table

from dsv4.commands.console import say_absent
from dsv4.commands.tables import facts_table, list_table, recipe_text
from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.plain_text import counted, size
from dsv4.formats.store.manifest import origin_of
from dsv4.validate.diff import diff
from dsv4.validate.inspect import listing, tensor, tree

_GLOB = frozenset("*?[")


def inspection(
    directory: Path, name: str | None, other: Path | None
) -> tuple[dict[str, Any], RenderableType, bool]:
    """-> (JSON document, what to show, whether nothing differs) of what is asked for.

    A store, its tensors whose names match a glob, one tensor, or two stores. Raises StoreError for
    what is not a store or not a tensor of it, click.UsageError for a tensor of two.
    """
    packed = PackedCheckpoint.open(directory)
    say_absent(packed)
    if other is not None:
        if name is not None:
            raise click.UsageError("TENSOR and --diff exclude each other")
        second = PackedCheckpoint.open(other)
        found = diff(packed, second)
        document: dict[str, Any] = {
            "a": str(directory),
            "b": str(other),
            "roots": [p.store.manifest["root"] for p in (packed, second)],
            "origins": [origin_of(p.store.manifest) for p in (packed, second)],
            "same": not found,
            "differences": [dataclasses.asdict(difference) for difference in found],
        }
        return document, diff_text(document), not found
    if name is None:
        document = tree(packed)
        return document, store_table(document), True
    if _GLOB & set(name):
        tensors = listing(packed, name)
        return {"tensors": tensors}, names_table(name, tensors), True
    facts = tensor(packed, name)
    return facts, tensor_table(name, facts), True


def store_table(tree: Mapping[str, Any]) -> Group:
    """A store at a glance: tensors, sizes and formats by part."""
    origin = " ".join(map(str, tree["source"].values()))
    recipe = recipe_text(tree["recipe"])
    table = list_table("", ("part",), ("tensors", "size"))
    table.add_column("formats", overflow="fold")
    for part, facts in tree["parts"].items():
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in facts["formats"].items())
        table.add_row(part, f"{facts['tensors']:,}", size(facts["bytes"]), kinds)
    table.add_section()
    table.add_row("all", f"{len(tree['tensors']):,}", size(tree["bytes"]))
    return Group(f"packed store, recipe {recipe}, from {origin}\nroot {tree['root']}", table)


def names_table(glob: str, tensors: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every tensor whose name matches."""
    table = list_table(f"{counted(len(tensors), 'tensor')} like {glob}", ("name",))
    table.add_column("format", no_wrap=True)
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    for name, facts in tensors.items():
        table.add_row(name, facts["format"], _shape(facts["shape"]), size(facts["bytes"]))
    return table


def tensor_table(name: str, facts: Mapping[str, Any]) -> Table:
    """Where one tensor's bytes came from, what became of them, and its first block."""
    block = facts["first_block"]
    rows: dict[str, object] = {key: plain(v) for key, v in facts.items() if key != "first_block"}
    rows["shape"] = _shape(facts["shape"])
    rows["transforms"] = "; ".join(facts["transforms"])
    if "scales" in facts:
        names = {"blocks": "count"}  # a block has one scale
        rows["scales"] = plain({names.get(k, k): v for k, v in facts["scales"].items()})
    for role, place in facts["sources"].items():
        rows[f"source of {role}"] = f"{place['file']}, bytes {place['begin']} to {place['end']}"
    rows |= {f"first block: {key}": plain(value) for key, value in block.items()}
    if "codes" in block:
        rows["first block: codes"] = " ".join(f"{code:x}" for code in block["codes"])
    if "blocks" in rows:
        rows["blocks of the stack"] = rows.pop("blocks")
    for key in ("sources", "name"):
        rows.pop(key, None)
    return facts_table(name, {key.replace("_", " "): value for key, value in rows.items()})


def plain(value: Any) -> str:
    """A value of a JSON document as a person writes it: yes, 1.5, slabs 8, interleave 8."""
    match value:
        case True | False:
            return "yes" if value else "no"
        case None:
            return "none"
        case float():
            return f"{value:.6g}"
        case dict():
            return ", ".join(f"{key.replace('_', ' ')} {plain(v)}" for key, v in value.items())
        case list() | tuple():
            return " ".join(plain(one) for one in value)
        case _:
            return str(value)


def diff_text(document: Mapping[str, Any]) -> RenderableType:
    """What differs between two stores; a sentence when nothing does."""
    found = document["differences"]
    if not found:
        a, b = document["roots"]
        rest = "; both have the same root" if a == b else " but in where their sources came from"
        return f"{document['a']} and {document['b']} do not differ{rest}"
    title = f"A {document['a']}\nB {document['b']}\n{counted(len(found), 'difference')}"
    table = list_table("", ("kind", "where", "tensors", "what"))
    for one in found:
        table.add_row(one["kind"], one["path"], ", ".join(one["names"]), one["what"])
    return Group(title, table)


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
