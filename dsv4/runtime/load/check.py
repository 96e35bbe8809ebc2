"""Checksums on the device: chunks are hashed where they ended up, so the copy is proved as well.

The arena is cut into waves of about equal size. When every job of a wave has been queued for
copying, and so have those of the waves before, a kernel over the wave's chunks is queued behind the
copies on a stream of its own: hashing runs while later bytes are still on the bus, and costs what
the last wave takes. XXH3 of 16 KiB to 100 MiB chunks runs at several hundred GB/s on a Hopper GPU.

Chunks of a length that is no multiple of 1 KiB, all of them small, are left to the readers.
"""

from __future__ import annotations

import bisect
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dsv4.formats.errors import KernelError, StoreError
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import FileSpec
from dsv4.kernels.core.library import Library, architecture
from dsv4.kernels.ops.xxh3.contract import LINE_BYTES, xxh3
from dsv4.kernels.reference.xxh3 import BLOCK_BYTES, LANES, accumulators, digests, secret_words
from dsv4.runtime.load.arena import Arena, CudaArena
from dsv4.runtime.load.jobs import Job
from dsv4.runtime.load.plan import Plan, Span

WAVES = 8

Int64s = npt.NDArray[np.int64]
Hash = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""(arena `[rows, 4096]`, places `[C, 2]`, secret, accumulators `[C, 8]`) on the current stream."""


def on_device(file: FileSpec) -> bool:
    """Whether the kernel can hash its chunks."""
    return file.chunk_nbytes % BLOCK_BYTES == 0


def device_hash(device: torch.device) -> Hash:
    """The kernel for `device`; on the CPU its reference. Raises KernelError when it is not built.

    The reference is plain torch, for tests: thousands of times slower.
    """
    if device.type == "cpu":
        return _reference
    function: Hash = Library(None, architecture(device)).function(xxh3())
    return function


def damaged(store: PackedStore, file: FileSpec, chunk: int) -> StoreError:
    """What to say of a chunk that is not what was written."""
    size = file.chunk_nbytes
    return StoreError(
        f"{store.root}: {file.key}: chunk {chunk} (bytes {chunk * size} to {(chunk + 1) * size}) "
        "does not match its checksum; `dsv4 repair` mends it"
    )


class DeviceCheck:
    """Hashes the chunks of a plan as its jobs are copied."""

    def __init__(
        self, store: PackedStore, plan: Plan, arena: Arena, jobs: Sequence[Job], run: Hash
    ) -> None:
        self._store, self._arena, self._run = store, arena, run
        self._spans = [span for span in plan.spans() if on_device(span.file)]
        self._firsts = [0]  # number of the first chunk of each span
        device = arena.bytes.device
        places, expected = _chunks(store, self._spans, self._firsts)
        self.chunks = len(places)
        self.nbytes = int(places[:, 1].sum())
        self._sizes, self._expected = torch.from_numpy(places[:, 1]), torch.from_numpy(expected)
        self._places = torch.from_numpy(places).to(device)
        self._acc = torch.empty(self.chunks, LANES, dtype=torch.int64, device=device)
        self._secret = secret_words(device)
        ordered = sorted(jobs, key=lambda job: job.at)
        job_ends = np.array([job.at + job.nbytes for job in ordered])
        waves = np.minimum(job_ends * WAVES // plan.nbytes, WAVES - 1)
        self._wave_of = dict(zip((job.at for job in ordered), waves.tolist(), strict=True))
        self._left = np.bincount(waves, minlength=WAVES).tolist()
        # A chunk belongs to the wave of the job that brings its last byte.
        chunk_waves = waves[np.searchsorted(job_ends, places.sum(1))]
        self._bounds = [0, *np.searchsorted(chunk_waves, np.arange(WAVES), "right").tolist()]
        self._next = 0
        self._lock = threading.Lock()
        self._queue = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            if isinstance(arena, CudaArena)
            else None
        )
        if self._queue is not None:  # what was uploaded above is there before the first wave
            self._queue.wait_stream(torch.cuda.current_stream(device))

    def copied(self, job: Job) -> None:
        """A job's copy is queued: hash the waves that are complete with it."""
        with self._lock:
            self._left[self._wave_of[job.at]] -= 1
            first = self._next
            while self._next < WAVES and not self._left[self._next]:
                self._next += 1
            last = self._next
        self._hash(self._bounds[first], self._bounds[last])

    def finish(self) -> None:
        """Wait, and compare. Raises StoreError naming the first damaged chunk.

        On the host: torch would load a dozen kernels for it, which takes 80 ms in a new process.
        """
        with self._on_queue():
            sums = self._acc.cpu()
        found = (digests(sums, self._sizes) != self._expected).nonzero()[:1, 0].tolist()
        if found:
            index = bisect.bisect_right(self._firsts, found[0]) - 1
            span = self._spans[index]
            first = span.begin // span.file.chunk_nbytes
            raise damaged(self._store, span.file, first + found[0] - self._firsts[index])

    def _hash(self, begin: int, end: int) -> None:
        if begin == end:
            return
        with self._on_queue():
            self._run(
                self._arena.bytes.view(-1, LINE_BYTES),
                self._places[begin:end],
                self._secret,
                self._acc[begin:end],
            )

    @contextlib.contextmanager
    def _on_queue(self) -> Iterator[None]:
        """Work goes behind all copies queued so far."""
        if self._queue is None or not isinstance(self._arena, CudaArena):
            self._arena.settle()
            yield
            return
        self._queue.wait_stream(self._arena.stream)
        with torch.cuda.stream(self._queue):
            yield


def _chunks(
    store: PackedStore, spans: Sequence[Span], firsts: list[int]
) -> tuple[
    np.ndarray[tuple[int, int], np.dtype[np.int64]], np.ndarray[tuple[int], np.dtype[np.int64]]
]:
    """-> (first byte in the arena and length, digest) of every chunk; `firsts` gets each span's."""
    places, expected = [], []
    for span in spans:
        size = span.file.chunk_nbytes
        count = span.nbytes // size
        begins = span.at + size * np.arange(count, dtype=np.int64)
        places.append(np.stack((begins, np.full(count, size, np.int64)), 1))
        first = span.begin // size
        expected.append(store.chunk_digests(span.file.key)[first : first + count])
        firsts.append(firsts[-1] + count)
    if not places:
        return np.empty((0, 2), np.int64), np.empty(0, np.int64)
    return np.concatenate(places), np.concatenate(expected).astype(np.uint64).view(np.int64)


def _reference(data: Tensor, places: Tensor, secret: Tensor, acc: Tensor) -> None:
    flat = data.view(-1)
    for index, (begin, size) in enumerate(places.tolist()):
        acc[index] = accumulators(flat[None, begin : begin + size])[0]


def find_hash(device: torch.device, how: str) -> tuple[Hash | None, str]:
    """-> (the function for `how` "auto" or "device", or None; why it is None).

    Raises KernelError when the device is asked for by name and cannot.
    """
    if how == "readers" or (how == "auto" and device.type == "cpu"):
        return None, ""
    try:
        return device_hash(device), ""
    except KernelError as error:
        if how == "device":
            raise
        return None, str(error)
