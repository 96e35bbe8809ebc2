"""Opening a packed store: one metadata document, validated once, then trusted.

`PackedStore.open` reads two small files (the marker and the root's `zarr.json`; of a model with
DSpark the `config.json` it carries too), refuses whatever it cannot explain, checks the size of
every data file, and maps nothing. Weights are mapped when they are first asked for, and verified
chunk by chunk as they are touched.

Needs only the standard library, numpy, torch and xxhash.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv4.formats.errors import ConfigError, StoreError
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.store import digest
from dsv4.formats.store.damage import LINK_ADVICE, refuse, sizes, symbolic_link
from dsv4.formats.store.manifest import (
    FileRecord,
    check_manifest,
    check_version,
    expected_files,
    is_hash,
    parse_records,
)
from dsv4.formats.store.mapped_files import MappedFile, StoredArray
from dsv4.formats.store.matrix_views import StoredWeights
from dsv4.formats.store.nodes import Contents, read_contents
from dsv4.formats.store.parts import PART_MARKER, Absent, is_draft, read_absent, without
from dsv4.formats.store.specs import (
    ASSET_DIRECTORY,
    JOURNAL,
    MARKER,
    NODE_DOCUMENT,
    FileSpec,
)
from dsv4.formats.store.zarr_json import MAX_DOCUMENT_BYTES, Hierarchy, parse_json, parse_root
from dsv4.formats.store_place import refuse_no_store

MAX_MARKER_BYTES = 1 << 16
_MAX_CONFIG_BYTES = 1 << 20
_CONFIG = "config.json"


class PackedStore(StoredWeights):
    """An open packed store. Make one with `PackedStore.open`.

    root: its directory. hierarchy: all nodes. contents: what they mean. records: the manifest's
    entry of every file. config: the model. assets: name -> path of the files that travel along.
    absent: what a pull left out, if it did; nodes, contents and files are then those that are
    there. whole, records: what the manifest and its root speak of, absent or not.
    """

    def __init__(
        self, root: Path, hierarchy: Hierarchy, *, verify: bool, absent: Absent | None = None
    ) -> None:
        """Interpret a parsed hierarchy; raises as `open`, touches no data file."""
        check_manifest(hierarchy.manifest)
        self.root = root
        self.whole = self.hierarchy = hierarchy
        self.absent = absent
        self._files = {f.key: f for f in expected_files(hierarchy.arrays, hierarchy.manifest)}
        self.records: Mapping[str, FileRecord] = parse_records(
            list(self._files.values()), hierarchy.manifest
        )
        self.contents: Contents = read_contents(hierarchy)
        if absent is not None:
            self.hierarchy = without(hierarchy, absent)
            self.contents = read_contents(self.hierarchy)
            self._files = {key: f for key, f in self._files.items() if not is_draft(key)}
        self.config: ModelConfig = _read_config(hierarchy.manifest["config"])
        self._verify = verify
        self._mapped: dict[str, MappedFile] = {}
        self._arrays: dict[str, StoredArray] = {}
        self._real_directories: set[str] = set()

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, verify: bool = True, check_files: bool = True
    ) -> PackedStore:
        """Open the store in directory `path`; maps nothing.

        verify: compare every chunk with its checksum the first time it is used.
        check_files: refuse missing files and wrong sizes now (one lstat a file).
        Raises NoStoreError when there is no store at all, StoreError when it is unfinished,
        damaged, of another format version, or its metadata is malformed.
        """
        root = Path(path)
        refuse_no_store(root)
        try:
            with collector_paused():
                return cls._open(root, verify=verify, check_files=check_files)
        except StoreError as error:
            raise StoreError(f"{root}: {error}") from error.__cause__

    @classmethod
    def _open(cls, root: Path, *, verify: bool, check_files: bool) -> PackedStore:
        marker, partial = _read_marker(root)
        document = _read_document(root / NODE_DOCUMENT, MAX_DOCUMENT_BYTES)
        store = cls.interpret(root, marker, document, verify=verify, partial=partial)
        if check_files:
            refuse(root, sizes(root, store._files.values()))
        store.config = _with_draft(store.config, root)
        return store

    @classmethod
    def interpret(
        cls,
        root: Path,
        marker: bytes,
        document: bytes,
        *,
        verify: bool = True,
        partial: bool = False,
    ) -> PackedStore:
        """The store that these two small files describe, whether or not its others lie in `root`.

        marker, document: contents of `dsv4.complete`, or (partial) of `dsv4.partial`, and of the
        root's `zarr.json`. Raises StoreError when they do not belong together or are malformed.
        """
        pinned = _parse_marker(marker)
        if hashlib.sha256(document).hexdigest() != pinned["metadata_sha256"]:
            raise StoreError(f"{NODE_DOCUMENT} is not what {MARKER} pins: one of them was altered")
        absent = read_absent(pinned) if partial else None
        store = cls(root, parse_root(document), verify=verify, absent=absent)
        if store.manifest["format_version"] != pinned["format_version"]:
            raise StoreError(f"{MARKER} and {NODE_DOCUMENT} are of two format versions")
        if store.manifest.get("root") != pinned["root"]:
            raise StoreError(
                f"{MARKER} claims root {pinned['root']}, the manifest "
                f"{store.manifest.get('root')!r}; the store was altered"
            )
        return store

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The root group's `dsv4` attribute (see `manifest`)."""
        return self.hierarchy.manifest

    @property
    def assets(self) -> Mapping[str, Path]:
        """name -> path of tokenizer, generation config, licence and the like."""
        prefix = f"{ASSET_DIRECTORY}/"
        keys = (key for key in self._files if key.startswith(prefix))
        return {key.removeprefix(prefix): self.root / key for key in keys}

    def array(self, path: str) -> StoredArray:
        """The array at node path `path`. Raises StoreError when there is none."""
        if path not in self._arrays:
            spec = self.hierarchy.arrays.get(path)
            if spec is None:
                raise StoreError(f"{self.root}: there is no array {path!r}")
            self._arrays[path] = StoredArray(spec, self.map_file)
        return self._arrays[path]

    def files_under(self, path: str | None) -> list[FileSpec]:
        """Files of the array or group `path`, or the one file of that key; None: all files.

        Raises StoreError when there is none.
        """
        if path is None:
            return list(self._files.values())
        files = [f for key, f in self._files.items() if key == path or key.startswith(f"{path}/")]
        if not files:
            raise StoreError(f"{self.root}: nothing is stored under {path!r}")
        return files

    def chunk_digests(self, key: str) -> digest.Digests:
        """XXH3-64 of each chunk of file `key`: uint64 `[chunks]`, for loaders that read by range.

        Raises StoreError when the file is unknown or the manifest's digests are malformed.
        """
        if key not in self.records:
            raise StoreError(f"{self.root}: the manifest lists no file {key!r}")
        try:
            return digest.decode_digests(self.records[key].xxh3, self._files[key].chunks)
        except ValueError as error:
            raise StoreError(f"{self.root}: manifest: file {key}: {error}") from None

    def map_file(self, file: FileSpec, *, keep: bool = True) -> MappedFile:
        """The mapping of `file`, made on first use; `keep` it for the life of the store.

        Raises StoreError when it cannot be mapped, or a directory on its way is a symbolic link.
        """
        mapped = self._mapped.get(file.key)
        if mapped is None:
            directory = file.key.rpartition("/")[0]
            if link := symbolic_link(self.root, directory, self._real_directories):
                raise StoreError(f"{self.root}: {link} is a symbolic link, expected a directory")
            mapped = MappedFile(self.root, file, self.chunk_digests(file.key), verify=self._verify)
            if keep:
                self._mapped[file.key] = mapped
        return mapped

    def lacks(self, name: str) -> bool:
        """Whether the tensor of this hub name is one that a pull left out."""
        return self.absent is not None and is_draft(name.replace(".", "/"))

    def forget(self) -> None:
        """Let go of all mappings; tensors handed out keep theirs, the next use maps again."""
        self._mapped.clear()


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the garbage collector from walking 10^5 new JSON objects, none of them garbage."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _read_marker(root: Path) -> tuple[bytes, bool]:
    """-> (the marker, whether it is that of a store with parts left out)."""
    if not (root / MARKER).exists():
        if (root / PART_MARKER).exists():
            return _read_document(root / PART_MARKER, MAX_MARKER_BYTES), True
        if (root / JOURNAL).exists():
            raise StoreError(
                f"it is unfinished ({MARKER} is missing); run the same `dsv4 convert` or "
                "`dsv4 pull` again to finish it"
            )
        raise StoreError(
            f"{MARKER} is missing, so not all of it is here; remove the directory and run the same "
            "`dsv4 convert` or `dsv4 pull` again, or copy the store again"
        )
    return _read_document(root / MARKER, MAX_MARKER_BYTES), False


