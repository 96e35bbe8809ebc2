"""Finding damage: files that are missing, short, long, altered or unlisted, and a false root.

`sizes` is what every open costs (one lstat a file), `symbolic_link` what the first use of a file
costs besides its checksums; `damage` reads every byte; `check_root` recomputes the Merkle root
from the metadata alone.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dsv4.formats.errors import StoreError
from dsv4.formats.store import digest
from dsv4.formats.store.hierarchy import (
    MAX_DOCUMENT_BYTES,
    array_document,
    descriptions,
    group_document,
    parse_json,
)
from dsv4.formats.store.manifest import content_root
from dsv4.formats.store.schema import JOURNAL, LOCK, MARKER, NODE_DOCUMENT, FileSpec

if TYPE_CHECKING:
    from dsv4.formats.store.reader import PackedStore


@dataclasses.dataclass(frozen=True)
class Damage:
    """One fault of a file. chunk: its index, or None when the whole file is concerned."""

    key: str
    chunk: int | None
    problem: str

    def __str__(self) -> str:
        where = self.key if self.chunk is None else f"{self.key}, chunk {self.chunk}"
        return f"{where}: {self.problem}"


def sizes(root: Path, files: Iterable[FileSpec]) -> Iterator[Damage]:
    """Files that are missing, of another size, or no regular files (such as symbolic links)."""
    base = os.fspath(root)
    for file in files:
        try:
            status = os.lstat(f"{base}/{file.key}")
        except (FileNotFoundError, NotADirectoryError):
            yield Damage(file.key, None, "the file is missing")
            continue
        regular = stat.S_ISREG(status.st_mode)
        if regular and status.st_size == file.nbytes:
            continue
        if not regular:
            yield Damage(file.key, None, "it is no regular file")
        else:
            found = f"the file has {status.st_size} bytes, expected {file.nbytes}"
            yield Damage(file.key, None, found)


def symbolic_link(root: Path, directory: str, real: set[str]) -> str | None:
    """The outermost symbolic link on the way from `root` to `directory` below it, or None.

    real: directories known to be none; grows.
    """
    if not directory or directory in real:
        return None
    parent = directory.rpartition("/")[0]
    if (above := symbolic_link(root, parent, real)) is not None:
        return above
    if (root / directory).is_symlink():
        return directory
    real.add(directory)
    return None


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
    """Files in the directory that no manifest entry explains."""
    nodes = (*store.hierarchy.arrays, *store.hierarchy.groups)
    expected = {file.key for file in store.files_under(None)}
    expected |= {f"{path}/{NODE_DOCUMENT}" for path in nodes}
    expected |= {NODE_DOCUMENT, MARKER, JOURNAL, LOCK}
    for key in walk(store.root):
        if key not in expected:
            yield Damage(key, None, "the file belongs to nothing in the store")


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
    nodes = descriptions(store.hierarchy.groups, store.hierarchy.arrays)
    found = content_root(store.manifest, nodes, store.records)
    if found != store.manifest["root"]:
        raise StoreError(
            f"{store.root}: the content has root {found}, the manifest claims "
            f"{store.manifest['root']}; the metadata was altered"
        )
    return found
