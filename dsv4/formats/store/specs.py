"""What a packed store is made of: arrays, the files that hold them, and the names they may have.

An array is cut twice. A *shard* is one file and covers whole rows of dimension 0. A *chunk* is the
unit of parallelism inside it: chunks follow each other in C order of the chunk grid, dense, so a
run of chunks is a contiguous byte range. After them stands the index that Zarr's sharding codec
asks for. An array that is one single chunk is a plain file of its C-order bytes, without an index.

    codes [256, 4096, 2048], shard [64, 4096, 2048], chunk [1, 512, 2048]
      -> 4 files c/0/0/0 … c/3/0/0 of 512 chunks of 1 MiB: expert 0 rows 0-511, rows 512-1023, …
    codes [4096, 4096], shard = shape, chunk [4096, 512]
      -> 1 file, physically [8 slabs][4096 rows][512 bytes]
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from dsv4.formats.errors import Dsv4Error, SourceError, StoreError
from dsv4.formats.store_place import JOURNAL as JOURNAL
from dsv4.formats.store_place import MARKER as MARKER
from dsv4.formats.store_place import NODE_DOCUMENT as NODE_DOCUMENT

FORMAT_VERSION = 3  # 2 had the origin inside of the source section, and so of the root
READ_VERSIONS = (2, 3)  # 1 had SHA-256 where files have BLAKE3
ATTRIBUTE = "dsv4"  # the one key under which every node keeps what is ours
ASSET_DIRECTORY = "assets"
LOCK = ".lock"
PARTIAL_SUFFIX = ".partial"

ALIGNMENT = 4096
"""Bytes of which units of parallelism, and where files begin in an arena, are multiples.

