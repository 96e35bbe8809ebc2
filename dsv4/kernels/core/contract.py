"""A case: one operation on one real shape, with inputs, the expected outputs and their bounds.

Tests and benchmarks share the cases, so that what is timed is what was checked. An operation is
one launch or a few, over buffers that the caller owns; its reference is plain torch in FP64 over
the same buffers, on whatever device they lie.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv4.kernels.core.signature import Argument, Kernel

Buffers = dict[str, Any]
"""Name -> tensor, or number for a scalar argument."""


class Expected(NamedTuple):
    """What a buffer has to hold afterwards: within `tolerance` (a tensor of its shape, or 0)."""

    value: Tensor
    tolerance: Tensor | float = 0.0


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel; binding: argument -> buffer, for those whose names differ."""

    kernel: Kernel
    binding: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def arguments(self, buffers: Buffers) -> list[Any]:
        """The kernel's arguments in order."""
        return [
            tuple(buffers[self.buffer(one)] for one in argument)
            if isinstance(argument, tuple)
            else buffers[self.buffer(argument)]
            for argument in self.kernel.arguments
        ]

    def buffer(self, argument: Argument) -> str:
        """The buffer that is passed for `argument`."""
        return self.binding.get(argument.name, argument.name)

    def written(self) -> Iterator[str]:
        """Buffers that the kernel writes."""
        return (self.buffer(one) for one in self.kernel.leaves() if one.role != "in")


@dataclasses.dataclass(frozen=True)
class Case:
    """operation on `shape` (such as "lm_head") of `model`, for `rows` tokens.

    nbytes: what has to be read and written once at the least; flops: for a matrix-bound case.
    make: buffers on a device, from a seeded generator; outputs are poisoned by who runs the case.
    expect: name -> what it must hold, computed from the buffers before the launches.
    cold: buffers that come from memory in real use: a benchmark rotates copies of them past the
    L2 cache. note: what the figure includes. joint: a token's results depend on the others' (one
    scale for all, say), so that none can be computed alone.
    """

    operation: str
    shape: str
    model: str
    rows: int
    launches: tuple[Launch, ...]
    nbytes: int
    make: Callable[[torch.Generator], Buffers]
    expect: Callable[[Buffers], dict[str, Expected]]
    cold: tuple[str, ...] = ()
    flops: int = 0
    note: str = ""
    joint: bool = False

    def __str__(self) -> str:
        return f"{self.operation} {self.shape} {self.model} rows {self.rows}"

    @property
    def kernels(self) -> Sequence[Kernel]:
        """What has to be built for it."""
        return [launch.kernel for launch in self.launches]
