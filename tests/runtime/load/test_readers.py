"""The machinery: jobs that cover the plan, a ring that is used again, locks that are not held."""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from dsv4.formats.errors import StoreError
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import FileSpec
from dsv4.runtime.load import Settings, load_weights, plan_load
from dsv4.runtime.load import files as reading
from dsv4.runtime.load.arena import HostArena, Slot
from dsv4.runtime.load.check import DeviceCheck, device_hash, on_device
from dsv4.runtime.load.files import FileTable, OpenFile, cached_share
from dsv4.runtime.load.jobs import make_jobs
from dsv4.runtime.load.plan import Span
from dsv4.runtime.load.readers import Readers


@st.composite
def _spans(draw: st.DrawFn) -> list[Span]:
    spans, at = [], 0
    for number in range(draw(st.integers(1, 12))):
        chunk, chunks = draw(st.integers(1, 50)), draw(st.integers(1, 20))
        file = FileSpec(f"a{number}/c/0", (0, chunks), chunks, chunk, chunks > 1)
        first = draw(st.integers(0, chunks - 1))
        last = draw(st.integers(first + 1, chunks))
        spans.append(Span(file, first * chunk, last * chunk, at))
        at += -(-spans[-1].nbytes // 64) * 64
    return spans


@given(_spans(), st.integers(1, 200))
def test_jobs_cover_every_byte_once(spans: list[Span], slot: int) -> None:
    jobs = make_jobs(spans, slot, lambda file: True)
    places: list[tuple[int, str, int]] = []
    for job in jobs:
        assert job.nbytes <= slot or (
            len(job.spans) == 1 and job.nbytes == job.spans[0].file.chunk_nbytes
        )
        for span in job.spans:
            assert span.begin % span.file.chunk_nbytes == 0 == span.nbytes % span.file.chunk_nbytes
            assert job.at <= span.at
            places += [(span.at + i, span.file.key, span.begin + i) for i in range(span.nbytes)]
    wanted = [(s.at + i, s.file.key, s.begin + i) for s in spans for i in range(s.nbytes)]
    assert sorted(places) == sorted(wanted)
    large = [job.nbytes > slot for job in jobs]
    assert large == sorted(large, reverse=True)


class LateArena(HostArena):
    """Copies as late as it may: when the slot is wanted again, or at the end."""

    waits = True

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self.bytes.fill_(0xA5)  # or it may hold what the last test left there
        self._queued: list[tuple[Slot, int, int]] = []
        self._lock = threading.Lock()

    def copy(self, slot: Slot, nbytes: int, at: int) -> None:
        with self._lock:
            self._queued.append((slot, nbytes, at))

    def reuse(self, slot: Slot) -> None:
        if self.waits:
            self._deliver(lambda queued: queued is slot)

    def settle(self) -> None:
        self._deliver(lambda queued: True)

    def _deliver(self, due: Callable[[Slot], bool]) -> None:
        with self._lock:
            now = [one for one in self._queued if due(one[0])]
            self._queued = [one for one in self._queued if not due(one[0])]
            for slot, nbytes, at in now:
                super().copy(slot, nbytes, at)


class HastyArena(LateArena):
    """Does not wait for a copy before the slot is used again."""

    waits = False


@pytest.mark.parametrize(("kind", "right"), [(LateArena, True), (HastyArena, False)])
def test_a_slot_is_filled_again_only_when_it_was_copied(
    sample: PackedStore, kind: type[LateArena], right: bool
) -> None:
    plan = plan_load(sample)
    wanted = load_weights(sample, "cpu", settings=Settings(readers=1))
    arena = kind(plan.nbytes)
    jobs = make_jobs(plan.spans(), 16 << 10, lambda file: True)
    with arena.slots(4, 16 << 10) as slots:
        Readers(sample, arena, hashes=lambda file: True).run(jobs, [slots[:2], slots[2:]])
    equal = all(
        torch.equal(
            arena.bytes[placed.at : placed.at + placed.nbytes],
            wanted.share_of(path).reshape(-1).view(torch.uint8),
        )
        for path, placed in plan.arrays.items()
    )
    assert equal is right


@pytest.mark.parametrize("kind", [LateArena, HastyArena])
def test_the_device_s_checksums_prove_the_copy_too(
    sample: PackedStore, kind: type[LateArena]
) -> None:
    """All that was read is right; a slot that was filled again too soon is not."""
    plan = plan_load(sample)
    arena = kind(plan.nbytes)
    jobs = make_jobs(plan.spans(), 16 << 10, lambda file: not on_device(file))
    check = DeviceCheck(sample, plan, arena, jobs, device_hash(torch.device("cpu")))
    readers = Readers(sample, arena, hashes=lambda file: not on_device(file), check=check)
    if kind is HastyArena:
        arena.settle = lambda: None  # type: ignore[method-assign]  # hashing would deliver
    with arena.slots(4, 16 << 10) as slots:
        readers.run(jobs, [slots[:2], slots[2:]])
    LateArena.settle(arena)
    if kind is LateArena:
        check.finish()
        hashed = plan.payload_nbytes - readers.spent.verified_bytes
        assert check.nbytes == hashed > 0
        return
    with pytest.raises(StoreError, match="does not match its checksum"):
        check.finish()


def _descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_file_that_many_open_at_once_is_open_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    file = FileSpec("file", (0, 1), 1, 100, False)
    table = FileTable(tmp_path, [file] * 8, direct=False)
    table._open.popitem()[1].close()  # it was opened ahead
    before = _descriptors()
    together, found = threading.Barrier(8), set()

    def get() -> None:
        together.wait()
        found.add(table.get(file))

    threads = [threading.Thread(target=get) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 1 and _descriptors() == before + 1
    for left in range(8):
        assert _descriptors() == before + 1, f"closed after {left} of 8 uses"
        table.release(file)
    assert _descriptors() == before


def test_files_are_opened_ahead_and_closed_behind(
    sample: PackedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "AHEAD", 2)
    files = [span.file for span in plan_load(sample).spans()]
    before = _descriptors()
    table = FileTable(sample.root, files, direct=False)
    for number, file in enumerate(files):
        assert _descriptors() == before + min(2, len(files) - number)
        table.get(file)
        table.release(file)
    assert _descriptors() == before


def _lock_is_free_during(work: Callable[[], object]) -> bool:
    """Whether another thread goes on while `work` runs in one call, without a switch of turns."""
    started, finished = threading.Event(), [0.0]

    def run() -> None:
        started.set()
        work()
        finished[0] = time.perf_counter()

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=run)
    try:
        sys.setswitchinterval(100.0)  # nobody is made to give up the lock
        thread.start()
        started.wait()
        resumed = time.perf_counter()
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    return resumed < finished[0]


def test_reading_and_hashing_happen_outside_the_interpreters_lock(tmp_path: Path) -> None:
    memory = memoryview(mmap.mmap(-1, 256 << 20))
    path = tmp_path / "zeros"
    with path.open("wb") as stream:
        stream.truncate(len(memory))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert _lock_is_free_during(lambda: os.preadv(descriptor, [memory], 0))
    finally:
        os.close(descriptor)
    assert _lock_is_free_during(lambda: xxhash.xxh3_64_intdigest(memory))
    assert _lock_is_free_during(lambda: xxhash.xxh3_64().update(memory))
    numbers = list(range(3_000_000))
    assert not _lock_is_free_during(lambda: sum(numbers))  # what holding it looks like


@pytest.fixture
def on_disk(tmp_path: Path) -> tuple[Path, FileSpec, bytes]:
    """A file of 3 MiB and a ragged tail, on disk and nowhere else."""
    raw = os.urandom((3 << 20) + 1000)
    file = FileSpec("file", (0, 1), 1, len(raw), False)
    (tmp_path / "file").write_bytes(raw)
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    os.fsync(descriptor)
    try:
        os.close(os.open(tmp_path / "file", os.O_RDONLY | os.O_DIRECT))
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if cached_share(descriptor, 0, len(raw)) != 0.0:
            pytest.skip("the file system keeps files in memory, or does not say so")
    except OSError:
        pytest.skip("the file system has no O_DIRECT")
    finally:
        os.close(descriptor)
    return tmp_path, file, raw


def test_what_is_not_cached_goes_past_the_page_cache(on_disk: tuple[Path, FileSpec, bytes]) -> None:
    root, file, raw = on_disk
    memory = memoryview(mmap.mmap(-1, 4 << 20))
    whole = memory[: len(raw)]
    opened = OpenFile(root, file, direct=True)
    assert opened.read(0, whole) == len(raw) // 4096 * 4096
    assert whole == raw
    assert cached_share(opened._plain, 0, 3 << 20) == 0.0
    opened.close()
    opened = OpenFile(root, file, direct=False)
    assert opened.read(0, whole) == 0
    assert whole == raw
    opened.close()
    opened = OpenFile(root, file, direct=True)  # it is cached now
    assert opened.read(0, whole) == 0
    assert whole == raw
    opened.close()


def test_direct_reads_of_a_store_are_the_same(
    sample: PackedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "SMALLEST_DIRECT", 4096)
    for file in sample.files_under(None):
        descriptor = os.open(sample.root / file.key, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    for slot in (4096, 12 << 10, 1 << 20):
        report = load_weights(
            sample, "cpu", settings=Settings(readers=2, slot_nbytes=slot, direct=True)
        ).reports[0]
        assert report.spent.verified_bytes == report.nbytes