It is a page, and what reading past the page cache asks for.
"""

NVFP4_LAYOUT = "nvfp4.kmajor.sf32x4x4"
FP8_LAYOUT = "fp8.block128"
PLAIN_LAYOUT = "plain"
LAYOUT_OF = {"nvfp4": NVFP4_LAYOUT, "fp8": FP8_LAYOUT, "plain": PLAIN_LAYOUT}
KNOWN_LAYOUTS = frozenset(LAYOUT_OF.values())

MAX_RANK = 8
MAX_ARRAY_BYTES = 1 << 44
MAX_FILES_PER_ARRAY = 1 << 16
MAX_CHUNKS_PER_FILE = 1 << 24
MAX_PATH_LENGTH = 512
MAX_PATH_DEPTH = 16

INDEX_ENTRY_BYTES = 16  # little-endian uint64 (offset, nbytes) per chunk
INDEX_CHECKSUM_BYTES = 4  # crc32c of the entries


@dataclasses.dataclass(frozen=True)
class Element:
    """One kind of array element: how Zarr names its bytes and how torch reads them."""

    zarr: str
    nbytes: int
    torch: torch.dtype


ELEMENTS: Mapping[str, Element] = {
    "e2m1x2": Element("uint8", 1, torch.uint8),  # two FP4 codes, low nibble = even column
    "e4m3": Element("uint8", 1, torch.float8_e4m3fn),
    "e8m0": Element("uint8", 1, torch.float8_e8m0fnu),
    "uint8": Element("uint8", 1, torch.uint8),
    "bfloat16": Element("uint16", 2, torch.bfloat16),  # Zarr has no bfloat16
    "float32": Element("float32", 4, torch.float32),
    "int64": Element("int64", 8, torch.int64),
}

_PATH = re.compile(r"[A-Za-z0-9_]{1,64}(?:/[A-Za-z0-9_]{1,64})*")
_ASSET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class FileSpec(NamedTuple):
    """One file of an array: `chunks` chunks of `chunk_nbytes` bytes, then the index if sharded.

    key: path relative to the store's root. rows: the half-open range of dimension 0 it holds.
    """

    key: str
    rows: tuple[int, int]
    chunks: int
    chunk_nbytes: int
    sharded: bool

    @property
    def payload_nbytes(self) -> int:
        """Bytes of the chunks alone."""
        return self.chunks * self.chunk_nbytes

    @property
    def index_nbytes(self) -> int:
        """Bytes of the sharding index behind the payload; 0 for a plain file."""
        return self.chunks * INDEX_ENTRY_BYTES + INDEX_CHECKSUM_BYTES if self.sharded else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return self.payload_nbytes + self.index_nbytes


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """An array: node path, shape in elements, element kind, chunk and shard shape, attributes.

    `attributes` are the node's Zarr attributes without `dsv4.element`, which is `element`.
    Raises StoreError when chunk does not divide shard, shard does not divide shape, a shard
    splits another dimension than 0, or a size is beyond the format's limits.
    """

    path: str
    shape: tuple[int, ...]
    element: str
    chunk: tuple[int, ...]
    shard: tuple[int, ...]
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in ("shape", "chunk", "shard"):
            if type(getattr(self, field)) is not tuple:
                object.__setattr__(self, field, tuple(getattr(self, field)))
        check_path(self.path)
        _check_array(self)

    @classmethod
    def whole(
        cls,
        path: str,
        shape: tuple[int, ...],
        element: str,
        attributes: Mapping[str, Any] | None = None,
    ) -> ArraySpec:
        """An array that is one chunk in one plain file."""
        return cls(path, shape, element, shape, shape, attributes or {})

    @property
    def sharded(self) -> bool:
        """Whether its files carry a sharding index."""
        return self.chunk != self.shape

    @property
    def file_count(self) -> int:
        """Number of files (shards)."""
        return self.shape[0] // self.shard[0] if self.shape else 1

    @property
    def file_grid(self) -> tuple[int, ...]:
        """Chunks of one file along each dimension."""
        return tuple(s // c for s, c in zip(self.shard, self.chunk, strict=True))

    @property
    def c_order(self) -> bool:
        """Whether the chunks of a file, one after another, are its rows in C order."""
        cut = next((i for i, size in enumerate(self.chunk) if size > 1), len(self.chunk))
        return self.chunk[cut + 1 :] == self.shape[cut + 1 :]

    @property
    def row_addressable(self) -> bool:
        """Whether each index of dimension 0 is one contiguous byte range of one file."""
        return self.c_order or self.chunk[0] == 1

    @property
    def chunk_nbytes(self) -> int:
        """Bytes of one chunk."""
        return math.prod(self.chunk) * ELEMENTS[self.element].nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the payload of all files."""
        return math.prod(self.shape) * ELEMENTS[self.element].nbytes

    def files(self) -> tuple[FileSpec, ...]:
        """Its files in order of dimension 0."""
        chunks, chunk_nbytes = math.prod(self.file_grid), self.chunk_nbytes
        step = self.shard[0] if self.shape else 1
        tail = "/0" * (len(self.shape) - 1)
        return tuple(
            FileSpec(
                key=f"{self.path}/c/{index}{tail}" if self.shape else f"{self.path}/c",
                rows=(index * step, (index + 1) * step),
                chunks=chunks,
                chunk_nbytes=chunk_nbytes,
                sharded=self.sharded,
            )
            for index in range(self.file_count)
        )


def path_of(name: str, error: type[Dsv4Error] = SourceError) -> str:
    """The node path of a hub tensor name: `layers.2.attn.wq_b.weight` -> `layers/2/attn/…`.

    Raises `error` unless the name is dot-separated components of letters, digits and `_`.
    """
    path = name.replace(".", "/") if isinstance(name, str) else name
    if not isinstance(name, str) or "/" in name or (why := _path_fault(path)):
        why = "it is no dotted name" if not isinstance(name, str) or "/" in name else why
        raise error(
            f"tensor name {_quoted(name)} is refused: {why}; expected components of letters, "
            "digits and '_' separated by '.'"
        )
    return path


