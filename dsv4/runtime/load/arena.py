"""Where weights end up: one allocation on the device, filled through a small ring of host memory.

A *slot* is a piece of host memory that a reader fills and hands to `copy`; `reuse` waits until it
may be filled again. On a GPU slots are pinned and copies run on their own stream, so that disk,
checksums and bus work at the same time. On the CPU the arena is host memory, a copy is a copy, and
everything else is the same code.
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

HEADROOM = 256 << 20  # bytes of a device that stay free besides the arena
_MEMINFO = Path("/proc/meminfo")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USE = Path("/sys/fs/cgroup/memory.current")


class Slot:
    """A piece of host memory on its way to the arena. memory: its bytes, page-aligned."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.memory: memoryview = tensor.numpy().data
        self.event: torch.cuda.Event | None = None


class Arena(abc.ABC):
    """nbytes of memory on a device. bytes: all of it, uint8."""

    bytes: Tensor

    @abc.abstractmethod
    def slots(self, count: int, nbytes: int) -> list[Slot]:
        """Host memory for a ring: `count` slots of `nbytes`."""

    @abc.abstractmethod
    def thread(self) -> contextlib.AbstractContextManager[None]:
        """To be entered by each thread that copies."""

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

    def slots(self, count: int, nbytes: int) -> list[Slot]:
        """Anonymous memory, page-aligned for O_DIRECT."""
        whole = torch.frombuffer(mmap.mmap(-1, count * nbytes), dtype=torch.uint8)
        return [Slot(part) for part in whole.view(count, nbytes)]

    def thread(self) -> contextlib.AbstractContextManager[None]:
        """Nothing has to be prepared."""
        return contextlib.nullcontext()

    def copy(self, slot: Slot, nbytes: int, at: int) -> None:
        """Copies at once."""
        self.bytes[at : at + nbytes].copy_(slot.tensor[:nbytes])

    def reuse(self, slot: Slot) -> None:
        """It is free already."""

    def settle(self) -> None:
        """All is done already."""


class CudaArena(Arena):
    """An arena in a GPU's memory. stream: where copies are queued."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.device = device
        self.bytes = _allocate(nbytes, device)
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.stream.wait_stream(torch.cuda.current_stream(device))  # whoever had this memory

    def slots(self, count: int, nbytes: int) -> list[Slot]:
        """Pinned memory."""
        whole = torch.empty(count * nbytes, dtype=torch.uint8, pin_memory=True)
        return [Slot(part) for part in whole.view(count, nbytes)]

    @contextlib.contextmanager
    def thread(self) -> Iterator[None]:
        """Copies of this thread go to the arena's stream."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            yield

    def copy(self, slot: Slot, nbytes: int, at: int) -> None:
        """Queues the copy."""
        source = slot.tensor if nbytes == len(slot.memory) else slot.tensor[:nbytes]
        self.bytes[at : at + nbytes].copy_(source, non_blocking=True)
        if slot.event is None:
            # Waiting threads sleep: their cores are needed by those who read.
            slot.event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        slot.event.record(self.stream)

    def reuse(self, slot: Slot) -> None:
        """Sleeps until its copy is done."""
        if slot.event is not None:
            slot.event.synchronize()

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
    return CudaArena(nbytes, device) if device.type == "cuda" else HostArena(nbytes)


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
        raise OutOfSpaceError(
            f"{what} {nbytes / 1e9:.1f} GB, {name} has {free / 1e9:.1f} GB free; {instead}"
        )


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
    with contextlib.suppress(OSError, ValueError):
        free = min(free, int(_CGROUP_LIMIT.read_text()) - int(_CGROUP_USE.read_text()))
    return free


def _allocate(nbytes: int, device: torch.device) -> Tensor:
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise OutOfSpaceError(f"{nbytes / 1e9:.1f} GB on {device}: {reason}") from None
