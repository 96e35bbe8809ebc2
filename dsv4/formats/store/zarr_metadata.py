"""The store's metadata documents, made by zarr-python (offline half only).

zarr-python builds and consolidates the hierarchy in memory; the bytes it would write are then
written by our own durable I/O. Nothing of zarr-python's data path is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import zarr
from zarr.core.buffer import Buffer
from zarr.core.group import GroupMetadata
from zarr.core.metadata import ArrayV2Metadata, ArrayV3Metadata
from zarr.errors import ZarrUserWarning
from zarr.storage import MemoryStore

from dsv4.formats.store.specs import ATTRIBUTE, ArraySpec
from dsv4.formats.store.zarr_json import array_document


def metadata_documents(
    manifest: Mapping[str, Any],
    groups: Mapping[str, Mapping[str, Any]],
    arrays: Mapping[str, ArraySpec],
) -> dict[str, bytes]:
    """key -> content of every `zarr.json` of the store, the root's with consolidated metadata.

    Raises ValueError or TypeError when zarr-python refuses a node.
    """
    nodes: dict[str, GroupMetadata | ArrayV2Metadata | ArrayV3Metadata] = {
        "": GroupMetadata(attributes={ATTRIBUTE: dict(manifest)})
    }
    for path, attributes in groups.items():
        nodes[path] = GroupMetadata(attributes=dict(attributes))
    for path, spec in arrays.items():
        nodes[path] = ArrayV3Metadata.from_dict(array_document(spec))
    contents: dict[str, Buffer] = {}
    store = MemoryStore(contents)
    # Without indentation: a real model's root document has 6 MB instead of 8, read at every open.
    with zarr.config.set({"json_indent": None}), warnings.catch_warnings():
        for _ in zarr.create_hierarchy(store=store, nodes=nodes):
            pass
        # Consolidated metadata is an extension of Zarr v3; the nodes' own documents stand beside.
        warnings.filterwarnings("ignore", message="Consolidated", category=ZarrUserWarning)
        zarr.consolidate_metadata(store)
    return {key: buffer.to_bytes() for key, buffer in sorted(contents.items())}
