"""A loaded model's weights: the store's arrays as they lie on the device, by name.

weights = load_weights(PackedStore.open("packed"), "cuda")
weights.matrix("layers.0.attn.wq_a.weight")     # codes and scales on the GPU, nothing copied
weights.load({Part.DRAFT})                      # later, into an arena of its own
weights.drop({Part.DRAFT})                      # and its memory is free again
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal, StoreError
from dsv4.formats.store.mapped_files import StoredArray
from dsv4.formats.store.matrix_views import StoredWeights
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import ALIGNMENT, ELEMENTS, FileSpec
from dsv4.runtime.load.arena import Arena, Slot, make_arena
from dsv4.runtime.load.check import DeviceCheck, find_hash, on_device
from dsv4.runtime.load.jobs import make_jobs
from dsv4.runtime.load.plan import (
    ALONE,
    EVERYTHING,
    LoadPlan,
    Part,
    Placed,
    Plan,
    Share,
    plan_load,
)
from dsv4.runtime.load.readers import Readers
from dsv4.runtime.load.report import LoadReport

MOST_READERS = 12  # beside one GPU: eight give 48 GB/s, ten to fourteen all the bus has


@dataclasses.dataclass(frozen=True)
class Settings:
    """How bytes are moved. readers: threads, 0 for one a core but at most 12.

    slot_nbytes: of a slot of the ring; a multiple of 4096. verify: who compares every chunk with
    its checksum: the device, the readers, "auto" for the device where its kernel is built, or
    "off". direct: O_DIRECT for what is not in the page cache.
    """

    readers: int = 0
    slot_nbytes: int = 6 << 20
    slots_a_reader: int = 2
    verify: Literal["auto", "device", "readers", "off"] = "auto"
    direct: bool = True

    def __post_init__(self) -> None:
        if self.readers < 0 or self.slots_a_reader < 1:
            raise RuntimeRefusal("readers have to be 0 or more, their slots at least one")
        if self.slot_nbytes < ALIGNMENT or self.slot_nbytes % ALIGNMENT:
            raise RuntimeRefusal(
                f"slots of {self.slot_nbytes} bytes, expected a multiple of {ALIGNMENT}"
            )

    @property
    def threads(self) -> int:
        """Readers to start."""
        return self.readers or min(len(os.sched_getaffinity(0)), MOST_READERS)


@dataclasses.dataclass(frozen=True)
class _Resident:
    """The parts that one call loaded."""

    parts: frozenset[Part]
    plan: LoadPlan
    arena: Arena


@dataclasses.dataclass(frozen=True)
class _ArenaFile:
    """The payload of a file as it lies in an arena."""

    bytes: Tensor

    def view(self, begin: int, end: int) -> Tensor:
        return self.bytes[begin:end]


class LoadedWeights(StoredWeights):
    """Weights on a device. reports: one of each load. Use `load_weights` to make them."""

    def __init__(
        self, store: PackedStore, device: torch.device, share: Share, settings: Settings
    ) -> None:
        self.root, self.contents, self.config = store.root, store.contents, store.config
        self.device, self.share, self.settings = device, share, settings
        self.reports: list[LoadReport] = []
        self._store = store
        self._resident: list[_Resident] = []
        self._arrays: dict[str, StoredArray] = {}

    def load(
        self,
        parts: Collection[Part],
        progress: Callable[[int], None] | None = None,
        *,
        records: bool = False,
    ) -> LoadReport:
        """Load `parts` into one more arena.

        records: leave out the experts' codes and scales, which are loaded as records.
        progress: called with the bytes moved so far, from any thread. Raises RuntimeRefusal when
        one of them is there already, OutOfSpaceError when they do not fit, StoreError for a file
        that is missing, short or damaged; nothing of them is there then.
        """
        wanted = frozenset(parts)
        if again := sorted(part for one in self._resident for part in one.parts & wanted):
            raise RuntimeRefusal(f"{self.root}: {', '.join(again)} are loaded already")
        plan = plan_load(self._store, wanted, self.share, records=records)
        begin = time.perf_counter()
        arena = make_arena(plan.nbytes, self.device, str(self.root))
        report = fill(self._store, plan, arena, self.settings, begin, progress)
        self._resident.append(_Resident(wanted, plan, arena))
        self.reports.append(report)
        return report

    def drop(self, parts: Collection[Part]) -> None:
        """Give back the memory of parts that were loaded together.

        Tensors handed out keep it until they are gone too. Raises RuntimeRefusal when they were
        loaded in another combination.
        """
        gone = [one for one in self._resident if one.parts == frozenset(parts)]
        if not gone:
            loaded = " and ".join("+".join(sorted(one.parts)) for one in self._resident)
            raise RuntimeRefusal(
                f"{self.root}: {'+'.join(sorted(parts))} were not loaded together; loaded are "
                f"{loaded or 'none'}"
            )
        self._resident.remove(gone[0])
        self._arrays.clear()

    def array(self, path: str) -> StoredArray:
        """The whole array at node path `path`, on the device.

        Raises StoreError when it is not loaded, or only a rank's share of it.
        """
        if path not in self._arrays:
            one, placed = self._placed(path)
            if not placed.complete:
                raise StoreError(f"{self.root}: of array {path} only a share is loaded")
            memory = one.arena.bytes
            files = {
                span.file.key: _ArenaFile(memory[span.at : span.at + span.nbytes])
                for span in placed.spans
            }
            self._arrays[path] = StoredArray(placed.spec, _opener(files))
        return self._arrays[path]

    def share_of(self, path: str) -> Tensor:
        """This rank's part of the array at `path`, dense, as it lies (see `dense_shape`).

        Raises StoreError when it is not loaded.
        """
        one, placed = self._placed(path)
        raw = one.arena.bytes[placed.at : placed.at + placed.nbytes]
        return raw.view(ELEMENTS[placed.spec.element].torch).view(dense_shape(placed))

    def _placed(self, path: str) -> tuple[_Resident, Placed]:
        for one in self._resident:
            if path in one.plan.arrays:
                return one, one.plan.arrays[path]
        known = path in self._store.hierarchy.arrays
        raise StoreError(
            f"{self.root}: array {path!r} is {'not loaded' if known else 'not in the store'}"
        )


def load_weights(
    store: PackedStore,
    device: str | torch.device = "cuda",
    *,
    parts: Collection[Part] = EVERYTHING,
    share: Share = ALONE,
    settings: Settings | None = None,
    progress: Callable[[int], None] | None = None,
    records: bool = False,
) -> LoadedWeights:
    """Load `parts` of a store to a device. records, errors: see `LoadedWeights.load`."""
    weights = LoadedWeights(store, torch.device(device), share, settings or Settings())
    weights.load(parts, progress, records=records)
    return weights


def dense_shape(placed: Placed) -> tuple[int, ...]:
    """The shape in which a rank's part of an array lies in the arena.

    That of the array with one dimension shortened; where columns are cut into slabs, these come
    before the rows: `[S, N, K/S]`, in a stack `[E, S, N, K/S]`.
    """
    spec = placed.spec
    shape, chunk = spec.shape, spec.chunk
    if not shape:
        return ()
    row_nbytes = spec.nbytes // shape[0]
    cut = next((i for i in range(1, len(shape)) if shape[i] != chunk[i]), 0)
    whole_rows = spec.row_addressable and all(
        span.begin % row_nbytes == 0 and span.end % row_nbytes == 0 for span in placed.spans
    )
    if spec.c_order:
        if whole_rows:
            return (placed.nbytes // row_nbytes, *shape[1:])
        return (*shape[:cut], shape[cut] * placed.nbytes // spec.nbytes, *shape[cut + 1 :])
    if not spec.row_addressable:
        return (placed.nbytes // spec.chunk_nbytes, *chunk)
    rows = placed.nbytes // row_nbytes if whole_rows else shape[0]
    return (rows, placed.nbytes // rows // spec.chunk_nbytes, *chunk[1:])


def _opener(files: dict[str, _ArenaFile]) -> Callable[[FileSpec], _ArenaFile]:
    return lambda file: files[file.key]


def fill(
    store: PackedStore,
    plan: Plan,
    arena: Arena,
    settings: Settings,
    begin: float,
    progress: Callable[[int], None] | None = None,
) -> LoadReport:
    """Read and check everything of `plan` into `arena`. begin: when its making began.

    Raises StoreError as `LoadedWeights.load`; no thread is left then, and no copy under way.
    """
    count, per_reader = settings.threads, settings.slots_a_reader
    verifies = settings.verify != "off"
    kernel, note = find_hash(arena.bytes.device, settings.verify) if verifies else (None, "")

    def hashes(file: FileSpec) -> bool:
        return verifies and (kernel is None or not on_device(file))

    with contextlib.ExitStack() as stack:
        with ThreadPoolExecutor(1) as pool:  # pinning takes as long as all the rest here
            ring = arena.slots(count * per_reader, settings.slot_nbytes)
            pinned = pool.submit(_enter, stack, arena, ring)
            jobs = make_jobs(plan.spans(), settings.slot_nbytes, hashes)
            check = DeviceCheck(store, plan, arena, jobs, kernel) if kernel else None
            readers = Readers(
                store, arena, hashes=hashes, check=check, direct=settings.direct, progress=progress
            )
            slots = pinned.result()
        placed = time.perf_counter()
        readers.run(jobs, [slots[i::count] for i in range(count)])
        copied = time.perf_counter()
        if check is not None:
            check.finish()
            readers.spent.chunks += check.chunks
            readers.spent.verified_bytes += check.nbytes
        done = time.perf_counter()
    return LoadReport(
        nbytes=plan.payload_nbytes,
        arena_nbytes=plan.nbytes,
        device=str(arena.bytes.device),
        readers=count,
        ring_nbytes=len(slots) * settings.slot_nbytes,
        verified="device" if check else "readers" if verifies else "off",
        note=note,
        place=placed - begin,
        move=done - placed,
        check=done - copied,
        spent=readers.spent,
    )


def _enter(
    stack: contextlib.ExitStack,
    arena: Arena,
    ring: contextlib.AbstractContextManager[list[Slot]],
) -> list[Slot]:
    arena.enter()
    return stack.enter_context(ring)
