"""What a load took, phase by phase, beside what the machine can do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from dsv4.runtime.load.readers import Spent


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """One load. nbytes: payload read. Seconds are of the wall clock, in `spent` of all readers.

    place: seconds for the arena and the ring; move: from the first read to the last copy.
    """

    nbytes: int
    arena_nbytes: int
    device: str
    readers: int
    ring_nbytes: int
    verified: bool
    place: float
    move: float
    spent: Spent

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.place + self.move

    @property
    def rate(self) -> float:
        """Bytes a second while bytes moved."""
        return self.nbytes / self.move

    def phases(self) -> Iterator[tuple[str, float, float]]:
        """(phase, its thread-seconds, bytes a second at which all readers would do it alone)."""
        for phase in ("read", "verify"):
            if seconds := getattr(self.spent, phase):
                yield phase, seconds, self.nbytes * self.readers / seconds

    def lines(self, bus: float | None = None, disk: float | None = None) -> Iterator[str]:
        """For people. bus, disk: this machine's measured bytes a second, for the fractions."""
        share = self.spent.direct_bytes / max(self.nbytes, 1)
        yield (
            f"load    {self.nbytes / 1e9:.2f} GB to {self.device} in {self.move:.3f} s, "
            f"{self.rate / 1e9:.1f} GB/s{_of(self.rate, bus, 'bus')}{_of(self.rate, disk, 'disk')}"
        )
        yield (
            f"place   {self.place:.3f} s: arena {self.arena_nbytes / 1e9:.2f} GB, ring "
            f"{self.ring_nbytes / 2**20:.0f} MiB, {self.readers} readers"
        )
        for phase, seconds, rate in self.phases():
            detail = (
                f"; {share:.0%} past the page cache"
                if phase == "read"
                else f"; {self.spent.chunks} chunks, XXH3"
            )
            yield (
                f"{phase:<7} {seconds:.3f} thread-s, alone {rate / 1e9:.1f} GB/s"
                f"{_of(rate, disk if phase == 'read' and share > 0.5 else bus, None)}{detail}"
            )
        if not self.verified:
            yield "verify  off: what was loaded was not compared with its checksums"
        yield f"copy    {self.spent.wait:.3f} thread-s waited for{_of(self.rate, bus, 'bus')}"


def _of(rate: float, bound: float | None, what: str | None) -> str:
    if not bound:
        return ""
    return f", {rate / bound:.2f} of {what} {bound / 1e9:.1f}" if what else ""
