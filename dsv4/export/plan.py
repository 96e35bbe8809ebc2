"""Plans an export from a store's metadata: pieces, and the safetensors files that they fill.

Experts that came from NVFP4 go back byte for byte. Those of the layers that came from MXFP4 or were
rounded get one global scale for gate and up; those of draft layers that came from MXFP4 go back to
it, as in NVIDIA's releases, whose readers expect it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import Tensor

from dsv4.export.pieces import (
    DTYPES,
    Entry,
    ExpertPiece,
    Piece,
    RowsPiece,
    fp8_entries,
    mxfp4_entries,
    nvfp4_entries,
)
from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.errors import ConfigError
from dsv4.formats.model.safetensors_header import DTYPE_BITS, LENGTH_BYTES
from dsv4.formats.model.user_names import matches
from dsv4.formats.numeric.codecs import MXFP4_BLOCK
from dsv4.formats.numeric.operands import NVFP4_BLOCK
from dsv4.formats.plain_text import counted, first
from dsv4.formats.store.nodes import EXPERT, QuantizedGroup
from dsv4.formats.version import TOOL

Experts = Literal["nvfp4", "source"]
"""Routed experts that came from MXFP4: as NVFP4, or back to MXFP4 where that is exact."""

DEFAULT_SHARD_BYTES = 4 << 30
_DRAFT = "mtp."
_ALIGNMENT = 8
_BYTES_OF_INTEGER = {1: "U8", 2: "I16", 4: "I32"}


@dataclasses.dataclass(frozen=True)
class Shard:
    """One safetensors file. head: length and header. pieces: in the order of the file."""

    name: str
    head: bytes
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the file; adds up all pieces."""
        return len(self.head) + sum(piece.nbytes for piece in self.pieces)


@dataclasses.dataclass(frozen=True)
class ExportPlan:
    """All files of tensors, and sentences on what others will not read as it is."""

    shards: tuple[Shard, ...]
    notices: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files of tensors."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def tensors(self) -> int:
        """Logical tensors."""
        return sum(len(piece.names) for shard in self.shards for piece in shard.pieces)

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """-> (file, entry), file by file."""
        for shard in self.shards:
            for piece in shard.pieces:
                for entry in piece.entries:
                    yield shard.name, entry


