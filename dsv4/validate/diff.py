"""What differs between two stores, by their metadata alone: no weight is read.

Equal BLAKE3 in two manifests stand for equal bytes. That each manifest is true of its own files
is what `validate` shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.store.manifest import origin_of
from dsv4.formats.store.nodes import QuantizedGroup
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.zarr_json import descriptions

_NOT_CONTENT = ("files", "root", "origin")  # follow from the rest, or are no part of the root


@dataclasses.dataclass(frozen=True)
class Difference:
    """One difference. kind: section, array, group or asset. names: the tensors concerned.

    what: "only in A", "only in B", or what differs, such as "3 of 8 chunks".
    """

    kind: str
    path: str
    names: tuple[str, ...]
    what: str


def diff(a: PackedCheckpoint, b: PackedCheckpoint) -> list[Difference]:
    """What differs between two stores; nothing exactly when their contents have one root.

    Where the files of the source came from is no difference.
    """
    one, other = a.store, b.store
    found = [
        Difference("section", name, (), what)
        for name, what in _changes(_sections(one), _sections(other))
    ]
    nodes = [descriptions(s.hierarchy.groups, s.hierarchy.arrays) for s in (one, other)]
    for path, what in _changes(*nodes):
        holder = other if what == "only in B" else one
        kind = "array" if path in holder.hierarchy.arrays else "group"
        found.append(Difference(kind, path, _names(holder, path), what))
    assets = [{name: s.records[f"assets/{name}"].blake3 for name in s.assets} for s in (one, other)]
    found += [Difference("asset", name, (), what) for name, what in _changes(*assets)]
    for path in one.hierarchy.arrays.keys() & other.hierarchy.arrays.keys():
        if what := _bytes_changed(one, other, path):
            found.append(Difference("array", path, _names(one, path), what))
    return sorted(found, key=lambda difference: (difference.kind != "section", difference.path))


def _sections(store: PackedStore) -> dict[str, Any]:
    """What the root commits to, version 2's origin left out as well."""
    sections = {name: value for name, value in store.manifest.items() if name not in _NOT_CONTENT}
    origin = origin_of(store.manifest)
    source = {name: value for name, value in sections["source"].items() if name not in origin}
    return sections | {"source": source}


def _changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str]]:
    """-> (name, what differs) of every entry that is not the same in both."""
    changes = [(name, "only in A") for name in a.keys() - b.keys()]
    changes += [(name, "only in B") for name in b.keys() - a.keys()]
    for name in a.keys() & b.keys():
        if a[name] != b[name]:
            changes.append((name, _fields(a[name], b[name])))
    return sorted(changes)


def _fields(a: Any, b: Any) -> str:
    """Which fields of two JSON objects differ, and how if they are short."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return "differs"
    missing = object()
    keys = sorted(k for k in a.keys() | b.keys() if a.get(k, missing) != b.get(k, missing))
    if keys == ["attributes"]:
        inner = (x["attributes"].get("dsv4", {}) for x in (a, b))
        return f"attributes: {_fields(*inner)}"
    texts = []
    for key in keys:
        pair = f"{a.get(key, 'nothing')} and {b.get(key, 'nothing')}"
        texts.append(f"{key} ({pair})" if len(pair) <= 60 else key)
    return ", ".join(texts) + (" differs" if len(keys) == 1 else " differ")


def _names(store: PackedStore, path: str) -> tuple[str, ...]:
    """The tensors whose bytes the node at `path` holds; of a stack, their templates."""
    own = store.hierarchy.arrays[path].attributes if path in store.hierarchy.arrays else {}
    named = own.get("dsv4", {}).get("names") or []
    group = _group(store, path) or _group(store, path.rpartition("/")[0])
    return tuple(named) if group is None else group.names


def _group(store: PackedStore, path: str) -> QuantizedGroup | None:
    own = store.hierarchy.groups.get(path, {}).get("dsv4")
    if not own:
        return None
    stack = store.contents.stacks.get(path)
    return stack or store.contents.matrices.get(own["names"][0])


def _bytes_changed(a: PackedStore, b: PackedStore, path: str) -> str:
    """How many chunks of an array differ; nothing when all files have equal BLAKE3."""
    changed = total = 0
    specs = (a.hierarchy.arrays[path], b.hierarchy.arrays[path])
    first, second = ((s.shape, s.chunk, s.shard, s.element) for s in specs)
    if first != second:
        return ""  # said of the node already
    experts: set[int] = set()
    for file in specs[0].files():
        total += file.chunks
        if a.records[file.key].blake3 == b.records[file.key].blake3:
            continue
        wrong = np.flatnonzero(a.chunk_digests(file.key) != b.chunk_digests(file.key))
        changed += len(wrong)
        per_row = file.chunks / max(file.rows[1] - file.rows[0], 1)
        if per_row >= 1:
            experts |= {file.rows[0] + int(chunk / per_row) for chunk in wrong}
    if not changed:
        return ""
    text = f"{changed} of {total} chunks"
    group = _group(a, path.rpartition("/")[0])
    if group is not None and group.experts and experts:
        shown = sorted(experts)
        text += f", experts {', '.join(map(str, shown[:8]))}" + (" ..." if len(shown) > 8 else "")
    return text
