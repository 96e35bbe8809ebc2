"""The manifest: the root group's `dsv4` attribute, which says what the store is and pins it.

    {"format_version": 3, "tool": …, "config": {…}, "recipe": {"name", "keep": [glob, …]},
     "source": {"files": [{"name", "bytes", "sha256"}, …]},
     "origin": {"kind": "local"} | {"kind": "hub", "repo", "commit"} | {"kind": "synthetic"},
     "layouts": {layout id: {parameters}}, …any further section…,
     "files": {key: {"bytes", "blake3", "chunk_bytes", "xxh3"}}, "root": hex}

The root covers one leaf per section (without `files`, `root` and `origin`), per node and per file,
so it is one name for every byte that matters; it depends on nothing but the content. Whoever packs
the same files of a source by the same recipe and tool gets the same root, from the hub or from a
folder. The files count by name, size and SHA-256, the recipe's globs as they were given, sorted and
without repetition.

The origin says where those files came from. Its form is checked when a store is opened, and the
marker's hash notices a change that leaves the marker alone; beyond that nobody vouches for it, and
nothing depends on it: `dsv4 repair` looks there for a source, and takes of it only what gives the
bytes that the root pins. In version 2 the origin stood in `source`, and the root covered it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from dsv4.formats.errors import Dsv4Error, StoreError
from dsv4.formats.store import digest
from dsv4.formats.store.specs import (
    ASSET_DIRECTORY,
    KNOWN_LAYOUTS,
    READ_VERSIONS,
    ArraySpec,
    FileSpec,
    asset_key,
)

REQUIRED_SECTIONS = ("config", "layouts", "recipe", "source", "tool")
_UNPINNED = ("files", "root", "origin")
"""What the root is computed from in another form, the root itself, and what it leaves open."""
_ORIGIN_KEYS = {"local": (), "synthetic": (), "hub": ("repo", "commit")}
_HEX_HASH = re.compile(r"[0-9a-f]{64}")
_HEX_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
_SIZE_LIMIT = 1 << 63
_RECORD_KEYS = {"bytes", "blake3", "chunk_bytes", "xxh3"}


class FileRecord(NamedTuple):
    """What the manifest and the journal say of one file.

    blake3: of all its bytes, in hex. xxh3: base64 of the little-endian XXH3-64 digests, one per
    chunk of the payload.
    """

    nbytes: int
    blake3: str
    chunk_nbytes: int
    xxh3: str

    def to_json(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        return {
            "bytes": self.nbytes,
            "blake3": self.blake3,
            "chunk_bytes": self.chunk_nbytes,
            "xxh3": self.xxh3,
        }

    @classmethod
    def from_json(cls, key: str, raw: Any) -> FileRecord:
        """The inverse of `to_json`. Raises StoreError naming `key` when a field is malformed."""
        if not isinstance(raw, dict) or raw.keys() != _RECORD_KEYS:
            raise StoreError(f"manifest: the entry of file {key} is malformed")
        record = cls(raw["bytes"], raw["blake3"], raw["chunk_bytes"], raw["xxh3"])
        for size in (record.nbytes, record.chunk_nbytes):
            if type(size) is not int or not 0 <= size < _SIZE_LIMIT:
                raise StoreError(f"manifest: file {key} has size {size!r}, expected an integer")
        if not is_hash(record.blake3) or not isinstance(record.xxh3, str):
            raise StoreError(f"manifest: file {key} has malformed checksums")
        return record


def is_hash(value: object) -> bool:
    """Whether `value` is a SHA-256 or a BLAKE3, 32 bytes in lower-case hex."""
    return isinstance(value, str) and _HEX_HASH.fullmatch(value) is not None


def content_root(
    manifest: Mapping[str, Any],
    nodes: Mapping[str, Mapping[str, Any]],
    files: Mapping[str, FileRecord],
) -> str:
    """The Merkle root (hex) of a store: manifest sections, node descriptions, files.

    nodes: path -> description (see `hierarchy.descriptions`). Keys `files` and `root` of
    `manifest` are ignored, and so is `origin` from version 3 on. A leaf is canonical JSON of
    [kind, name, content], sorted by kind, name.
    """
    unpinned = _UNPINNED if manifest.get("format_version") != 2 else _UNPINNED[:2]
    leaves = [["file", key, record.to_json()] for key, record in files.items()]
    leaves += [["node", path, dict(description)] for path, description in nodes.items()]
    leaves += [["section", k, value] for k, value in manifest.items() if k not in unpinned]
    leaves.sort(key=lambda leaf: (leaf[0], leaf[1]))
    return digest.merkle_root([digest.canonical_json(leaf) for leaf in leaves]).hex()


def check_manifest(manifest: Any) -> None:
    """Raise StoreError unless the sections other than `files` and `root` can be understood."""
    if not isinstance(manifest, dict):
        raise StoreError("the root group has no dsv4 manifest; this is not a packed checkpoint")
    version = check_version(manifest.get("format_version"))
    if missing := [name for name in REQUIRED_SECTIONS if name not in manifest]:
        raise StoreError(f"manifest: sections {missing} are missing")
    for name in ("config", "layouts", "source"):
        if not isinstance(manifest[name], dict):
            raise StoreError(f"manifest: {name} is not a JSON object")
    _check_origin(manifest, version)
    _check_making(manifest)
    if unknown := sorted(set(manifest["layouts"]) - KNOWN_LAYOUTS):
        raise StoreError(
            f"the store uses layouts {unknown}, this dsv4 knows {sorted(KNOWN_LAYOUTS)}; "
            "use the dsv4 that wrote it"
        )


def check_version(version: object) -> int:
    """-> `version`. Raises StoreError unless it is one that this dsv4 reads."""
    if type(version) is not int or version not in READ_VERSIONS:
        raise StoreError(
            f"the store has format version {version!r}, this dsv4 reads versions "
            f"{' and '.join(map(str, READ_VERSIONS))}; convert the source again or use the dsv4 "
            "that wrote it"
        )
    return version


def origin_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Where the source's files came from: `kind`, and of the hub `repo` and `commit`."""
    if manifest.get("format_version") != 2:
        return dict(manifest["origin"])
    source = manifest["source"]
    return {key: source[key] for key in ("kind", *_ORIGIN_KEYS["hub"]) if key in source}


