"""Where weights end up: one allocation on the device, filled through a small ring of host memory.

A *slot* is a piece of host memory that a reader fills and hands to `copy`; `reuse` waits until it
may be filled again. On a GPU slots are pinned and copies run on their own stream, so that disk,
checksums and bus work at the same time. The driver itself queues them: torch holds the
interpreter's lock several times as long, and with a dozen readers that lock is the bound. On the
CPU the arena is host memory, a copy is a copy, and everything else is the same code.
"""

from __future__ import annotations

import abc
import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dsv4.formats.errors import OutOfSpaceError, RuntimeRefusal
from dsv4.formats.plain_text import size
from dsv4.runtime.cuda_driver import Driver

HUGE_PAGE = 2 << 20
HEADROOM = 256 << 20  # bytes of a device that stay free besides the arena
_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USE = Path("/sys/fs/cgroup/memory.current")
_CGROUP_PARTS = Path("/sys/fs/cgroup/memory.stat")


class Slot:
    """A piece of host memory on its way to the arena. memory: its bytes, page-aligned."""

    def __init__(self, tensor: Tensor, event: int = 0) -> None:
        self.tensor, self.event = tensor, event
        self.memory: memoryview = tensor.numpy().data
        self.address = tensor.data_ptr()


class Arena(abc.ABC):
    """nbytes of memory on a device. bytes: all of it, uint8."""

    bytes: Tensor

    @abc.abstractmethod
    def slots(self, count: int, nbytes: int) -> contextlib.AbstractContextManager[list[Slot]]:
        """Host memory for a ring: `count` slots of `nbytes`."""

    @abc.abstractmethod
    def enter(self) -> None:
        """To be called by each thread that copies."""

    def target(self, slot: Slot, nbytes: int, at: int) -> memoryview:
        """Where a reader puts the `nbytes` bytes that are to be at byte `at`: in the slot."""
        return slot.memory[:nbytes]

    @abc.abstractmethod
    def copy(self, slot: Slot, nbytes: int, at: int) -> None:
        """Begin to copy the first `nbytes` of a slot to byte `at`."""

    @abc.abstractmethod
    def reuse(self, slot: Slot) -> None:
        """Wait until what a slot held last has been copied."""

    @abc.abstractmethod
    def settle(self) -> None:
        """Wait for all copies; what lies in the arena is then visible to every stream."""


class HostArena(Arena):
    """An arena in host memory."""

    def __init__(self, nbytes: int) -> None:
        self.bytes = _allocate(nbytes, torch.device("cpu"))

    @contextlib.contextmanager
    def slots(self, count: int, nbytes: int) -> Iterator[list[Slot]]:
        """Anonymous memory."""
        yield [Slot(part) for part in host_memory(count * nbytes).view(count, nbytes)]

    def enter(self) -> None:
        """Nothing has to be prepared."""

    def copy(self, slot: Slot, nbytes: int, at: int) -> None:
        """Copies at once."""
        self.bytes[at : at + nbytes].copy_(slot.tensor[:nbytes])

    def reuse(self, slot: Slot) -> None:
        """It is free already."""

    def settle(self) -> None:
        """All is done already."""


class CudaArena(Arena):
    """An arena in a GPU's memory. stream: where copies are queued."""

    def __init__(self, memory: Tensor, stream: torch.cuda.Stream, driver: Driver) -> None:
        """memory: uint8, on the device whose context `driver` has."""
        self.bytes, self.stream, self._driver = memory, stream, driver
        self._base, self._handle = memory.data_ptr(), stream.cuda_stream

    @contextlib.contextmanager
    def slots(self, count: int, nbytes: int) -> Iterator[list[Slot]]:
        """Pinned memory."""
        memory, driver = host_memory(count * nbytes), self._driver
        events: list[int] = []
        driver.pin(memory.data_ptr(), len(memory))
        try:
            events += [driver.event() for _ in range(count)]
            yield [Slot(*one) for one in zip(memory.view(count, nbytes), events, strict=True)]
        finally:
            self.settle()
            for event in events:
                driver.destroy(event)
            driver.unpin(memory.data_ptr())

    def enter(self) -> None:
        """Copies go through the context that this thread then has."""
        self._driver.enter()

    def copy(self, slot: Slot, nbytes: int, at: int) -> None:
        """Queues the copy."""
        self._driver.copy(self._base + at, slot.address, nbytes, self._handle, slot.event)

    def reuse(self, slot: Slot) -> None:
        """Sleeps until its copy is done."""
        self._driver.wait(slot.event)

    def settle(self) -> None:
        """Waits for the stream."""
        self.stream.synchronize()


def make_arena(nbytes: int, device: torch.device, what: str) -> Arena:
    """An arena of `nbytes`. Raises OutOfSpaceError before anything is allocated if it cannot fit.

    what: whose weights, for the message. Raises RuntimeRefusal for a device that is not there.
    """
    require_memory(
        nbytes,
        device,
        f"{what}: the weights need",
        "load fewer parts (without draft layers or experts), a rank's share, or use a larger "
        "device",
    )
    if device.type == "cpu":
        return HostArena(nbytes)
    memory = _allocate(nbytes, device)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))  # whoever had this memory
    with torch.cuda.device(device):
        return CudaArena(memory, stream, Driver())


def require_memory(nbytes: int, device: torch.device, what: str, instead: str) -> None:
    """Raise OutOfSpaceError if `nbytes` and some headroom are not free on `device`.

    what: the message begins with, as "x needs"; instead: what to do, with which it ends.
    """
    free, name = free_memory(device)
    if nbytes + HEADROOM > free and device.type == "cuda":
        # What torch keeps for later use can be given back.
        torch.cuda.empty_cache()
        free, name = free_memory(device)
    if nbytes + HEADROOM > free:
        raise OutOfSpaceError(f"{what} {size(nbytes)}, {name} has {size(free)} free; {instead}")


def free_memory(device: torch.device) -> tuple[int, str]:
    """-> (bytes that can be allocated on `device`, what to call it)."""
    if device.type == "cpu":
        return _free_host_memory(), "this machine"
    if device.type != "cuda" or not torch.cuda.is_available():
        raise RuntimeRefusal(
            f"weights cannot be loaded to {device}: expected cpu, or a cuda device that torch sees"
        )
    return torch.cuda.mem_get_info(device)[0], f"{device} ({torch.cuda.get_device_name(device)})"


def _free_host_memory() -> int:
    fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) << 10
    with contextlib.suppress(OSError, ValueError, KeyError):
        limit, used = int(_CGROUP_LIMIT.read_text()), int(_CGROUP_USE.read_text())
        pairs = dict(line.split() for line in _CGROUP_PARTS.read_text().splitlines())
        cached = int(pairs["file"]) - int(pairs["shmem"])  # given up when memory is wanted
        free = min(free, limit - used + max(cached, 0))
    return free


def host_memory(nbytes: int) -> Tensor:
    """Anonymous memory that begins at a huge page, and consists of them where the system has some.

    Reads into it and its pinning are faster so; O_DIRECT needs less.
    """
    mapped = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    return memory[-memory.data_ptr() % HUGE_PAGE :][:nbytes]


def _allocate(nbytes: int, device: torch.device) -> Tensor:
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise OutOfSpaceError(f"{size(nbytes)} on {device}: {reason}") from None
