"""Rank slices: which byte ranges of a packed array one GPU of several needs.

Expert parallelism cuts dimension 0 of a stack; tensor parallelism cuts the one further dimension
that the array's chunks divide (rows of a column-parallel matrix, K-slabs of a row-parallel one).
Because a file is its chunks in C order, a rank's part is a short list of contiguous ranges, and
their bytes, one after another, are a dense tensor: `[E/n, …]`, or `[E, …/n, …]`.

Ranks take whole chunks. Where their number does not divide (a vocabulary of 1010 tiles), parts are
of unequal size: rank r of n takes chunks `[r*c // n, (r+1)*c // n)`. The parts of all ranks, put
together along the cut, are the array: that is the inverse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from dsv4.formats.errors import FormatError
from dsv4.formats.store.specs import ArraySpec


@dataclasses.dataclass(frozen=True)
class ByteRange:
    """Bytes `[begin, end)` of the store's file `key`."""

    key: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Its length."""
        return self.end - self.begin


def whole(spec: ArraySpec) -> list[ByteRange]:
    """All payload bytes of an array, a range per file."""
    return [ByteRange(file.key, 0, file.payload_nbytes) for file in spec.files()]


def expert_slice(spec: ArraySpec, rank: int, world: int) -> list[ByteRange]:
    """The part of rank `rank` of `world` when dimension 0 (experts) is cut.

    Raises FormatError when a file's rows are not addressable one by one, or for a bad rank.
    """
    _check_rank(spec, rank, world)
    if not spec.row_addressable:
        raise FormatError(f"{spec.path}: its rows are not contiguous, so they cannot be cut")
    first, last = share(spec.shape[0], rank, world)
    row_nbytes = spec.nbytes // spec.shape[0]
    ranges = []
    for file in spec.files():
        begin, end = max(first, file.rows[0]), min(last, file.rows[1])
        if begin < end:
            ranges.append(
                ByteRange(
                    file.key,
                    (begin - file.rows[0]) * row_nbytes,
                    (end - file.rows[0]) * row_nbytes,
                )
            )
    return ranges


def tensor_slice(spec: ArraySpec, rank: int, world: int) -> list[ByteRange]:
    """The part of rank `rank` of `world` when the array's inner cut is shared out.

    A matrix that was not cut (too small, or odd) is given whole to every rank. Raises FormatError
    for a bad rank and for an array cut in two dimensions besides the stack's.
    """
    _check_rank(spec, rank, world)
    stacked, units = _inner_cut(spec)
    if units == 1:
        return whole(spec)
    first, last = share(units, rank, world)
    ranges: list[ByteRange] = []
    for file in spec.files():
        rows = file.rows[1] - file.rows[0] if stacked else 1
        for row in range(rows):
            begin = (row * units + first) * spec.chunk_nbytes
            end = (row * units + last) * spec.chunk_nbytes
            if ranges and ranges[-1].key == file.key and ranges[-1].end == begin:
                ranges[-1] = ByteRange(file.key, ranges[-1].begin, end)
            elif begin < end:
                ranges.append(ByteRange(file.key, begin, end))
    return ranges


def share(units: int, rank: int, world: int) -> tuple[int, int]:
    """The half-open run of `units` that belongs to `rank` of `world`."""
    return units * rank // world, units * (rank + 1) // world


def ranks(spec: ArraySpec, world: int, *, experts: bool) -> Iterator[list[ByteRange]]:
    """Every rank's part, in order of rank."""
    cut = expert_slice if experts else tensor_slice
    return (cut(spec, rank, world) for rank in range(world))


def _inner_cut(spec: ArraySpec) -> tuple[bool, int]:
    """-> (whether dimension 0 is a stack of experts, chunks along the inner cut)."""
    counts = [size // chunk for size, chunk in zip(spec.shape, spec.chunk, strict=True)]
    stacked = len(spec.shape) > 2 and spec.chunk[0] == 1 and any(n > 1 for n in counts[1:])
    inner = [count for count in counts[1 if stacked else 0 :] if count > 1]
    if len(inner) > 1:
        raise FormatError(f"{spec.path}: cut along {len(inner)} dimensions, expected one")
    return stacked, inner[0] if inner else 1


def _check_rank(spec: ArraySpec, rank: int, world: int) -> None:
    if world < 1 or not 0 <= rank < world:
        raise FormatError(f"{spec.path}: rank {rank} of {world} ranks does not exist")
