"""Whether a source is the one that a store was made from: its files against the manifest's list.

Names and sizes cost nothing, and the hub publishes hashes; a folder's files have to be hashed. So
what is visible is compared at once, and everything only by who reads everything anyway.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsv4.convert.plan import Plan, make_plan
from dsv4.convert.sources.base import Source
from dsv4.convert.sources.open import open_source
from dsv4.formats.errors import ConfigError, SourceError
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.recipes import make_recipe
from dsv4.formats.store.manifest import origin_of
from dsv4.formats.store.reader import PackedStore

WRONG_SOURCE = "the source is not the one this store was made from"
HASH_BLOCK = 8 << 20


def listed_files(store: PackedStore) -> dict[str, Mapping[str, Any]]:
    """name -> `{"name", "bytes", "sha256"}` of the files the store was made from.

    Entries of another form are left out.
    """
    listed = store.manifest["source"].get("files")
    return {
        entry["name"]: entry
        for entry in (listed if isinstance(listed, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("name"), str)
    }


def file_fault(listed: Mapping[str, Any] | None, nbytes: int | None, sha256: str | None) -> str:
    """How a file of the source is not the listed one; "" when it is, as far as can be told.

    listed: its entry; None: there is none. nbytes: None: the source has no such file. sha256: in
    hex, None: not known.
    """
    if listed is None:
        return "the store was not made from a file of this name"
    if nbytes is None:
        return "the store was made from it, and the source does not have it"
    if listed.get("bytes") != nbytes:
        return f"it has {nbytes} bytes, the store was made from one of {listed.get('bytes')}"
    if sha256 is not None and listed.get("sha256") != sha256:
        return "its sha256 is not that of the file that the store was made from"
    return ""


def visible_difference(store: PackedStore, source: Source) -> tuple[str, str] | None:
    """-> (file, how it differs) of the first safetensors file that differs without being read."""
    listed = listed_files(store)
    shards = {name for name in listed if name.endswith(".safetensors")}
    for name in sorted(shards | source.sizes.keys()):
        nbytes = source.sizes.get(name)
        sha256 = None if nbytes is None else source.published_sha256(name)
        if fault := file_fault(listed.get(name), nbytes, sha256):
            return name, fault
    return None


def cheap_difference(store: PackedStore, source: Source) -> tuple[str, str] | None:
    """As `visible_difference`; where nothing is published, the smallest file is hashed as well."""
    if found := visible_difference(store, source):
        return found
    name = min(source.sizes, key=lambda file: source.sizes[file])
    if source.published_sha256(name) is not None:
        return None
    fault = file_fault(listed_files(store)[name], source.sizes[name], sha256_of(source, name))
    return (name, fault) if fault else None


def sha256_of(source: Source, file: str) -> str:
    """SHA-256 of a whole file, in hex, as published or else as read. Raises SourceError."""
    if (published := source.published_sha256(file)) is not None:
        return published
    digest, left = hashlib.sha256(), source.sizes[file]
    buffer = memoryview(bytearray(min(HASH_BLOCK, left)))
    with source.stream(file) as stream:
        while left:
            piece = buffer[: min(len(buffer), left)]
            stream.readinto(piece)
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def source_of(
    store: PackedStore, src: str | Path | None, on_wait: Callable[[str], None] | None = None
) -> tuple[Source, str]:
    """-> (the source, its name); the manifest's repository at its commit when none is given."""
    if src is not None:
        return open_source(src, on_wait=on_wait), str(src)
    origin = origin_of(store.manifest)
    if origin.get("kind") != "hub":
        raise SourceError(
            f"{store.root}: bytes are lost, and it was made from a local directory; give it with "
            "--source"
        )
    # huggingface_hub takes half a second to import.
    from dsv4.convert.sources.hub import HubSource

    source = HubSource(origin["repo"], origin["commit"], on_wait=on_wait)
    return source, f"{origin['repo']}@{origin['commit']}"


def plan_of(store: PackedStore, source: Source) -> Plan:
    """The plan this store was made by. Raises SourceError for what is visibly another source."""
    if found := visible_difference(store, source):
        raise SourceError(f"{found[0]}: {found[1]}: {WRONG_SOURCE}")
    if ModelConfig.from_hf(source.config) != store.config:
        raise SourceError(f"config.json is of another model: {WRONG_SOURCE}")
    recipe = store.manifest["recipe"]
    try:
        return make_plan(source, make_recipe(recipe["name"], recipe["keep"]))
    except (LookupError, TypeError) as error:
        raise ConfigError(f"manifest: recipe {recipe!r:.200} is malformed") from error
