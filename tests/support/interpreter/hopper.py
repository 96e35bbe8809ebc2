"""What Hopper kernels use besides: copies of single threads, and products of bfloat16 tiles.

Sources: PTX ISA 9.1, sections on cp.async, mma.m16n8k16, and wgmma with its matrix descriptors. A
copy's bytes arrive only when its thread waits for them, or at some time before a barrier that it
arrives at after them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tests.support.interpreter.arithmetic import Bits, bits, f32
from tests.support.interpreter.blackwell import swizzled
from tests.support.interpreter.memory import Bytes


@dataclasses.dataclass
class Copy:
    """target: bytes, zero beyond the source's."""

    target: Bytes
    source: Bytes
    done: bool = False

    def run(self) -> None:
        """Copy, once."""
        if not self.done:
            self.target[:] = 0
            self.target[: len(self.source)] = self.source
            self.done = True


class Copies:
    """A warp's copies under way: target and source, in groups."""

    def __init__(self) -> None:
        self.open: list[Copy] = []
        self.groups: list[list[Copy]] = []

    def commit(self) -> None:
        """Close a group."""
        self.groups.append(self.open)
        self.open = []

    def wait(self, pending: int) -> None:
        """Until at most `pending` groups are under way."""
        while len(self.groups) > pending:
            for copy in self.groups.pop(0):
                copy.run()

    def under_way(self) -> list[Copy]:
        """All of them."""
        return [copy for group in [*self.groups, self.open] for copy in group]


def pair(words: Bits) -> NDArray[np.float64]:
    """Words of two bfloat16: `[..., 2]`."""
    halves = np.stack((words & np.uint64(0xFFFF), words >> np.uint64(16)), -1)
    return np.asarray(halves.astype(np.uint16).view(ml_dtypes.bfloat16), dtype=np.float64)


def multiply(a: Sequence[Bits], b: Sequence[Bits], c: Sequence[Bits]) -> list[Bits]:
    """mma.m16n8k16 of a warp: lane 4g + t has rows g and g + 8, columns 2t and 2t + 8 and next."""
    group, t = np.arange(32) // 4, np.arange(32) % 4
    left, right, acc = rows_of(a), np.zeros((16, 8)), np.zeros((16, 8))
    for n in range(4):
        for i in range(2):
            right[2 * t + 8 * (n % 2) + i, group] = pair(b[n % 2])[:, i]
        acc[group + 8 * (n // 2), 2 * t + n % 2] = f32(c[n])
    acc = (acc + left @ right).astype(np.float32)
    return [bits(acc[group + 8 * (n // 2), 2 * t + n % 2]) for n in range(4)]


def multiply_pairs(a: Bits, b: Bits) -> Bits:
    """mul.rn.bf16x2."""
    product = (pair(a) * pair(b)).astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint64)
    return np.asarray(product[:, 0] | (product[:, 1] << np.uint64(16)))


class Products:
    """A warp's asynchronous products, in groups: each is computed when it is waited for."""

    def __init__(self) -> None:
        self.open: list[Callable[[], None]] = []
        self.groups: list[list[Callable[[], None]]] = []

    def commit(self) -> None:
        """Close a group."""
        self.groups.append(self.open)
        self.open = []

    def wait(self, pending: int) -> None:
        """Until at most `pending` groups are under way."""
        while len(self.groups) > pending:
            for product in self.groups.pop(0):
                product()


def operand(descriptor: int, rows: NDArray[np.int64], turned: bool) -> NDArray[np.int64]:
    """Where the bfloat16 `[row][16]` of a shared-memory matrix lie, swizzled by 128 bytes."""
    assert descriptor >> 62 == 1 and descriptor >> 49 & 7 == 0, "the 128-byte swizzle"
    address, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    columns = np.arange(16)
    if turned:
        row = rows // 64 * leading + rows % 64 * 2
        column = columns // 8 * stride + columns % 8 * 128
    else:
        row, column = rows // 8 * stride + rows % 8 * 128, columns * 2
    return swizzled(address + row[:, None] + column, 3)


def gather(data: Bytes, places: NDArray[np.int64]) -> NDArray[np.float64]:
    """The bfloat16 at these places."""
    raw = np.stack((data[places], data[places + 1]), -1)
    return np.asarray(raw.view(ml_dtypes.bfloat16)[..., 0].astype(np.float64))


def rows_of(a: Sequence[Bits]) -> NDArray[np.float64]:
    """A `[16, 16]` operand in a warp's registers."""
    group, t = np.arange(32) // 4, np.arange(32) % 4
    found = np.zeros((16, 16))
    for n in range(4):
        for i in range(2):
            found[group + 8 * (n % 2), 2 * t + 8 * (n // 2) + i] = pair(a[n])[:, i]
    return found


def add_product(acc: Sequence[Bits], a: NDArray[np.float64], b: NDArray[np.float64]) -> list[Bits]:
    """A warp's rows of a warpgroup's sums. a: `[16, 16]`; b: `[n, 16]`."""
    group, t = np.arange(32) // 4, np.arange(32) % 4
    with np.errstate(all="ignore"):
        product = a @ b.T
    results = []
    for index, old in enumerate(acc):
        at = product[group + 8 * (index // 2 % 2), 8 * (index // 4) + 2 * t + index % 2]
        results.append(bits((f32(old) + at).astype(np.float32)))
    return results


def transpose(matrix: Bits) -> Bits:
    """movmatrix of 8 by 8: lane 4g + t has row g, columns 2t and 2t + 1."""
    halves = np.stack(
        (matrix & np.uint64(0xFFFF), (matrix >> np.uint64(16)) & np.uint64(0xFFFF)), -1
    )
    turned = halves.reshape(8, 8).T.reshape(32, 2)
    return np.asarray(turned[:, 0] | (turned[:, 1] << np.uint64(16)))
