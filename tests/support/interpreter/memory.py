"""Global and shared memory, and the barriers that live in the latter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Places = NDArray[np.int64]
SHARED_BASE = 1024
_NEAR = 1 << 20  # addresses farther apart may be of several buffers or CTAs
_PAGE = 1 << 33  # apart, so that no offset leads from one buffer into another


class Memory:
    """Bytes by address."""

    def view(self, address: int, count: int) -> Bytes:
        """`count` bytes at `address`; raises IndexError outside."""
        raise NotImplementedError

    def read(self, addresses: Places, count: int) -> Bytes:
        """`count` bytes at each address: `[addresses, count]`."""
        first, span = int(addresses.min()), int(np.ptp(addresses)) + count
        if span > _NEAR:
            return np.stack([self.view(address, count) for address in addresses.tolist()])
        return np.asarray(self.view(first, span)[_bytes_of(addresses - first, count)])

    def write(self, addresses: Places, data: Bytes) -> None:
        """data: `[addresses, count]`; where some overlap, the last one stays."""
        count = data.shape[1]
        first, span = int(addresses.min()), int(np.ptp(addresses)) + count
        if span > _NEAR:
            for address, one in zip(addresses.tolist(), data, strict=True):
                self.view(address, count)[:] = one
        else:
            self.view(first, span)[_bytes_of(addresses - first, count)] = data


def _bytes_of(places: Places, count: int) -> Places:
    return np.asarray(places[:, None] + np.arange(count))


class GlobalMemory(Memory):
    """Buffers by address; nothing but them can be touched."""

    def __init__(self, buffers: Mapping[str, Bytes]) -> None:
        self.address = {name: (i + 1) * _PAGE for i, name in enumerate(buffers)}
        self._buffers = list(buffers.values())

    def view(self, address: int, count: int) -> Bytes:
        """`count` bytes at `address`; raises IndexError outside of a buffer."""
        which, offset = divmod(address, _PAGE)
        if not 1 <= which <= len(self._buffers):
            raise IndexError(f"address {address:#x} is in no buffer")
        buffer = self._buffers[which - 1]
        if offset + count > len(buffer):
            raise IndexError(f"bytes {offset}..{offset + count} of a buffer of {len(buffer)}")
        return buffer[offset : offset + count]


@dataclasses.dataclass
class Barrier:
    """expected: arrivals a phase; pending: still to come; bytes: announced and not yet copied."""

    expected: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def arrive(self, count: int = 1) -> None:
        """Count arrivals."""
        if count > self.pending:
            raise RuntimeError(f"{count} arrivals at a barrier that waits for {self.pending}")
        self.pending -= count
        self.settle()

    def settle(self) -> None:
        """End the phase when nothing is missing."""
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.expected


RANK = 1 << 24  # from one CTA of a cluster to the next


class SharedMemory(Memory):
    """Bytes from SHARED_BASE on, poisoned, and barriers by address."""

    def __init__(self, size: int) -> None:
        self.data = np.full(SHARED_BASE + size, 0xFF, dtype=np.uint8)
        self.barriers: dict[int, Barrier] = {}

    def view(self, address: int, count: int) -> Bytes:
        """`count` bytes at `address`; raises IndexError outside of what was allocated."""
        if address < SHARED_BASE or address + count > len(self.data):
            raise IndexError(f"shared bytes {address}..{address + count} of {len(self.data)}")
        return self.data[address : address + count]
