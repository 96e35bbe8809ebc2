"""Bulk copies, tensor memory and the block-scaled FP4 multiplication.

Sources: PTX ISA 9.1, sections on cp.async.bulk.tensor and tcgen05: shared memory descriptor,
instruction descriptor for .kind::mxf4nvf4 (table 44), block scaling, tcgen05.cp, tcgen05.ld.
"""

from __future__ import annotations

import dataclasses
import random
import struct
from collections.abc import Callable

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tests.support.interpreter.memory import GlobalMemory, SharedMemory

COLUMNS, LANES = 512, 128
_WIDTHS = {0: 8, 10: 16, 11: 4}  # of tensor maps: bits of an element
_SWIZZLES = {0: 0, 6: 1, 4: 2, 2: 3}  # of matrix descriptors: bits of the row mixed in


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """address; rank; strides in bytes; sizes in elements of `width` bits, of a box as well.

    swizzle: how many bits of the row number are mixed into the 16-byte column.
    """

    address: int
    rank: int
    strides: tuple[int, ...]
    sizes: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int
    width: int

    @classmethod
    def decode(cls, raw: bytes) -> TensorMap:
        """The 128 bytes that the host makes."""
        (address,) = struct.unpack_from("<Q", raw, 0)
        flags, *strides = struct.unpack_from("<5I", raw, 8)
        sizes, box = struct.unpack_from("<5I", raw, 32), raw[55:60]
        rank = (flags >> 4 & 7) + 1
        return cls(
            address,
            rank,
            tuple(16 * s for s in strides[: rank - 1]),
            tuple(s + 1 for s in sizes[:rank]),
            tuple(b + 1 for b in box[:rank]),
            flags >> 13 & 3,
            _WIDTHS[flags >> 7 & 15],
        )

    def fetch(self, memory: GlobalMemory, at: tuple[int, ...]) -> NDArray[np.uint8]:
        """Bytes of the box at coordinates `at`, rows one after another; zero outside."""
        row_bytes = self._bytes(self.box[0])
        rows = [(0, True)]
        for dim in range(self.rank - 1, 0, -1):
            rows = [
                (
                    offset + (at[dim] + i) * self.strides[dim - 1],
                    inside and 0 <= at[dim] + i < self.sizes[dim],
                )
                for offset, inside in rows
                for i in range(self.box[dim])
            ]
        out = np.zeros((len(rows), row_bytes), dtype=np.uint8)
        begin, end = max(at[0], 0), min(at[0] + self.box[0], self.sizes[0])
        for row, (offset, inside) in enumerate(rows):
            if inside and begin < end:
                place = self.address + offset + self._bytes(begin)
                first, count = self._bytes(begin - at[0]), self._bytes(end - begin)
                out[row, first : first + count] = memory.view(place, count)
        return out

    def _bytes(self, elements: int) -> int:
        return elements * self.width // 8


