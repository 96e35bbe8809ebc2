"""Where a checkpoint's bytes come from: headers at once, tensors on demand, whole files as streams.

A source is opened once: the index, every header and config.json are read and checked. After that
it only hands out byte ranges, each read into memory of the caller's, so peak memory is what the
caller holds. Nothing of a checkpoint is ever executed, and no name from inside it becomes a path:
shard names are checked to be plain file names of the same directory.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from dsv4.formats.errors import FormatError, SourceError
from dsv4.formats.model.safetensors_header import TensorEntry

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
MAX_CONFIG_BYTES = 1 << 24
MAX_AUX_BYTES = 1 << 27  # the released tokenizer takes 8 MB
MAX_INDEX_BYTES = 1 << 29  # Pro's index of 145,116 tensors takes 12 MB

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
    "U16": torch.uint16,
    "U32": torch.uint32,
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


class ByteStream(Protocol):
    """A file from its first byte to its last, in order."""

    def readinto(self, view: memoryview) -> None:
        """Fill all of `view` with the bytes that come next. Raises SourceError."""


class Reader(abc.ABC):
    """Hands out tensors and rows of tensors; what a unit of work reads from."""

    def read(self, entry: TensorEntry) -> Tensor:
        """The tensor in its own dtype and shape, in memory of its own. Raises SourceError."""
        out = empty(entry)
        self.fill(entry, entry.begin, bytes_of(out))
        return out

    def read_rows(self, entry: TensorEntry, start: int, stop: int) -> Tensor:
        """Rows `[start, stop)` along the first dimension, `[stop - start, ...]`.

        Raises SourceError, or FormatError when there are no such rows.
        """
        check_rows(entry, start, stop)
        out = torch.empty((stop - start, *entry.shape[1:]), dtype=torch_dtype(entry))
        row_bytes = math.prod(entry.shape[1:]) * out.element_size()
        self.fill(entry, entry.begin + start * row_bytes, bytes_of(out))
        return out

    @abc.abstractmethod
    def fill(self, entry: TensorEntry, position: int, view: memoryview) -> None:
        """Fill `view` with bytes of the tensor's file from `position` on. Raises SourceError."""


class Source(Reader):
    """A checkpoint that can be planned from its headers and read range by range.

    config: the parsed config.json. entries: every tensor of every file, by name. sizes: bytes of
    every safetensors file, by name, sorted. commit: what a repository's revision is pinned to.
    origin: where the files come from, as the manifest records it beside their hashes.
    notices: sentences about files that are there and are not used. here: whether its files lie on
    this machine, so that thousands of small reads cost nothing. on_wait: told, in a sentence, when
    the network is waited for; from any thread, one at a time.
    Reads may come from several threads at once.
    """

    config: dict[str, Any]
    entries: Mapping[str, TensorEntry]
    sizes: Mapping[str, int]
    commit: str | None = None
    origin: Mapping[str, str] = MappingProxyType({"kind": "local"})
    notices: tuple[str, ...] = ()
    here: bool = False
    on_wait: Callable[[str], None] | None = None

    def fill(self, entry: TensorEntry, position: int, view: memoryview) -> None:
        """Fill `view` with bytes of the tensor's file from `position` on. Raises SourceError."""
        self.read_into(entry.file, position, view, entry.name)

    @abc.abstractmethod
    def read_into(self, file: str, position: int, view: memoryview, what: str) -> None:
        """Fill `view` with bytes of `file` from `position` on; `what` is named in a SourceError."""

    @abc.abstractmethod
    def stream(self, file: str) -> contextlib.AbstractContextManager[ByteStream]:
        """The whole file in order. Raises SourceError when it is not what was opened."""

    @abc.abstractmethod
    def aux_files(self) -> Mapping[str, bytes]:
        """Files that travel along (tokenizer, configs, licences), by name, sorted."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A cheap identity (no weights are read) that tells whether a resume is the same."""

    def description(self, sha256: Mapping[str, str]) -> dict[str, Any]:
        """The manifest's section `source`, the same wherever the same files come from.

        `{"files": [{"name", "bytes", "sha256"}]}`. sha256: of every safetensors file, in hex, as
        measured while it was read.
        """
        return {"files": describe_files(self.sizes, sha256, self.aux_files())}

    def published_sha256(self, file: str) -> str | None:
        """What the repository says the file's SHA-256 is; None where nobody says."""
        return None

    def remote_bytes(self, file: str) -> int:
        """Bytes of `file` that have to come over the network."""
        return 0

    def give_up(self) -> None:
        """Readings in other threads fail soon instead of waiting for a network."""
        return


def empty(entry: TensorEntry) -> Tensor:
    """Uninitialised memory for the tensor. Raises SourceError for a dtype unknown to us."""
    return torch.empty(entry.shape, dtype=torch_dtype(entry))


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def torch_dtype(entry: TensorEntry) -> torch.dtype:
    """The torch dtype of a tensor. Raises SourceError for one unknown to us."""
    if entry.dtype not in TORCH_DTYPES:
        raise SourceError(
            f"{entry.file}: {entry.name} is {entry.dtype}, expected one of {sorted(TORCH_DTYPES)}"
        )
    return TORCH_DTYPES[entry.dtype]


def check_rows(entry: TensorEntry, start: int, stop: int) -> None:
    """Raise FormatError unless the tensor has the rows `[start, stop)`."""
    if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
        raise FormatError(
            f"{entry.name} has shape {list(entry.shape)}, which has no rows {start}:{stop}"
        )


def describe_files(
    sizes: Mapping[str, int], sha256: Mapping[str, str], aux: Mapping[str, bytes]
) -> list[dict[str, Any]]:
    """The manifest's list of source files: shards sorted by name, then what travels along.

    Lineage counts the shards from 0, so nothing may come before them.
    """
    shards = [{"name": n, "bytes": size, "sha256": sha256[n]} for n, size in sizes.items()]
    others = [
        {"name": n, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for n, data in aux.items()
    ]
    return [*shards, *others]
