"""Experts as records (`kernels.ops.experts.record`): hot ones on the device, cold ones in the host.

Both are filled by the readers that fill any arena, and every chunk is checked as always: on the
device by its kernel, in host memory by the readers. Host memory is read into as it is, without a
ring, and pinned afterwards, layer by layer: memory that was touched is pinned four times as fast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from dsv4.formats.errors import OutOfSpaceError, RuntimeRefusal
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.plain_text import size
from dsv4.formats.store.matrix_views import Nodes, StoredWeights
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import ArraySpec, FileSpec
from dsv4.kernels.ops.experts.record import Record
from dsv4.runtime.cuda_driver import Driver
from dsv4.runtime.load.arena import (
    HostArena,
    Slot,
    host_memory,
    make_arena,
    require_memory,
)
from dsv4.runtime.load.loaded import Settings, fill
from dsv4.runtime.load.placement import Placement
from dsv4.runtime.load.plan import Span
from dsv4.runtime.load.report import LoadReport

MEMBERS = (("w13/codes", "codes13"), ("w13/scales", "scales13"), ("w2/codes", "codes2"),
           ("w2/scales", "scales2"))  # fmt: skip
HOST = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class RecordPlan:
    """What is read, in the order of the memory it fills. nbytes: of that."""

    pieces: tuple[Span, ...]
    nbytes: int

    def spans(self) -> Iterator[Span]:
        """All of them."""
        yield from self.pieces

    @property
    def payload_nbytes(self) -> int:
        """Bytes to be read."""
        return sum(span.nbytes for span in self.pieces)


class PinnedArena(HostArena):
    """Host memory that readers fill in place, and that the device then reads. address: of its
    first byte, for the device.

    Pinned memory is given back with the last reference to the arena.
    """

    def __init__(self, nbytes: int, driver: Driver) -> None:
        self.bytes, self._driver = host_memory(nbytes), driver
        self.address = 0
        self._pinned: list[int] = []
        self._release = weakref.finalize(self, _unpin, driver, self._pinned, self.bytes)

    @contextlib.contextmanager
    def slots(self, count: int, nbytes: int) -> Iterator[list[Slot]]:
        """No memory of their own: they say how much a reader does at once."""
        whole = self.bytes if len(self.bytes) >= nbytes else host_memory(nbytes)
        yield [Slot(whole[:nbytes]) for _ in range(count)]

    def target(self, slot: Slot, nbytes: int, at: int) -> memoryview:
        """The memory itself."""
        memory: memoryview = self.bytes[at : at + nbytes].numpy().data
        return memory

    def copy(self, slot: Slot, nbytes: int, at: int) -> None:
        """The bytes are there."""

    def pin(self, ends: list[int]) -> None:
        """Make all of it known to the device, in pieces that end at the bytes `ends`.

        Raises OutOfSpaceError when the system refuses; nothing is pinned then.
        """
        base = self.bytes.data_ptr()
        begin = 0
        try:
            for end in ends:
                at = self._driver.map(base + begin, end - begin)
                self._pinned.append(base + begin)
                if at != base + begin:
                    raise RuntimeRefusal(
                        "the GPU sees host memory at other addresses than the host"
                    )
                begin = end
        except RuntimeRefusal as error:
            self._release()
            raise OutOfSpaceError(
                f"pinning {size(len(self.bytes))} of host memory for experts failed after "
                f"{size(begin)}: {error}; free memory, raise the limit on locked memory of the "
                "container, or keep more experts on the GPU with --experts"
            ) from None
        self.address = base

    def release(self) -> None:
        """Give the pinned memory back now."""
        self._release()


def _unpin(driver: Driver, pinned: list[int], memory: Tensor) -> None:
    """memory: kept until it is not pinned any more."""
    while pinned:
        with contextlib.suppress(RuntimeRefusal):
            driver.unpin(pinned.pop())


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedRecords:
    """device: uint8 `[R, nbytes]`; host: uint8 `[C, nbytes]`, pinned as long as `arena` lives."""

    device: Tensor
    host: Tensor
    arena: PinnedArena | None
    reports: tuple[LoadReport, ...]
    pinning: float

    @property
    def host_address(self) -> int:
        """Of the first host record, for the device."""
        return self.arena.address if self.arena is not None else 0


def record_of(store: Nodes | StoredWeights, *, drafts: int = 0) -> Record:
    """Of a store's experts, with those of so many draft layers. Raises RuntimeRefusal for experts
    that no kernel reads.
    """
    config = store.config
    for layer in range(config.num_hidden_layers + drafts):
        for name, slabs, interleave in (("w13", 1, 8), ("w2", 8, 0)):
            path = f"{_at(config, layer)}/{name}"
            group = store.contents.stacks.get(path)
            if group is None or group.format != "nvfp4":
                found = "absent" if group is None else group.format
                raise RuntimeRefusal(
                    f"{path} is {found}, kernels read NVFP4; convert with --recipe standard"
                )
            if (group.slabs, group.interleave) != (slabs, interleave):
                raise RuntimeRefusal(
                    f"{path} has {group.slabs} slabs and rows interleaved by {group.interleave}, "
                    f"kernels read {slabs} and {interleave}"
                )
    record = Record(config.hidden_size, config.moe_intermediate_size)
    if not record.whole:
        raise RuntimeRefusal(
            f"experts of {record.inter} by {record.hidden} are not whole tiles, which kernels read"
        )
    return record


def plan_records(
    store: PackedStore, which: np.ndarray[tuple[int, int], np.dtype[np.bool_]], records: int
) -> RecordPlan:
    """The experts `which` (bool `[L, E]`, draft layers last), one after another; `records`: that
    there is room for.
    """
    record = record_of(store)
    pieces: list[Span] = []
    arrays = store.hierarchy.arrays
    at = 0
    for layer in range(which.shape[0]):
        own = [arrays[f"{_at(store.config, layer)}/{member}"] for member, _ in MEMBERS]
        files = [spec.files() for spec in own]
        for expert in which[layer].nonzero()[0].tolist():
            for (_, part), spec, found in zip(MEMBERS, own, files, strict=True):
                pieces.append(_span(spec, found, expert, at))
                if pieces[-1].nbytes != getattr(record, part):
                    raise RuntimeRefusal(f"{spec.path} is not laid out as kernels read it")
                at += pieces[-1].nbytes
    return RecordPlan(tuple(pieces), records * record.nbytes)


def _at(config: ModelConfig, layer: int) -> str:
    """Where the experts of a layer are, those of draft layers behind the backbone's."""
    return f"{config.block_name(layer).replace('.', '/')}/ffn/experts"


