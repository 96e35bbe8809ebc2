"""`dsv4 inspect`: picks what is asked for and how it is shown."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.store.manifest import origin_of
from dsv4.render import diff_table, store_table, tensor_table
from dsv4.validate.diff import diff
from dsv4.validate.inspect import tensor, tree


def inspection(
    directory: Path, name: str | None, other: Path | None
) -> tuple[dict[str, Any], Table, bool]:
    """-> (JSON document, table, whether nothing differs) of a store, a tensor, or two stores.

    Raises StoreError for what is no store or no tensor of it, click.UsageError for a tensor of two.
    """
    packed = PackedCheckpoint.open(directory)
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
        return document, diff_table(document), not found
    if name is not None:
        facts = tensor(packed, name)
        return facts, tensor_table(name, facts), True
    document = tree(packed)
    return document, store_table(document), True