def make_plan(
    packed: PackedCheckpoint,
    *,
    experts: Experts = "nvfp4",
    bf16: Sequence[str] = (),
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> ExportPlan:
    """Plan the export of `packed`. Reads lineages, no weights.

    bf16: globs of NVFP4 matrices to write as BF16. Raises ConfigError for one that matches none,
    FormatError for a matrix that ModelOpt's format cannot hold, StoreError for damage.
    """
    pieces = list(_pieces(packed, experts, bf16))
    _refuse_idle(packed, bf16)
    groups: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        if filled and filled + piece.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += piece.nbytes
    shards = (
        _shard(packed, f"model-{index:05d}-of-{len(groups):05d}.safetensors", group)
        for index, group in enumerate(groups, 1)
    )
    return ExportPlan(tuple(shards), tuple(_notices(pieces)))


def _pieces(packed: PackedCheckpoint, experts: Experts, bf16: Sequence[str]) -> Iterator[Piece]:
    """In the order of the names; all of an expert's projections follow each other."""
    contents = packed.store.contents
    stacks = {
        template.replace(EXPERT, str(expert)): (stack, expert)
        for stack in contents.stacks.values()
        for expert in range(stack.experts or 0)
        for template in stack.names
    }
    lineages: dict[str, Tensor | None] = {}
    done: set[str] = set()
    for name in packed.names():
        if name in done:
            continue
        if name not in stacks:
            yield _dense_piece(packed, name, bf16)
            continue
        stack, expert = stacks[name]
        if stack.path not in lineages:
            lineages[stack.path] = _lineage(packed, stack)
        lineage = lineages[stack.path]
        names = tuple(template.replace(EXPERT, str(expert)) for template in stack.names)
        row = None if lineage is None else lineage[expert]
        for piece in _expert_pieces(packed, stack, expert, names, row, experts, bf16):
            done.update(piece.names)
            yield piece


def _lineage(packed: PackedCheckpoint, stack: QuantizedGroup) -> Tensor | None:
    path = f"{stack.path}/lineage"
    return packed.store.array(path).tensor() if path in packed.store.hierarchy.arrays else None


def _dense_piece(packed: PackedCheckpoint, name: str, bf16: Sequence[str]) -> Piece:
    shape, kind = packed.shape(name), packed.format_of(name)
    if kind == "plain":
        path = packed.store.contents.plain[name]
        return RowsPiece(path, (name,), (Entry(name, _plain_dtype(packed, name), shape),))
    path = packed.store.contents.matrices[name].path
    if kind == "fp8":
        element = packed.store.array(f"{path}/scales").spec.element
        return RowsPiece(path, (name,), fp8_entries(name, shape, element))
    if _matches(name, bf16):
        return RowsPiece(path, (name,), (Entry(name, "BF16", shape),), wide=True)
    return RowsPiece(path, (name,), nvfp4_entries(name, shape))


def _plain_dtype(packed: PackedCheckpoint, name: str) -> str:
    """The dtype; integers in the width that their source had, which the lineage tells."""
    spec = packed.store.array(packed.store.contents.plain[name]).spec
    if spec.element != "int64":
        return DTYPES[spec.element]
    sources = packed.provenance(name, statistics=False)["sources"]
    numbers = spec.nbytes // 8
    if "weight" not in sources or not numbers:
        return "I64"
    width = (sources["weight"]["end"] - sources["weight"]["begin"]) // numbers
    return _BYTES_OF_INTEGER.get(width, "I64")


def _expert_pieces(
    packed: PackedCheckpoint,
    stack: QuantizedGroup,
    expert: int,
    names: tuple[str, ...],
    lineage: Tensor | None,
    experts: Experts,
    bf16: Sequence[str],
) -> Iterator[Piece]:
    """Of one expert in one stack: all its projections together if they are NVFP4."""
    shape = (stack.rows, stack.cols)
    if stack.format != "nvfp4" or any(_matches(name, bf16) for name in names):
        for name in names:
            entries = _alone(packed, stack, name, shape)
            yield RowsPiece(
                stack.path, (name,), entries, expert=expert, wide=stack.format == "nvfp4"
            )
        return
    came = None if lineage is None else [_encoding(row, shape) for row in lineage.tolist()]
    exact = lineage is not None and not bool(lineage[:, 6:8].any())
    mxfp4 = came is not None and exact and all(one == "mxfp4" for one in came)
    back = mxfp4 and (experts == "source" or names[0].startswith(_DRAFT))
    make = mxfp4_entries if back else nvfp4_entries
    yield ExpertPiece(
        stack.path,
        names,
        _wide_first([entry for name in names for entry in make(name, shape)]),
        expert=expert,
        as_mxfp4=back,
        shared=came is None or any(one != "nvfp4" for one in came),
    )


def _alone(
    packed: PackedCheckpoint, stack: QuantizedGroup, name: str, shape: tuple[int, int]
) -> tuple[Entry, ...]:
    if stack.format == "fp8":
        return fp8_entries(name, shape, packed.store.array(f"{stack.path}/scales").spec.element)
    if stack.format == "nvfp4":
        return (Entry(name, "BF16", shape),)
    dtype = DTYPES[packed.store.array(f"{stack.path}/{stack.weights}").spec.element]
    return (Entry(name, dtype, shape),)


def _encoding(row: Sequence[int], shape: tuple[int, int]) -> str:
    """What a projection was in its source, from the bytes that its weight and scales had there."""
    _, begin, end, _, scale_begin, scale_end, *_ = row
    values = shape[0] * shape[1]
    if end - begin != values // 2:
        return "wide"
    of_nvfp4 = (scale_end - scale_begin) == values // NVFP4_BLOCK
    of_mxfp4 = (scale_end - scale_begin) == values // MXFP4_BLOCK and shape[1] % MXFP4_BLOCK == 0
    return "nvfp4" if of_nvfp4 else "mxfp4" if of_mxfp4 else "wide"


def _wide_first(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    return tuple(sorted(entries, key=lambda entry: -DTYPE_BITS[entry.dtype]))


def _shard(packed: PackedCheckpoint, name: str, pieces: Sequence[Piece]) -> Shard:
    """Whole words first: then everything begins where its type wants it."""
    ordered = sorted(
        pieces,
        key=lambda piece: (
            piece.nbytes % _ALIGNMENT != 0,
            0 if piece.nbytes % _ALIGNMENT == 0 else -DTYPE_BITS[piece.entries[0].dtype],
        ),
    )
    header: dict[str, Any] = {
        "__metadata__": {
            "format": "pt",
            "exported_by": TOOL,
            "dsv4_root": packed.store.manifest["root"],
        }
    }
    position = 0
    for piece in ordered:
        for entry in piece.entries:
            end = position + entry.nbytes
            header[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [position, end],
            }
            position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return Shard(name, len(text).to_bytes(LENGTH_BYTES, "little") + text, tuple(ordered))


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(matches(glob, name) for glob in globs)


def _refuse_idle(packed: PackedCheckpoint, globs: Sequence[str]) -> None:
    for glob in globs:
        names = (name for name in packed.names() if packed.format_of(name) == "nvfp4")
        if not any(matches(glob, name) for name in names):
            raise ConfigError(
                f"--bf16 {glob} matches no tensor that is NVFP4; `dsv4 inspect "
                f"{packed.store.root} '{glob}'` lists what it matches"
            )


def _notices(pieces: Sequence[Piece]) -> Iterator[str]:
    dense = [
        piece.names[0]
        for piece in pieces
        if isinstance(piece, RowsPiece) and piece.expert is None and _is_nvfp4(piece)
    ]
    if dense:
        yield (
            f"{counted(len(dense), 'matrix', 'matrices')} outside the routed experts are NVFP4 "
            f"({first(dense)}), which readers of NVIDIA's releases expect as they were; pack with "
            "recipe native for them, or give --bf16 for gates and head"
        )


def _is_nvfp4(piece: Piece) -> bool:
    return any(entry.name.endswith("weight_scale_2") for entry in piece.entries)
