"""The Zarr v3 metadata of a store, as plain JSON: what is expected and how it is read.

The reader needs no Zarr library: one document, the root's `zarr.json` with its consolidated
metadata, holds everything. It is not to be trusted. An array's document must *equal* the one that
`array_document` gives for its shape, chunks and attributes, so there is nothing to interpret.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from dsv4.formats.errors import StoreError
from dsv4.formats.store.specs import ATTRIBUTE, ELEMENTS, ArraySpec, check_path

MAX_DOCUMENT_BYTES = 1 << 28

_LITTLE_ENDIAN = {"name": "bytes", "configuration": {"endian": "little"}}
_SINGLE_BYTES = {"name": "bytes"}
_INDEX_CODECS = [_LITTLE_ENDIAN, {"name": "crc32c"}]
_CHUNK_KEYS = {"name": "default", "configuration": {"separator": "/"}}
_NO_CHILDREN = {"kind": "inline", "must_understand": False, "metadata": {}}


@dataclasses.dataclass(frozen=True)
class Hierarchy:
    """All nodes of a store. groups: path -> attributes, without the root; arrays: path -> spec."""

    manifest: dict[str, Any]
    groups: Mapping[str, Mapping[str, Any]]
    arrays: Mapping[str, ArraySpec]


def array_document(spec: ArraySpec) -> dict[str, Any]:
    """The Zarr v3 array metadata of `spec`, as zarr-python writes it."""
    own = {**spec.attributes.get(ATTRIBUTE, {}), "element": spec.element}
    return {
        **_geometry_document(spec.element, spec.shape, spec.chunk, spec.shard),
        "attributes": {**spec.attributes, ATTRIBUTE: own},
    }


@functools.lru_cache(maxsize=4096)  # a model's layers share a few dozen geometries
def _geometry_document(
    element: str, shape: tuple[int, ...], chunk: tuple[int, ...], shard: tuple[int, ...]
) -> Mapping[str, Any]:
    kind = ELEMENTS[element]
    codecs: list[dict[str, Any]] = [_SINGLE_BYTES if kind.nbytes == 1 else _LITTLE_ENDIAN]
    if chunk != shape:
        sharding = {
            "chunk_shape": list(chunk),
            "codecs": codecs,
            "index_codecs": _INDEX_CODECS,
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": kind.zarr,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard)}},
        "chunk_key_encoding": _CHUNK_KEYS,
        "fill_value": 0,
        "codecs": codecs,
        "storage_transformers": [],
    }


def group_document(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The Zarr v3 group metadata with `attributes`, as it stands in the group's own file."""
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def descriptions(
    groups: Mapping[str, Mapping[str, Any]], arrays: Mapping[str, ArraySpec]
) -> dict[str, dict[str, Any]]:
    """path -> what the Merkle root pins of each node; free of any Zarr library's habits."""
    nodes: dict[str, dict[str, Any]] = {
        path: {"kind": "group", "attributes": dict(own)} for path, own in groups.items()
    }
    for path, spec in arrays.items():
        nodes[path] = {
            "kind": "array",
            "shape": list(spec.shape),
            "element": spec.element,
            "chunk": list(spec.chunk),
            "shard": list(spec.shard),
            "attributes": {**spec.attributes, ATTRIBUTE: dict(spec.attributes.get(ATTRIBUTE, {}))},
        }
    return nodes


def with_parents(
    groups: Mapping[str, Mapping[str, Any]], arrays: Mapping[str, ArraySpec]
) -> dict[str, Mapping[str, Any]]:
    """`groups` and every group that a node's path passes through, sorted by path.

    Raises StoreError when an array would contain another node, or is a group as well.
    """
    complete = dict(groups)
    for path in (*groups, *arrays):
        parent = path.rpartition("/")[0]
        while parent and parent not in complete:
            complete[parent] = {}
            parent = parent.rpartition("/")[0]
    if both := sorted(complete.keys() & arrays.keys()):
        raise StoreError(f"node {both[0]} is an array and contains others; expected a group")
    return dict(sorted(complete.items()))


def parse_json(raw: bytes, what: str) -> Any:
    """Strict JSON: UTF-8, no NaN or infinities. Raises StoreError naming `what`."""
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        long = "integer string conversion" in str(error)
        why = "it holds a number of thousands of digits" if long else error
        raise StoreError(f"{what} is no valid JSON: {why}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def parse_root(raw: bytes) -> Hierarchy:
    """Read the root's `zarr.json`. Raises StoreError naming the node that is malformed."""
    document = parse_json(raw, "zarr.json")
    if not isinstance(document, dict):
        raise StoreError("zarr.json is no JSON object")
    consolidated = document.pop("consolidated_metadata", None)
    attributes = document.get("attributes")
    if not isinstance(attributes, dict) or document != group_document(attributes):
        raise StoreError("zarr.json is no Zarr v3 group")
    if attributes.keys() != {ATTRIBUTE} or not isinstance(attributes[ATTRIBUTE], dict):
        raise StoreError("zarr.json holds no dsv4 manifest; this is not a packed checkpoint")
    if (
        not isinstance(consolidated, dict)
        or not isinstance(consolidated.get("metadata"), dict)
        or consolidated != {**_NO_CHILDREN, "metadata": consolidated["metadata"]}
    ):
        raise StoreError("zarr.json holds no consolidated metadata")
    groups: dict[str, Mapping[str, Any]] = {}
    arrays: dict[str, ArraySpec] = {}
    for path, node in consolidated["metadata"].items():
        if isinstance(node, dict) and node.get("node_type") == "group":
            check_path(path)
            groups[path] = _parse_group(path, node)
        else:
            arrays[path] = _parse_array(path, node)
    if missing := with_parents(groups, arrays).keys() - groups.keys():
        raise StoreError(f"zarr.json: the parent group {min(missing)} is missing")
    return Hierarchy(attributes[ATTRIBUTE], groups, arrays)


def _parse_group(path: str, node: dict[str, Any]) -> dict[str, Any]:
    children = node.pop("consolidated_metadata", _NO_CHILDREN)
    attributes = node.get("attributes")
    if (
        children != _NO_CHILDREN
        or not isinstance(attributes, dict)
        or node != group_document(attributes)
    ):
        raise StoreError(f"zarr.json: node {path} is no Zarr v3 group")
    return attributes


def _parse_array(path: str, node: Any) -> ArraySpec:
    try:
        shape = node["shape"]
        shard = node["chunk_grid"]["configuration"]["chunk_shape"]
        codec = node["codecs"][0]
        sharded = codec["name"] == "sharding_indexed"
        chunk = codec["configuration"]["chunk_shape"] if sharded else shard
        attributes = dict(node["attributes"])
        own = dict(attributes[ATTRIBUTE])
        element = own.pop("element")
    except (LookupError, TypeError, ValueError):
        raise StoreError(f"zarr.json: node {path} is no array of a packed checkpoint") from None
    if not all(isinstance(dims, list) for dims in (shape, shard, chunk)):
        raise StoreError(f"zarr.json: array {path} has a shape that is no list")
    attributes[ATTRIBUTE] = own
    spec = ArraySpec(path, tuple(shape), element, tuple(chunk), tuple(shard), attributes)
    expected = array_document(spec)
    if node != expected:
        fields = sorted(k for k in node.keys() | expected.keys() if node.get(k) != expected.get(k))
        raise StoreError(
            f"zarr.json: array {path} has unexpected {', '.join(map(str, fields))}; a packed "
            "checkpoint is uncompressed, little endian, with the bytes or sharding codec only"
        )
    return spec
