"""Finding damage in a whole store: files that are altered or unlisted, and a false root.

`damage` reads every byte, and `verify` refuses what it finds; `check_root` recomputes the Merkle
root from the metadata alone.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from dsv4.formats.errors import StoreError
from dsv4.formats.store import digest
from dsv4.formats.store.damage import Damage, refuse, sizes
from dsv4.formats.store.manifest import content_root
from dsv4.formats.store.parts import PART_MARKER
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import JOURNAL, LOCK, MARKER, NODE_DOCUMENT
from dsv4.formats.store.zarr_json import (
    MAX_DOCUMENT_BYTES,
    array_document,
    descriptions,
    group_document,
    parse_json,
)


def verify(store: PackedStore, path: str | None = None) -> None:
    """Hash every chunk under `path` (array, group or file); None: of the whole store.

    Raises StoreError naming the first faulty file and chunk. With None, files that belong to
    nothing and altered node documents are refused as well. `damage` lists all.
    """
    try:
        refuse(store.root, damage(store, path))
    except StoreError as error:
        raise StoreError(f"{store.root}: {error}") from None


def damage(store: PackedStore, path: str | None = None) -> Iterator[Damage]:
    """All faults of the files under `path` (array, group or file; None: the whole store).

    Reads every byte of them. With None it also reports unlisted files and altered node documents.
    Raises StoreError when nothing is stored under `path`.
    """
    files = store.files_under(path)
    faulty = set()
    for fault in sizes(store.root, files):
        faulty.add(fault.key)
        yield fault
    for file in files:
        if file.key in faulty:
            continue
        try:
            mapped = store.map_file(file, keep=False)
        except StoreError as error:
            yield Damage(file.key, None, str(error))
            continue
        for chunk in mapped.damaged_chunks():
            yield Damage(file.key, chunk, "the bytes do not match the checksum")
        if file.sharded and mapped.index != digest.dense_index(file.chunks, file.chunk_nbytes):
            yield Damage(file.key, None, "the sharding index behind the chunks is altered")
    if path is None:
        yield from node_faults(store)
        yield from unlisted(store)


def node_faults(store: PackedStore) -> Iterator[Damage]:
    """Nodes whose own `zarr.json` is missing or contradicts the consolidated metadata."""
    nodes = {path: array_document(spec) for path, spec in store.hierarchy.arrays.items()}
    nodes |= {path: group_document(own) for path, own in store.hierarchy.groups.items()}
    for path, expected in nodes.items():
        key = f"{path}/{NODE_DOCUMENT}"
        if _read_node(store.root / key, key) != expected:
            yield Damage(key, None, "it is missing or contradicts the root's metadata")


def _read_node(path: Path, key: str) -> object:
    """A node's document; None when there is none, or what lies there is no regular file."""
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_DOCUMENT_BYTES:
            return None
        return parse_json(path.read_bytes(), key)
    except (OSError, StoreError):
        return None


def unlisted(store: PackedStore) -> Iterator[Damage]:
    """Files in the directory that no manifest entry explains, but for the foreign ones."""
    for key in _unexplained(store):
        if not is_foreign(key):
            problem = "the file belongs to nothing in the store: move it away"
            yield Damage(key, None, problem, repairable=False)


def foreign(store: PackedStore) -> list[str]:
    """Keys of files in the directory that are not the store's and cannot be taken for it."""
    return [key for key in _unexplained(store) if is_foreign(key)]


def is_foreign(key: str) -> bool:
    """Whether a file that is not the store's may lie there: a hub, git or a desktop put it there.

    At the root these are names that begin with '.' (and all in such folders), `README*` and
    `LICENSE*`; a `.DS_Store` anywhere. No node and no asset can have such a path.
    """
    top, _, below = key.partition("/")
    if top.startswith(".") or key.rpartition("/")[2] == ".DS_Store":
        return True
    return not below and top.startswith(("README", "LICENSE"))


def _unexplained(store: PackedStore) -> Iterator[str]:
    nodes = (*store.hierarchy.arrays, *store.hierarchy.groups)
    expected = {file.key for file in store.files_under(None)}
    expected |= {f"{path}/{NODE_DOCUMENT}" for path in nodes}
    expected |= {NODE_DOCUMENT, MARKER, PART_MARKER, JOURNAL, LOCK}
    for key in walk(store.root):
        if key not in expected:
            yield key


def walk(root: Path) -> Iterator[str]:
    """Keys (relative, with '/') of everything below `root` that is no directory, folder by folder.

    Symbolic links are reported, not followed.
    """
    base = os.fspath(root)
    folders = [""]
    while folders:
        prefix = folders.pop()
        with os.scandir(f"{base}/{prefix}") as entries:
            found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
        yield from (prefix + name for name, is_directory in found if not is_directory)
        folders += [f"{prefix}{name}/" for name, is_directory in found if is_directory]


def check_root(store: PackedStore) -> str:
    """The Merkle root recomputed from manifest, nodes and files.

    Raises StoreError when it is not the one the manifest claims.
    """
    nodes = descriptions(store.whole.groups, store.whole.arrays)
    found = content_root(store.manifest, nodes, store.records)
    if found != store.manifest["root"]:
        raise StoreError(
            f"{store.root}: the content has root {found}, the manifest claims "
            f"{store.manifest['root']}; the metadata was altered"
        )
    return found