def _check_origin(manifest: Mapping[str, Any], version: int) -> None:
    """Raise StoreError unless the origin is one of the three that the module names.

    repo: `org/name`. commit: 40 hex digits, so that the bytes can be found again. The source of
    version 3 must not hold one as well: the root would depend on it again.
    """
    found = origin_of(manifest) if version == 2 else manifest.get("origin")
    kind = found.get("kind") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(kind, str) or kind not in _ORIGIN_KEYS:
        raise StoreError(f"manifest: origin is {found!r:.80}, expected a kind such as local or hub")
    if version > 2 and manifest["source"].keys() != {"files"}:
        raise StoreError("manifest: source has other members than files")
    for key, pattern in (("repo", _HUB_ID), ("commit", _HEX_COMMIT)) if kind == "hub" else ():
        if not isinstance(value := found.get(key), str) or not pattern.fullmatch(value):
            raise StoreError(
                f"manifest: origin has the {key} {value!r:.80}, which is none of a hub"
            )
    if version > 2 and found.keys() != {"kind", *_ORIGIN_KEYS[kind]}:
        raise StoreError(f"manifest: origin has members {sorted(found)} of kind {kind}")


def _check_making(manifest: Mapping[str, Any]) -> None:
    """Raise StoreError unless recipe, tool and source have their form and can be shown."""
    tool, recipe, files = manifest["tool"], manifest["recipe"], manifest["source"].get("files", [])
    own = recipe if isinstance(recipe, dict) else {}
    keep = own.get("keep")
    if not isinstance(keep, list) or not all(map(_is_shown, (own.get("name"), *keep))):
        raise StoreError(
            f"manifest: recipe is {recipe!r:.80}, expected a name and a list of globs to keep, all "
            "of them printable text"
        )
    if not _is_shown(tool):
        raise StoreError(f"manifest: tool is {tool!r:.80}, expected a line of printable text")
    for file in files if isinstance(files, list) else [files]:
        known = isinstance(file, dict) and is_hash(file.get("sha256"))
        if not known or not _is_shown(file.get("name")):
            raise StoreError(
                f"manifest: source has the file {file!r:.80}, expected a printable name, bytes and "
                "sha256"
            )


def _is_shown(text: object) -> bool:
    return isinstance(text, str) and text.isprintable()


def expected_files(arrays: Mapping[str, ArraySpec], manifest: Mapping[str, Any]) -> list[FileSpec]:
    """Every file the store must have: those of its arrays, then the assets the manifest lists.

    Raises StoreError when `manifest["files"]` names other files or other sizes than these.
    """
    raw = manifest.get("files")
    if not isinstance(raw, dict):
        raise StoreError("manifest: files is no JSON object")
    asset_keys = sorted(key for key in raw if key.startswith(f"{ASSET_DIRECTORY}/"))
    count = sum(spec.file_count for spec in arrays.values()) + len(asset_keys)
    if count != len(raw):  # before enumerating: shapes are not to be trusted with memory
        raise StoreError(f"manifest: it lists {len(raw)} files, the arrays and assets have {count}")
    files = [file for spec in arrays.values() for file in spec.files()]
    if missing := [file.key for file in files if file.key not in raw]:
        raise StoreError(f"manifest: {len(missing)} files are not listed, first {missing[0]}")
    return files + [_asset_file(key, raw[key]) for key in asset_keys]


def parse_records(files: list[FileSpec], manifest: Mapping[str, Any]) -> dict[str, FileRecord]:
    """The manifest's entry of every file. Raises StoreError when one contradicts its FileSpec."""
    records = {}
    for file in files:
        record = FileRecord.from_json(file.key, manifest["files"][file.key])
        check_record(file, record)
        records[file.key] = record
    return records


def check_record(file: FileSpec, record: FileRecord) -> None:
    """Raise StoreError unless sizes and the number of digests are those of `file`."""
    found = (record.nbytes, record.chunk_nbytes, len(record.xxh3))
    expected = (file.nbytes, file.chunk_nbytes, digest.encoded_digests_length(file.chunks))
    if found != expected:
        raise StoreError(
            f"manifest: file {file.key} has (bytes, chunk bytes, length of digests) {found}, "
            f"expected {expected}"
        )


def asset_file(name: str, nbytes: int, error: type[Dsv4Error] | None = None) -> FileSpec:
    """The FileSpec of an asset: one chunk. Raises SourceError (or `error`) for a refused name."""
    try:
        key = asset_key(name)
    except Dsv4Error as refusal:
        raise (error or type(refusal))(str(refusal)) from None
    return FileSpec(key, rows=(0, 1), chunks=1, chunk_nbytes=nbytes, sharded=False)


def _asset_file(key: str, raw: Any) -> FileSpec:
    record = FileRecord.from_json(key, raw)
    return asset_file(key.removeprefix(f"{ASSET_DIRECTORY}/"), record.nbytes, StoreError)
