"""What becomes of each tensor of a store: entries of safetensors files, and how their bytes come.

    stored as        exported as
    NVFP4            weight U8 [N, K/2]  weight_scale F8_E4M3 [N, K/16]
                     weight_scale_2 F32 []  input_scale F32 []
    NVFP4, as MXFP4  weight I8 [N, K/2]  scale F8_E8M0 [N, K/32]
    NVFP4, as BF16   weight BF16 [N, K]
    FP8              weight F8_E4M3 [N, K]  scale, of the type it has, [N/128, K/128]
    plain            as it is, integers in the width that the source had

Gate and up of an expert are one piece: servers read one global scale for both. Every piece is made
a few rows, or an expert, at a time.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dsv4.export.reading import Reading
from dsv4.export.recasts import nvfp4_to_mxfp4, with_one_global_scale
from dsv4.formats.checkpoint import Stored, values_of
from dsv4.formats.errors import FormatError
from dsv4.formats.model.safetensors_header import DTYPE_BITS
from dsv4.formats.numeric.layouts import unpack_fp8, unpack_nvfp4
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor
from dsv4.formats.numeric.operands import (
    FP8_BLOCK,
    NVFP4_BLOCK,
    SF_ROWS,
    Fp8Matrix,
    Nvfp4Matrix,
)

INPUT_SCALE = 1.0
"""Of activations, which a store says nothing of: NVIDIA's own choice for DeepSeek-V4.1."""

TILE_BYTES = 8 << 20
DTYPES = {
    "bfloat16": "BF16",
    "float32": "F32",
    "int64": "I64",
    "e4m3": "F8_E4M3",
    "e8m0": "F8_E8M0",
    "uint8": "U8",
}
_NARROW = {
    "I32": torch.int32,
    "I16": torch.int16,
    "U8": torch.uint8,
}

Parts = Mapping[str, Iterable[Tensor]]
"""Entry name -> its bytes, as contiguous tensors one after another; made when asked for."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclasses.dataclass(frozen=True)
class Piece(abc.ABC):
    """One to a few entries that are made together. path: its node in the store.

    names: the logical tensors. entries: those of wider types first, as safetensors aligns them.
    """

    path: str
    names: tuple[str, ...]
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        """Of all entries."""
        return sum(entry.nbytes for entry in self.entries)

    @abc.abstractmethod
    def parts(self, reading: Reading, apart: Callable[[str], None]) -> Parts:
        """The bytes of the entries. apart: called for an expert with two global scales.

        Raises StoreError for what does not match its checksum.
        """


@dataclasses.dataclass(frozen=True)
class RowsPiece(Piece):
    """A tensor made a few rows at a time: plain, FP8, or NVFP4, as BF16 if `wide`."""

    expert: int | None = None
    wide: bool = False

    def parts(self, reading: Reading, apart: Callable[[str], None]) -> Parts:
        """As `Piece.parts`."""
        reading.prove(self.path, self.expert)
        (name,) = self.names
        makers = {
            "weight_scale": _scale_rows,
            "weight_scale_2": _global_scale,
            "input_scale": _input_scale,
            "scale": _block_scales,
        }
        found: dict[str, Iterable[Tensor]] = {}
        for entry in self.entries:
            maker = _weights if entry.name == name else makers[entry.name.rpartition(".")[2]]
            found[entry.name] = maker(self, entry, reading)
        return found


def _tiles(reading: Reading, name: str) -> Iterator[Stored]:
    shape = reading.packed.shape(name)
    if not shape:
        yield reading.packed.stored(name)
        return
    rows, row_bytes = shape[0], math.prod(shape[1:]) * 4
    step = max(TILE_BYTES // max(row_bytes, 1) // SF_ROWS, 1) * SF_ROWS
    for start in range(0, rows, step):
        yield reading.packed.stored_rows(name, start, min(start + step, rows))
        reading.forget()


def _weights(piece: RowsPiece, entry: Entry, reading: Reading) -> Iterator[Tensor]:
    for stored in _tiles(reading, entry.name):
        if piece.wide:
            values = values_of(stored)
            rounded = values.to(torch.bfloat16)
            if not torch.equal(rounded.float(), values):
                raise FormatError(
                    f"{entry.name}: its values do not fit BF16, since its global scale is not a "
                    "power of two; export it as NVFP4"
                )
            yield rounded
        elif isinstance(stored, NVFP4Tensor):
            yield stored.codes.contiguous()
        elif isinstance(stored, Fp8Matrix):
            yield unpack_fp8(stored)[0].contiguous()
        else:
            yield _narrowed(stored, entry).contiguous()


def _narrowed(stored: Tensor, entry: Entry) -> Tensor:
    if entry.dtype not in _NARROW:
        return stored
    narrow = stored.to(_NARROW[entry.dtype])
    if not torch.equal(narrow.to(torch.int64), stored):
        raise FormatError(f"{entry.name}: its integers do not fit {entry.dtype}, as the source had")
    return narrow


def _scale_rows(piece: RowsPiece, entry: Entry, reading: Reading) -> Iterator[Tensor]:
    for stored in _tiles(reading, piece.names[0]):
        assert isinstance(stored, NVFP4Tensor)
        yield stored.scales.contiguous()


def _global_scale(piece: RowsPiece, entry: Entry, reading: Reading) -> Iterator[Tensor]:
    stored = reading.packed.stored_rows(piece.names[0], 0, min(SF_ROWS, entry_rows(piece)))
    assert isinstance(stored, NVFP4Tensor)
    yield stored.global_scale.reshape(1).clone()


def _input_scale(piece: RowsPiece, entry: Entry, reading: Reading) -> Iterator[Tensor]:
    yield torch.tensor([INPUT_SCALE])


def _block_scales(piece: RowsPiece, entry: Entry, reading: Reading) -> Iterator[Tensor]:
    stored = reading.packed.stored(piece.names[0])
    assert isinstance(stored, Fp8Matrix)
    yield stored.scales.contiguous()


def entry_rows(piece: Piece) -> int:
    """Rows of the piece's weight."""
    return next(entry.shape[0] for entry in piece.entries if entry.name in piece.names)