def group_of(name: str, error: type[Dsv4Error] = SourceError) -> str:
    """The node path of a quantised matrix: as `path_of`, without the last `.weight`."""
    return path_of(name.removesuffix(".weight") if isinstance(name, str) else name, error)


def check_path(path: str) -> None:
    """Raise StoreError unless `path` may be a node path."""
    why = _path_fault(path) if isinstance(path, str) else "it is no text"
    if why:
        raise StoreError(f"node path {_quoted(path)} is refused: {why}")


def asset_key(name: str) -> str:
    """The file key of asset `name`. Raises SourceError unless it is a harmless base name."""
    harmless = isinstance(name, str) and _ASSET.fullmatch(name) is not None
    if not harmless or name == NODE_DOCUMENT or name.endswith(PARTIAL_SUFFIX):
        raise SourceError(
            f"asset name {_quoted(name)} is refused, expected a base name of letters, digits, "
            "'.', '_' and '-' such as 'tokenizer.json'"
        )
    return f"{ASSET_DIRECTORY}/{name}"


def _path_fault(path: str) -> str | None:
    if len(path) > MAX_PATH_LENGTH:
        return f"it is longer than {MAX_PATH_LENGTH} characters"
    if not _PATH.fullmatch(path):
        return "a component is not 1 to 64 letters, digits or '_'"
    if path.count("/") >= MAX_PATH_DEPTH:
        return f"it has more than {MAX_PATH_DEPTH} components"
    if path.startswith(f"{ASSET_DIRECTORY}/") or path == ASSET_DIRECTORY:
        return f"'{ASSET_DIRECTORY}' is reserved"
    return None


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _check_array(spec: ArraySpec) -> None:
    what = f"array {spec.path}"
    if not isinstance(spec.element, str) or spec.element not in ELEMENTS:
        raise StoreError(
            f"{what}: element is {_quoted(spec.element)}, expected one of {sorted(ELEMENTS)}"
        )
    for field, dims in (("shape", spec.shape), ("shard", spec.shard), ("chunk", spec.chunk)):
        if dims and set(map(type, dims)) != {int}:
            raise StoreError(f"{what}: {field} is {_quoted(dims)}, expected integers")
    if fault := _geometry_fault(spec.shape, spec.shard, spec.chunk, ELEMENTS[spec.element].nbytes):
        raise StoreError(f"{what}: {fault}")


@functools.lru_cache(maxsize=4096)  # a model's layers share a few dozen geometries
def _geometry_fault(
    shape: tuple[int, ...], shard: tuple[int, ...], chunk: tuple[int, ...], element_nbytes: int
) -> str | None:
    for field, dims in (("shape", shape), ("shard", shard), ("chunk", chunk)):
        if len(dims) != len(shape) or len(dims) > MAX_RANK:
            return f"{field} has rank {len(dims)}, expected {len(shape)} and at most {MAX_RANK}"
        if dims and (min(dims) < 1 or max(dims) > MAX_ARRAY_BYTES):
            return f"{field} is {_quoted(dims)}, expected positive sizes"
    for outer, inner, field in ((shape, shard, "shard"), (shard, chunk, "chunk")):
        if any(map(operator.mod, outer, inner)):
            return f"{field} {inner} does not divide {outer}"
    if shard[1:] != shape[1:]:
        return f"shard {shard} splits more than dimension 0 of {shape}"
    nbytes = math.prod(shape) * element_nbytes
    if nbytes > MAX_ARRAY_BYTES:
        return f"{nbytes} bytes, more than the limit {MAX_ARRAY_BYTES}"
    files, chunks = math.prod(shape) // math.prod(shard), math.prod(shard) // math.prod(chunk)
    if files > MAX_FILES_PER_ARRAY or chunks > MAX_CHUNKS_PER_FILE:
        return (
            f"{files} files of {chunks} chunks, expected at most {MAX_FILES_PER_ARRAY} of "
            f"{MAX_CHUNKS_PER_FILE}"
        )
    return None
