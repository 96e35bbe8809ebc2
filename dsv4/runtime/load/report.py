"""What a load took, phase by phase, beside what the machine can do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from dsv4.runtime.load.readers import Spent


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """One load. nbytes: payload read. Seconds are of the wall clock, in `spent` of all readers.

    place: seconds for the arena and the ring; move: from the first read until all is checked.
    verified: "device", "readers" or "off"; note: why not on the device, if that was wished for.
    check: seconds from the last copy until the device's checksums were compared.
    """

    nbytes: int
    arena_nbytes: int
    device: str
    readers: int
    ring_nbytes: int
    verified: str
    note: str
    place: float
    move: float
    check: float
    spent: Spent

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.place + self.move

    @property
    def rate(self) -> float:
        """Bytes a second while bytes moved."""
        return self.nbytes / self.move

    def lines(self, bus: float | None = None, disk: float | None = None) -> Iterator[str]:
        """For people. bus, disk: this machine's measured bytes a second, for the fractions."""
        spent, past = self.spent, self.spent.direct_bytes / max(self.nbytes, 1)
        yield (
            f"load    {self.nbytes / 1e9:.2f} GB to {self.device} in {self.move:.3f} s: "
            f"{_rate(self.rate, bus=bus, disk=disk)}"
        )
        yield (
            f"place   {self.place:.3f} s: arena {self.arena_nbytes / 1e9:.2f} GB, ring "
            f"{self.ring_nbytes / 2**20:.0f} MiB"
        )
        source = f"{past:.0%} past the page cache" if past else "page cache"
        yield f"read    {self._alone(spent.read, disk=disk if past else None)}; {source}"
        yield f"verify  {self._verify(bus)}"
        yield f"copy    {spent.copy:.3f} thread-s started and waited for, {self.readers} readers"

    def _verify(self, bus: float | None) -> str:
        if self.verified == "off":
            return "off: nothing was compared with its checksum"
        chunks = f"{self.spent.chunks} chunks, XXH3"
        if self.verified == "device":
            return f"on the device, {self.check:.3f} s after the last copy; {chunks}"
        note = f"; not on the device: {self.note}" if self.note else ""
        return f"{self._alone(self.spent.verify, bus=bus)}; {chunks}{note}"

    def _alone(self, seconds: float, **bounds: float | None) -> str:
        """A phase's thread-seconds, and the rate if all readers did nothing else."""
        rate = self.nbytes * self.readers / seconds if seconds else 0.0
        return f"{seconds:.3f} thread-s, alone {_rate(rate, **bounds)}"


def _rate(rate: float, **bounds: float | None) -> str:
    of = [f", {rate / bound:.2f} of the {name}" for name, bound in bounds.items() if bound]
    return f"{rate / 1e9:.2f} GB/s{''.join(of)}"