def _span(spec: ArraySpec, files: tuple[FileSpec, ...], expert: int, at: int) -> Span:
    row = spec.nbytes // spec.shape[0]
    file = files[expert // spec.shard[0]]
    begin = (expert - file.rows[0]) * row
    if not spec.row_addressable or row % spec.chunk_nbytes:
        raise RuntimeRefusal(f"{spec.path}: a chunk holds parts of several experts")
    return Span(file, begin, begin + row, at)


def load_records(
    store: PackedStore,
    placement: Placement,
    device: torch.device,
    settings: Settings,
    driver: Callable[[], Driver],
) -> LoadedRecords:
    """Fill both memories. driver: makes the CUDA driver of `device`, for pinning.

    Raises OutOfSpaceError when one of them has not the room or the system will not pin, StoreError
    for a file that is missing, short or damaged; nothing stays pinned then.
    """
    record = record_of(store)
    cold = plan_records(store, ~placement.hot, placement.cold)
    if cold.nbytes:
        require_memory(
            cold.nbytes,
            HOST,
            f"{store.root}: experts in host memory need",
            "free memory, or keep more experts on the GPU with --experts",
        )
    hot = plan_records(store, placement.hot, placement.records)
    begin = time.perf_counter()
    arena = make_arena(hot.nbytes, device, f"{store.root}: experts")
    reports = [fill(store, hot, arena, settings, begin)]
    pinned, pinning = None, 0.0
    if cold.nbytes:
        begin = time.perf_counter()
        pinned = PinnedArena(cold.nbytes, driver())
        how = (
            settings
            if settings.verify == "off"
            else dataclasses.replace(settings, verify="readers")
        )
        reports.append(fill(store, cold, pinned, how, begin))
        begin = time.perf_counter()
        ends = [(row + count) * record.nbytes for _, row, count, _ in placement.staged()]
        pinned.pin(ends)
        pinning = time.perf_counter() - begin
    rows = pinned.bytes if pinned is not None else torch.empty(0, dtype=torch.uint8)
    return LoadedRecords(
        arena.bytes.view(-1, record.nbytes),
        rows.view(-1, record.nbytes),
        pinned,
        tuple(reports),
        pinning,
    )
