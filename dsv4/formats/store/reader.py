"""Opening a packed store: one metadata document, validated once, then trusted.

`PackedStore.open` reads two small files (the marker and the root's `zarr.json`), refuses whatever
it cannot explain, checks the size of every data file, and maps nothing. Weights are mapped when
they are first asked for, and verified chunk by chunk as they are touched.

Needs only the standard library, numpy, torch and xxhash.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dsv4.formats.config import ModelConfig
from dsv4.formats.errors import ConfigError, StoreError
from dsv4.formats.matrices import Fp8Matrix, Matrix, Nvfp4Matrix
from dsv4.formats.store import digest, integrity
from dsv4.formats.store.contents import Contents, QuantizedGroup, read_contents
from dsv4.formats.store.hierarchy import MAX_DOCUMENT_BYTES, Hierarchy, parse_json, parse_root
from dsv4.formats.store.manifest import (
    FileRecord,
    check_manifest,
    expected_files,
    is_hash,
    parse_records,
)
from dsv4.formats.store.mapped import MappedFile, StoredArray
from dsv4.formats.store.schema import (
    ASSET_DIRECTORY,
    FORMAT_VERSION,
    JOURNAL,
    MARKER,
    NODE_DOCUMENT,
    FileSpec,
    path_of,
)

_MAX_MARKER_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class ExpertStack:
    """The routed experts of one layer. Every matrix is a zero-copy view of the mapped files."""

    w13_stack: Stack
    w2_stack: Stack

    def __len__(self) -> int:
        """Number of experts."""
        return self.w13_stack.group.experts or 0

    @property
    def interleave(self) -> int:
        """Rows of gate and then of up that alternate in w13; 0: all of gate's come first."""
        return self.w13_stack.group.interleave

    def w13(self, expert: int) -> Matrix:
        """Gate and up projection of `expert`: `[2I, D]`, see `interleave`."""
        return self.w13_stack.matrix(expert)

    def w2(self, expert: int) -> Matrix:
        """Down projection of `expert`: `[D, I]`."""
        return self.w2_stack.matrix(expert)


@dataclasses.dataclass(frozen=True)
class Stack:
    """One expert stack with its arrays; `scales` is None when it is unquantised."""

    group: QuantizedGroup
    weights: StoredArray
    scales: StoredArray | None
    global_scale: Tensor | None

    def matrix(self, expert: int) -> Matrix:
        """The operand of one expert, zero-copy."""
        group, weights = self.group, self.weights.row(expert)
        if self.scales is None:
            return weights.squeeze(0)
        scales = self.scales.row(expert)
        if self.global_scale is None:
            return Fp8Matrix(weights, scales.squeeze(0), group.packed_rows, group.cols)
        return _nvfp4(group, weights, scales, self.global_scale[expert])


