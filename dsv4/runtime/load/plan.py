"""What is loaded and where it goes: every array's place in one arena, from metadata alone.

An arena is one allocation on the device. Arrays follow each other in it in the model's order, each
as the bytes of its files' payloads, one file after another, on a multiple of 4096 bytes. So what
lies in the arena is what lies on disk, and a rank's part of an array is the same with fewer ranges.

Ranges are whole chunks, because a chunk is what a checksum covers. A slice that would cut one
(the global scales of some experts) is loaded whole, by every rank.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Collection, Iterator, Mapping
from typing import Literal, Protocol

from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.numeric.slices import ByteRange, expert_slice, tensor_slice
from dsv4.formats.numeric.slices import whole as all_of
from dsv4.formats.plain_text import natural_key
from dsv4.formats.store.matrix_views import Nodes
from dsv4.formats.store.parts import is_draft
from dsv4.formats.store.specs import ALIGNMENT, ArraySpec, FileSpec


class Part(enum.StrEnum):
    """What can be loaded by itself."""

    CORE = "core"  # attention, routers, shared experts, norms, embedding, head
    EXPERTS = "experts"  # the stacks of the main model
    DRAFT = "draft"  # draft layers with their experts


EVERYTHING = frozenset(Part)
MODEL = frozenset({Part.CORE, Part.EXPERTS})  # what runs: draft layers stay where they are


@dataclasses.dataclass(frozen=True)
class Share:
    """Rank `rank` of `world`. experts: cut by expert, or each by tensor; dense: the matrices."""

    rank: int = 0
    world: int = 1
    experts: Literal["expert", "tensor"] = "expert"
    dense: Literal["whole", "tensor"] = "whole"

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise RuntimeRefusal(f"rank {self.rank} of {self.world} ranks does not exist")


ALONE = Share()


@dataclasses.dataclass(frozen=True)
class Span:
    """Bytes `[begin, end)` of a file's payload, whole chunks; they go to byte `at` of the arena."""

    file: FileSpec
    begin: int
    end: int
    at: int

    @property
    def nbytes(self) -> int:
        """Its length."""
        return self.end - self.begin


@dataclasses.dataclass(frozen=True)
class Placed:
    """An array, or a rank's part of it, from byte `at` of the arena on."""

    spec: ArraySpec
    at: int
    spans: tuple[Span, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that lie there, without a gap."""
        return sum(span.nbytes for span in self.spans)

    @property
    def complete(self) -> bool:
        """Whether it is all of the array."""
        return self.nbytes == self.spec.nbytes


@dataclasses.dataclass(frozen=True)
class LoadPlan:
    """Arrays by path, in the order of the arena. nbytes: of the arena, padding included."""

    arrays: Mapping[str, Placed]
    nbytes: int

    def spans(self) -> Iterator[Span]:
        """All of them, in the order of the arena."""
        for placed in self.arrays.values():
            yield from placed.spans

    @functools.cached_property
    def payload_nbytes(self) -> int:
        """Bytes to be read."""
        return sum(placed.nbytes for placed in self.arrays.values())


class Plan(Protocol):
    """What a load needs to know of its plan: see `LoadPlan`."""

    @property
    def nbytes(self) -> int: ...

    @property
    def payload_nbytes(self) -> int: ...

    def spans(self) -> Iterator[Span]: ...


def part_of(store: Nodes, path: str) -> Part | None:
    """Which part the array at `path` belongs to; None: none that a model reads."""
    group, _, member = path.rpartition("/")
    stacked = group in store.contents.stacks
    if stacked and member == "lineage":
        return None
    if is_draft(path):
        return Part.DRAFT
    return Part.EXPERTS if stacked else Part.CORE


def plan_load(
    store: Nodes,
    parts: Collection[Part] = EVERYTHING,
    share: Share = ALONE,
    *,
    records: bool = False,
) -> LoadPlan:
    """Place `share` of the arrays of `parts`. Raises RuntimeRefusal when there are none.

    records: leave out the codes and scales of experts, which are loaded as records.
    """
    arrays: dict[str, Placed] = {}
    at = 0
    for path in sorted(store.hierarchy.arrays, key=natural_key):
        if (part := part_of(store, path)) is None or part not in parts:
            continue
        group = path.rpartition("/")[0]
        stacked = group in store.contents.stacks
        if records and stacked and not path.endswith("/global_scale"):
            continue
        spec = store.hierarchy.arrays[path]
        spans = tuple(_spans(spec, _ranges(spec, group, store, share), at))
        arrays[path] = placed = Placed(spec, at, spans)
        at += -(-placed.nbytes // ALIGNMENT) * ALIGNMENT
    if not arrays:
        wanted = ", ".join(sorted(parts)) or "nothing"
        raise RuntimeRefusal(f"{store.root}: there is nothing to load of {wanted}")
    return LoadPlan(arrays, at)


def whole(spec: ArraySpec, at: int = 0) -> Placed:
    """All of an array, from byte `at` of an arena on."""
    return Placed(spec, at, tuple(_spans(spec, all_of(spec), at)))


def _ranges(spec: ArraySpec, group: str, store: Nodes, share: Share) -> list[ByteRange]:
    if share.world == 1:
        return all_of(spec)
    stacked = group in store.contents.stacks
    if stacked and share.experts == "expert":
        ranges = expert_slice(spec, share.rank, share.world)
    elif stacked or share.dense == "tensor":
        ranges = tensor_slice(spec, share.rank, share.world)
    else:
        return all_of(spec)
    chunk = spec.chunk_nbytes
    return all_of(spec) if any(r.begin % chunk or r.end % chunk for r in ranges) else ranges


def _spans(spec: ArraySpec, ranges: list[ByteRange], at: int) -> Iterator[Span]:
    files = {file.key: file for file in spec.files()}
    for part in ranges:
        yield Span(files[part.key], part.begin, part.end, at)
        at += part.nbytes