@dataclasses.dataclass(frozen=True)
class ExpertPiece(Piece):
    """The projections of one expert in one stack, from NVFP4.

    as_mxfp4: back to the source's MXFP4. shared: given one global scale, where they can be.
    """

    expert: int
    as_mxfp4: bool
    shared: bool

    def parts(self, reading: Reading, apart: Callable[[str], None]) -> Parts:
        """As `Piece.parts`."""
        reading.prove(self.path, self.expert)
        store = reading.packed.store
        matrix = store.stack(store.contents.stacks[self.path]).matrix(self.expert)
        assert isinstance(matrix, Nvfp4Matrix)
        found: Sequence[NVFP4Tensor] = unpack_nvfp4(matrix)
        if self.shared and not self.as_mxfp4:
            one = with_one_global_scale(found)
            if one is None:
                apart(self.names[0])
            found = one or found
        parts: dict[str, Iterable[Tensor]] = {}
        for name, tensor in zip(self.names, found, strict=True):
            stem = name.removesuffix("weight")
            if self.as_mxfp4:
                codes, exponents = nvfp4_to_mxfp4(tensor, name)
                parts |= {name: [codes], f"{stem}scale": [exponents]}
                continue
            parts |= {
                name: [tensor.codes],
                f"{stem}weight_scale": [tensor.scales],
                f"{stem}weight_scale_2": [tensor.global_scale.reshape(1).clone()],
                f"{stem}input_scale": [torch.tensor([INPUT_SCALE])],
            }
        reading.forget()
        return parts


def nvfp4_entries(name: str, shape: tuple[int, ...]) -> tuple[Entry, ...]:
    """ModelOpt's four. Raises FormatError for columns that are not whole blocks."""
    rows, cols = shape
    if cols % NVFP4_BLOCK:
        raise FormatError(
            f"{name} has {cols} columns, expected a multiple of {NVFP4_BLOCK}: ModelOpt's format "
            f"has no padding; export it as BF16 with --bf16 {name}"
        )
    stem = name.removesuffix("weight")
    return (
        Entry(f"{stem}weight_scale_2", "F32", ()),
        Entry(f"{stem}input_scale", "F32", ()),
        Entry(name, "U8", (rows, cols // 2)),
        Entry(f"{stem}weight_scale", "F8_E4M3", (rows, cols // NVFP4_BLOCK)),
    )


def mxfp4_entries(name: str, shape: tuple[int, ...]) -> tuple[Entry, ...]:
    """DeepSeek's two."""
    rows, cols = shape
    scale = Entry(f"{name.removesuffix('weight')}scale", "F8_E8M0", (rows, cols // 32))
    return Entry(name, "I8", (rows, cols // 2)), scale


def fp8_entries(name: str, shape: tuple[int, ...], element: str) -> tuple[Entry, ...]:
    """The matrix and its scales, which are of the store's `element`."""
    tiles = tuple(-(-size // FP8_BLOCK) for size in shape)
    scale = Entry(f"{name.removesuffix('weight')}scale", DTYPES[element], tiles)
    weight = Entry(name, "F8_E4M3", shape)
    return (weight, scale) if element == "e8m0" else (scale, weight)