def _parse_marker(raw: bytes) -> dict[str, Any]:
    """-> the marker: `format_version`, and `root` and `metadata_sha256`, both SHA-256 in hex."""
    marker = parse_json(raw, MARKER)
    if not isinstance(marker, dict):
        raise StoreError(f"{MARKER} is malformed")
    check_version(marker.get("format_version"))
    if not is_hash(marker.get("root")) or not is_hash(marker.get("metadata_sha256")):
        raise StoreError(f"{MARKER} is malformed")
    return marker


def _read_document(path: Path, limit: int) -> bytes:
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            link = stat.S_ISLNK(status.st_mode)
            what = LINK_ADVICE if link else f"it is not a file of at most {limit} bytes"
            raise StoreError(f"{path.name}: {what}")
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path.name} cannot be read: {error.strerror}") from error


def _with_draft(config: ModelConfig, root: Path) -> ModelConfig:
    """Add what the store's config.json says of DSpark; nothing where it cannot be read.

    What is needed of it and absent is named where draft layers are loaded.
    """
    if config.dspark_markov_rank is None:
        return config
    with contextlib.suppress(StoreError, ConfigError):
        name = f"{ASSET_DIRECTORY}/{_CONFIG}"
        raw = parse_json(_read_document(root / name, _MAX_CONFIG_BYTES), name)
        return config.with_draft_of(raw if isinstance(raw, dict) else {})
    return config


def _read_config(raw: Mapping[str, Any]) -> ModelConfig:
    try:
        return ModelConfig.from_dict(raw)
    except (ConfigError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise StoreError(f"manifest: {error}") from None