def swizzled(address: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Bits 7… of a shared address mixed into its bits 4…, `width` of them."""
    mask = ((1 << width) - 1) << 4
    return address ^ ((address >> 3) & mask)


class Device:
    """One CTA's asynchronous units. Copies complete in any order, tensor operations in theirs."""

    def __init__(self, memory: GlobalMemory, shared: SharedMemory, seed: int) -> None:
        self.memory, self.shared = memory, shared
        self.tensor = np.full((LANES, COLUMNS), 0x7FFFFFFF, dtype=np.uint32)
        self.copies: list[Callable[[], None]] = []
        self.tensor_queue: list[Callable[[], None]] = []
        self.random = random.Random(seed)
        self.allocated = 0

    def progress(self) -> bool:
        """Complete one waiting operation; whether there was one."""
        units = [unit for unit in (self.copies, self.tensor_queue) if unit]
        if not units:
            return False
        unit = self.random.choice(units)
        index = self.random.randrange(len(unit)) if unit is self.copies else 0
        unit.pop(index)()
        return True

    def copy_bulk(self, target: int, source: int, count: int, barrier: int) -> None:
        """cp.async.bulk: a run of bytes."""
        assert target % 16 == source % 16 == count % 16 == 0

        def run() -> None:
            self.shared.view(target, count)[:] = self.memory.view(source, count)
            self._copied(barrier, count)

        self.copies.append(run)

    def receive(self, target: int, raw: bytes, barrier: int) -> None:
        """st.async: bytes from another CTA."""

        def run() -> None:
            self.shared.view(target, len(raw))[:] = np.frombuffer(raw, dtype=np.uint8)
            own = self.shared.barriers[barrier]
            own.bytes -= len(raw)  # may come before it is announced here
            own.settle()

        self.copies.append(run)

    def copy_tensor(self, target: int, tensor: TensorMap, at: tuple[int, ...], bar: int) -> None:
        """cp.async.bulk.tensor: a box, swizzled."""
        assert target % (128 << tensor.swizzle) == 0 and len(at) == tensor.rank

        def run() -> None:
            box = tensor.fetch(self.memory, at)
            places = swizzled(target + np.arange(box.size), tensor.swizzle)
            self.shared.view(target, box.size)
            self.shared.data[places] = box.reshape(-1)
            self._copied(bar, box.size)

        self.copies.append(run)

    def _copied(self, barrier: int, count: int) -> None:
        own = self.shared.barriers[barrier]
        own.bytes -= count
        assert own.bytes >= 0, "more bytes than were announced"
        own.settle()

    def commit(self, barrier: int) -> None:
        """tcgen05.commit: arrive when everything before is done."""
        self.tensor_queue.append(lambda: self.shared.barriers[barrier].arrive())

    def copy_scales(self, place: int, descriptor: int) -> None:
        """tcgen05.cp.32x128b.warpx4: 32 rows of 16 bytes to the same lanes of all four warps."""

        def run() -> None:
            address, group, swizzle = _matrix(descriptor)
            assert swizzle == 0
            rows = np.arange(32)
            starts = address + rows // 8 * group + rows % 8 * 16
            data = self.shared.data[starts[:, None] + np.arange(16)]
            words = np.ascontiguousarray(data).view(np.uint32)
            column = place & 0xFFFF
            self.tensor[:, column : column + 4] = np.tile(words, (4, 1))

        self.tensor_queue.append(run)

    def multiply(
        self, acc: int, a: int, b: int, instruction: int, scales: tuple[int, int], add: bool
    ) -> None:
        """tcgen05.mma.kind::mxf4nvf4.block_scale.block16: [128, N] += [128, 64] · [N, 64]ᵀ."""
        columns = (instruction >> 17 & 63) * 8
        expected = 1 << 7 | 1 << 10 | columns // 8 << 17 | 1 << 27
        assert instruction == expected, "E2M1 by E2M1, UE4M3 scales in whole words, M = 128"

        def run() -> None:
            values = [self._codes(a, LANES), self._codes(b, columns)]
            for value, place, rows in zip(values, scales, (LANES, columns), strict=True):
                value *= np.repeat(self._scales(place, rows), 16, axis=1)
            target = self.tensor[:, acc & 0xFFFF : (acc & 0xFFFF) + columns].view(np.float32)
            before = target.astype(np.float64) if add else 0.0
            target[:] = (before + values[0] @ values[1].T).astype(np.float32)

        self.tensor_queue.append(run)

    def _codes(self, descriptor: int, rows: int) -> NDArray[np.float64]:
        """64 columns of an operand, K contiguous, swizzled."""
        address, group, swizzle = _matrix(descriptor)
        pitch = 16 << swizzle
        row = np.arange(rows)
        starts = address + row // 8 * group + row % 8 * pitch
        places = swizzled(starts[:, None] + np.arange(32), swizzle)
        raw = self.shared.data[places]
        codes = np.stack((raw & 15, raw >> 4), axis=-1).reshape(rows, 64)
        values: NDArray[np.float64] = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
        return values

    def _scales(self, place: int, rows: int) -> NDArray[np.float64]:
        """Row r's four scales are a word of lane r % 32, column r / 32."""
        column = place & 0xFFFF
        parts = self.tensor[:, column : column + rows // 32].reshape(4, 32, -1)
        assert (parts == parts[0]).all(), "all four partitions of the lanes hold the scales"
        words = parts[0].T.reshape(rows)
        raw = np.ascontiguousarray(words).view(np.uint8).reshape(rows, 4)
        assert not (raw & 0x80).any(), "a scale that was never copied, or is negative"
        values: NDArray[np.float64] = raw.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        return values


def _matrix(descriptor: int) -> tuple[int, int, int]:
    """(address, bytes between groups of 8 rows, swizzle) of a shared-memory descriptor."""
    assert descriptor >> 46 & 7 == 1, "the version of Blackwell"
    address, group = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    assert descriptor >> 49 & 7 == 0, "matrices begin where their pattern does"
    return address, group, _SWIZZLES[descriptor >> 61 & 7]