class PackedStore:
    """An open packed store. Make one with `PackedStore.open`.

    root: its directory. hierarchy: all nodes. contents: what they mean. records: the manifest's
    entry of every file. config: the model. assets: name -> path of the files that travel along.
    """

    def __init__(self, root: Path, hierarchy: Hierarchy, *, verify: bool) -> None:
        """Interpret a parsed hierarchy; raises as `open`, touches no data file."""
        check_manifest(hierarchy.manifest)
        self.root = root
        self.hierarchy = hierarchy
        self._files = {f.key: f for f in expected_files(hierarchy.arrays, hierarchy.manifest)}
        self.records: Mapping[str, FileRecord] = parse_records(
            list(self._files.values()), hierarchy.manifest
        )
        self.contents: Contents = read_contents(hierarchy)
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
        Raises StoreError when the store is unfinished, damaged, of another format version, or its
        metadata is malformed.
        """
        root = Path(path)
        try:
            with collector_paused():
                return cls._open(root, verify=verify, check_files=check_files)
        except StoreError as error:
            raise StoreError(f"{root}: {error}") from error.__cause__

    @classmethod
    def _open(cls, root: Path, *, verify: bool, check_files: bool) -> PackedStore:
        marker = _read_marker(root)
        raw = _read_document(root / NODE_DOCUMENT, MAX_DOCUMENT_BYTES)
        if hashlib.sha256(raw).hexdigest() != marker["metadata_sha256"]:
            raise StoreError(f"{NODE_DOCUMENT} is not what {MARKER} pins: one of them was altered")
        store = cls(root, parse_root(raw), verify=verify)
        if store.manifest.get("root") != marker["root"]:
            raise StoreError(
                f"{MARKER} claims root {marker['root']}, the manifest "
                f"{store.manifest.get('root')!r}; the store was altered"
            )
        if check_files:
            _refuse_damage(integrity.sizes(root, store._files.values()))
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

    def tensor(self, name: str) -> Tensor:
        """The unquantised tensor of hub name `name`, in its logical shape.

        Raises StoreError when it is not stored or is quantised.
        """
        if name in self.contents.matrices:
            kind = self.contents.matrices[name].format
            raise StoreError(f"{self.root}: tensor {name} is quantised ({kind}); ask for matrix()")
        if name not in self.contents.plain:
            raise StoreError(f"{self.root}: there is no tensor {name!r}")
        return self.array(self.contents.plain[name]).tensor()

    def matrix(self, name: str) -> Matrix:
        """The weight operand of hub name `name`, quantised or not, as kernels read it.

        Two projections stored with interleaved rows give the same matrix for either name.
        Raises StoreError when it is not stored.
        """
        group = self.contents.matrices.get(name)
        if group is None:
            return self.tensor(name)
        codes = self.array(f"{group.path}/codes").slabs()
        scales = self.array(f"{group.path}/scales")
        if group.format == "fp8":
            return Fp8Matrix(codes, scales.tensor(), group.rows, group.cols)
        return _nvfp4(
            group, codes, scales.slabs(), self.array(f"{group.path}/global_scale").tensor()
        )

    def experts(self, prefix: str) -> ExpertStack:
        """The expert stack of hub prefix `prefix`, e.g. `layers.0.ffn.experts`.

        Raises StoreError when there is none.
        """
        path = path_of(prefix, StoreError)
        groups = [self.contents.stacks.get(f"{path}/{name}") for name in ("w13", "w2")]
        w13, w2 = groups
        if w13 is None or w2 is None:
            raise StoreError(f"{self.root}: there is no stack of experts {prefix!r}")
        if w13.experts != w2.experts or (len(w13.names), len(w2.names)) != (2, 1):
            raise StoreError(
                f"{self.root}: experts {prefix!r} have {w13.experts} w13 of {len(w13.names)} "
                f"projections and {w2.experts} w2 of {len(w2.names)}, expected as many, 2 and 1"
            )
        return ExpertStack(self.stack(w13), self.stack(w2))

    def stack(self, group: QuantizedGroup) -> Stack:
        """The expert stack `group` (one of `contents.stacks`), ready to hand out matrices."""
        path, format = group.path, group.format
        return Stack(
            group,
            self.array(f"{path}/{group.weights}"),
            None if format == "plain" else self.array(f"{path}/scales"),
            self.array(f"{path}/global_scale").tensor() if format == "nvfp4" else None,
        )

    def verify(self, path: str | None = None) -> None:
        """Hash every chunk under `path` (array, group or file); None: of the whole store.

        Raises StoreError naming the first faulty file and chunk. With None, files that belong to
        nothing and altered node documents are refused as well. `integrity.damage` lists all.
        """
        try:
            _refuse_damage(integrity.damage(self, path))
        except StoreError as error:
            raise StoreError(f"{self.root}: {error}") from None

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
            if link := integrity.symbolic_link(self.root, directory, self._real_directories):
                raise StoreError(f"{self.root}: {link} is a symbolic link, expected a directory")
            mapped = MappedFile(self.root, file, self.chunk_digests(file.key), verify=self._verify)
            if keep:
                self._mapped[file.key] = mapped
        return mapped

    def forget(self) -> None:
        """Let go of all mappings; tensors handed out keep theirs, the next use maps again."""
        self._mapped.clear()


def _nvfp4(
    group: QuantizedGroup, codes: Tensor, scales: Tensor, global_scale: Tensor
) -> Nvfp4Matrix:
    return Nvfp4Matrix(
        codes=codes,
        scales=scales.view(codes.dtype),
        global_scales=global_scale,
        rows=group.packed_rows,
        cols=group.cols,
        interleave=group.interleave,
    )


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


def _refuse_damage(faults: Iterable[integrity.Damage]) -> None:
    first = next(iter(faults), None)
    if first is not None:
        raise StoreError(f"{first}; convert the source again")


def _read_marker(root: Path) -> dict[str, str]:
    """-> `root` and `metadata_sha256` of the marker file, both SHA-256 in hex."""
    if not (root / MARKER).exists():
        if (root / JOURNAL).exists():
            raise StoreError(
                f"the conversion is unfinished ({MARKER} is missing); run the same "
                "`dsv4 convert` again to finish it"
            )
        raise StoreError(f"this is no packed checkpoint ({MARKER} is missing)")
    marker = parse_json(_read_document(root / MARKER, _MAX_MARKER_BYTES), MARKER)
    if not isinstance(marker, dict):
        raise StoreError(f"{MARKER} is malformed")
    version = marker.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise StoreError(
            f"the store has format version {version!r}, this dsv4 reads version {FORMAT_VERSION}; "
            "convert the source again or use the dsv4 that wrote it"
        )
    if not is_hash(marker.get("root")) or not is_hash(marker.get("metadata_sha256")):
        raise StoreError(f"{MARKER} is malformed")
    return marker


def _read_document(path: Path, limit: int) -> bytes:
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise StoreError(f"{path.name} is no regular file of at most {limit} bytes")
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path.name} cannot be read: {error.strerror}") from error


def _read_config(raw: Mapping[str, Any]) -> ModelConfig:
    try:
        return ModelConfig.from_dict(raw)
    except (ConfigError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise StoreError(f"manifest: {error}") from None
