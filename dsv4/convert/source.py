"""Where a checkpoint's bytes come from: headers at once, tensors on demand.

A source is opened once: the index, every header and config.json are read and checked. After that
it only hands out byte ranges as tensors, each read with `pread` into memory of its own, so peak
memory is what the caller holds. Nothing of a checkpoint is ever executed, and no name from inside
it becomes a path: shard names are checked to be plain file names of the same directory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dsv4.formats.errors import FormatError, SourceError
from dsv4.formats.safetensors_header import (
    LENGTH_BYTES,
    TensorEntry,
    header_length,
    read_header,
)

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
MAX_CONFIG_BYTES = 1 << 24
MAX_INDEX_BYTES = 1 << 29  # Pro's index of 145,116 tensors takes 12 MB
HASH_THREADS = 4
SAMPLE_BYTES = 1 << 16

AUX_FILES = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "LICENSE-CODE",
    "LICENSE-MODEL",
    "NOTICE",
)

TORCH_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}

_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_NUMBERED = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.safetensors")


class Source(Protocol):
    """A checkpoint that can be planned from its headers and read tensor by tensor.

    Reads may come from several threads at once.
    """

    @property
    def config(self) -> dict[str, Any]:
        """The parsed config.json."""

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Every tensor of every file, by name."""

    def read(self, entry: TensorEntry) -> Tensor:
        """The tensor in its own dtype and shape, in memory of its own. Raises SourceError."""

    def read_rows(self, entry: TensorEntry, start: int, stop: int) -> Tensor:
        """Rows `[start, stop)` along the first dimension. Raises SourceError or FormatError."""

    def fingerprint(self) -> str:
        """A cheap identity (headers, sizes, samples) that tells whether a resume is the same."""

    def description(self) -> dict[str, Any]:
        """Provenance for the manifest: the same on every machine, with sha256 of every file."""

    def aux_files(self) -> Mapping[str, Path]:
        """Files that travel along (tokenizer, configs, licences), by name."""


class LocalSource:
    """A checkpoint in a local directory: a download, or a snapshot in the hub's cache.

    Raises SourceError when the directory, config.json, the index or any header is not in order.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        if not self._directory.is_dir():
            raise SourceError(f"{self._directory} is not a directory; give a checkpoint's")
        self.config: dict[str, Any] = _load_json(self._path(CONFIG_FILE), MAX_CONFIG_BYTES)
        index = self._directory / INDEX_FILE
        weight_map = _weight_map(index) if index.exists() else None
        names = _listed_files(weight_map) if weight_map is not None else self._found_files()
        missing = [name for name in names if not (self._directory / name).exists()]
        if missing:
            raise SourceError(
                f"{self._directory}: {len(missing)} of {len(names)} safetensors files are missing "
                f"({_first(missing)}); download them"
            )
        self._sizes = {name: self._path(name).stat().st_size for name in names}
        self.entries: Mapping[str, TensorEntry] = _merge([self._header(name) for name in names])
        if weight_map is not None:
            _check_weight_map(weight_map, self.entries)
        self._sha256: dict[str, str] = {}

    def read(self, entry: TensorEntry) -> Tensor:
        """The tensor in its own dtype and shape, in memory of its own. Raises SourceError."""
        out = torch.empty(entry.shape, dtype=_torch_dtype(entry))
        self._pread(entry, entry.begin, out)
        return out

    def read_rows(self, entry: TensorEntry, start: int, stop: int) -> Tensor:
        """Rows `[start, stop)` along the first dimension, `[stop - start, ...]`.

        Raises SourceError, or FormatError when there are no such rows.
        """
        if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            raise FormatError(
                f"{entry.name} has shape {list(entry.shape)}, which has no rows {start}:{stop}"
            )
        out = torch.empty((stop - start, *entry.shape[1:]), dtype=_torch_dtype(entry))
        row_bytes = math.prod(entry.shape[1:]) * out.element_size()
        self._pread(entry, entry.begin + start * row_bytes, out)
        return out

    def file_sha256(self, name: str) -> str:
        """SHA-256 of one file of the checkpoint in hex; computed when first asked for."""
        if name not in self._sha256:
            with self._path(name).open("rb") as file:
                self._sha256[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._sha256[name]

    def fingerprint(self) -> str:
        """A cheap identity: of each file its name, its size, its head, middle and tail."""
        digest = hashlib.sha256()
        for name in self._files():
            with self._path(name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{name}\0{size}\0".encode())
                if name in self._sizes:
                    prefix = file.read(LENGTH_BYTES)
                    digest.update(prefix + file.read(header_length(prefix, size, name)))
                for at in (0, size // 2, max(size - SAMPLE_BYTES, 0)):
                    file.seek(at)
                    digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()

    def description(self) -> dict[str, Any]:
        """`{"kind": "local", "files": [{"name", "bytes", "sha256"}]}`; reads every file once."""
        names = self._files()
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            hashes = list(pool.map(self.file_sha256, names))
        return {
            "kind": "local",
            "files": [
                {"name": name, "bytes": self._path(name).stat().st_size, "sha256": sha256}
                for name, sha256 in zip(names, hashes, strict=True)
            ],
        }

    def aux_files(self) -> Mapping[str, Path]:
        """Tokenizer, configs and licences that are present, by name; a fixed list of names."""
        return {name: self._path(name) for name in AUX_FILES if (self._directory / name).exists()}

    def _files(self) -> list[str]:
        """Everything the output depends on: the shards sorted by name, then the other files.

        Lineage counts the shards from 0, so nothing may come before them.
        """
        return [*sorted(self._sizes), *sorted(self.aux_files())]

    def _path(self, name: str) -> Path:
        """The regular file `name` (links are followed: the hub's cache is made of them)."""
        path = self._directory / name
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            raise SourceError(f"{self._directory} has no {name}; download it again") from None
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}") from None
        if not stat.S_ISREG(mode):
            raise SourceError(f"{path} is not a regular file")
        return path

    def _header(self, name: str) -> dict[str, TensorEntry]:
        try:
            return read_header(self._path(name))
        except OSError as error:
            raise SourceError(f"{name} cannot be read: {error.strerror}") from None

    def _found_files(self) -> list[str]:
        """Without an index: every safetensors file, of which numbered ones must be complete."""
        names = sorted(path.name for path in self._directory.glob("*.safetensors"))
        if not names:
            raise SourceError(
                f"{self._directory} has no safetensors files and no {INDEX_FILE}; give the "
                "directory of a checkpoint"
            )
        for match in filter(None, map(_NUMBERED.fullmatch, names)):
            parts = int(match["parts"])
            for part in range(1, parts + 1):
                sibling = f"{match['stem']}-{part:05d}-of-{parts:05d}.safetensors"
                if sibling not in names:
                    raise SourceError(f"{self._directory} has no {sibling}; download it")
        return names

    def _pread(self, entry: TensorEntry, position: int, out: Tensor) -> None:
        view = out.reshape(-1).view(torch.uint8).numpy().data
        try:
            fd = os.open(self._path(entry.file), os.O_RDONLY | os.O_CLOEXEC)
            try:
                size = os.fstat(fd).st_size
                if size != self._sizes[entry.file]:
                    raise SourceError(
                        f"{entry.file} is {size} bytes long, but was {self._sizes[entry.file]} "
                        "when it was opened; do not change a checkpoint while it is read"
                    )
                while view:
                    count = os.preadv(fd, [view], position)
                    if not count:
                        raise SourceError(f"{entry.file} ended while {entry.name} was read")
                    view, position = view[count:], position + count
            finally:
                os.close(fd)
        except OSError as error:
            raise SourceError(f"{entry.file}: {entry.name} cannot be read: {error}") from error


def _torch_dtype(entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in TORCH_DTYPES:
        raise SourceError(
            f"{entry.file}: {entry.name} is {entry.dtype}, expected one of {sorted(TORCH_DTYPES)}"
        )
    return TORCH_DTYPES[entry.dtype]


def _first(names: Sequence[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


def _load_json(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object with unique keys. Raises SourceError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice in one object")
        return found

    if path.stat().st_size > limit:
        raise SourceError(f"{path} is larger than {limit} bytes, which no real one is")
    try:
        value = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{path} is a JSON {type(value).__name__}, expected an object")
    return value


def _weight_map(index: Path) -> dict[str, str]:
    """The index's map from tensor name to file name; its metadata is often stale and ignored."""
    weight_map = _load_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index} has no weight_map from tensor names to file names")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise SourceError(
                f"{index}: tensor {tensor[:256]!r} is said to be in {name!r:.256}, expected the "
                "plain name of a .safetensors file in the same directory"
            )
    return weight_map


def _listed_files(weight_map: Mapping[str, str]) -> list[str]:
    return sorted(set(weight_map.values()))


def _merge(headers: Sequence[Mapping[str, TensorEntry]]) -> dict[str, TensorEntry]:
    merged: dict[str, TensorEntry] = {}
    for header in headers:
        for name, entry in header.items():
            if name in merged:
                raise SourceError(
                    f"tensor {name} is in {merged[name].file} and in {entry.file}; "
                    "remove the file that does not belong to this checkpoint"
                )
            merged[name] = entry
    return merged


def _check_weight_map(weight_map: Mapping[str, str], entries: Mapping[str, TensorEntry]) -> None:
    """The index and the headers name the same tensors in the same files."""
    for name, file in weight_map.items():
        if name not in entries or entries[name].file != file:
            found = f"it is in {entries[name].file}" if name in entries else "no file has it"
            raise SourceError(
                f"{INDEX_FILE} puts tensor {name[:256]!r} in {file}, but {found}; download both "
                "again"
            )
    if unlisted := [name for name in entries if name not in weight_map]:
        raise SourceError(
            f"{len(unlisted)} tensors are in no entry of {INDEX_FILE} ({_first(unlisted)}); "
            "download the index again"
        )
