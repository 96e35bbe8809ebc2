"""Kernels with their tensors: checked when they are put together, then launched as often as wanted.

A call whose tensors are of another type, size or number than its kernel's is refused at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from dsv4.kernels.core.library import Function, Library
from dsv4.kernels.core.signature import Argument, Kernel


class Launch(Protocol):
    """How a plan is carried out: kernels are launched, or put down to be launched later."""

    def __call__(self, kernel: Kernel, **given: Tensor | int) -> None:
        """given: every argument of the kernel, by its name. Raises TypeError as `arguments`."""


Between = Callable[[Callable[[], object]], None]
"""How a plan has a function called between launches: at once, or in its turn."""


def arguments(kernel: Kernel, given: Mapping[str, Tensor | int]) -> list[Any]:
    """The kernel's arguments in its order and its tuples.

    Raises TypeError naming the first that is missing or not the kernel's, is of another dtype,
    rank or size than the kernel's, does not lie as it needs, or has another size than an argument
    before it where the kernel gives both the same name.
    """
    sizes: dict[str, int] = {}
    found: list[Any] = []
    count = 0
    for one in kernel.arguments:
        if isinstance(one, tuple):
            count += len(one)
            found.append(tuple(_checked(kernel, leaf, given, sizes) for leaf in one))
        else:
            count += 1
            found.append(_checked(kernel, one, given, sizes))
    if count != len(given):
        strange = sorted(given.keys() - {leaf.name for leaf in kernel.leaves()})
        raise TypeError(f"{kernel.name} does not have the argument {strange[0]}")
    return found


def _checked(
    kernel: Kernel, argument: Argument, given: Mapping[str, Tensor | int], sizes: dict[str, int]
) -> Tensor | int:
    name = argument.name
    value = given.get(name)
    if value is None:
        raise TypeError(f"{kernel.name} is not given its argument {name}")
    if not isinstance(value, Tensor):
        if argument.scalar:
            return value
        raise TypeError(f"{kernel.name}: {name} is {value!r}, expected a tensor")
    shape = value.shape
    if value.dtype != argument.dtype or len(shape) != len(argument.shape):
        raise _wrong(kernel, argument, value, sizes)
    for size, wanted in zip(shape, argument.shape, strict=True):
        if size != (sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted):
            raise _wrong(kernel, argument, value, sizes)
    if not value.is_contiguous():
        raise TypeError(f"{kernel.name}: {name} has strides {value.stride()}, expected contiguous")
    if value.device.type != "meta" and value.data_ptr() % argument.align:
        raise TypeError(f"{kernel.name}: {name} does not lie at a multiple of {argument.align}")
    return value


def _wrong(
    kernel: Kernel, argument: Argument, value: Tensor, sizes: Mapping[str, int]
) -> TypeError:
    wanted = [
        f"{n} = {sizes[n]}" if isinstance(n, str) and n in sizes else n for n in argument.shape
    ]
    return TypeError(
        f"{kernel.name}: {argument.name} is {value.dtype} [{', '.join(map(str, value.shape))}], "
        f"expected {argument.dtype} [{', '.join(map(str, wanted))}]"
    )


class Functions:
    """The functions of kernels, each looked up in the library once.

    Kernels are compared by identity, which is quick: plans keep those that they have made.
    """

    def __init__(self, library: Library) -> None:
        self.library = library
        self._found: dict[int, tuple[Kernel, Function]] = {}

    def of(self, kernel: Kernel) -> Function:
        """Raises KernelError naming one that is missing or stale."""
        found = self._found.get(id(kernel))
        if found is None:
            found = self._found[id(kernel)] = kernel, self.library.function(kernel)
        return found[1]

    def launch(self, kernel: Kernel, **given: Tensor | int) -> None:
        """Launch a kernel now. See `Launch`."""
        self.of(kernel)(*arguments(kernel, given))


class Call:
    """A kernel with its function and its arguments."""

    def __init__(self, kernel: Kernel, function: Function, arguments: list[Any]) -> None:
        self.kernel, self.function, self.arguments = kernel, function, arguments

    def __call__(self) -> None:
        """Launch it on torch's current stream."""
        self.function(*self.arguments)


class Program:
    """Calls in order, on fixed tensors: run one by one, or recorded once and replayed as a graph.

    graphs: False to launch one by one whatever is asked.
    """

    def __init__(self, functions: Functions, graphs: bool = True) -> None:
        self.calls: list[
            Call | Callable[[], object]
        ] = []  # they keep the tensors: a graph knows only addresses
        self._functions = functions
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm, self._graphs = False, graphs

    def __len__(self) -> int:
        return len(self.calls)

    def record(self, kernel: Kernel, **given: Tensor | int) -> None:
        """Put down a call. See `Launch`; raises KernelError for a kernel that is missing."""
        self.calls.append(Call(kernel, self._functions.of(kernel), arguments(kernel, given)))

    def between(self, function: Callable[[], object]) -> None:
        """Put down a function: of the host, for programs that are launched, not recorded; or one
        that only launches something on fixed tensors, which a graph records.
        """
        self.calls.append(function)

    def launch(self) -> None:
        """Launch everything on torch's current stream; waits for nothing."""
        for call in self.calls:
            call()

    def replay(self) -> None:
        """The same as one graph, recorded the second time: the first loads the kernels' code."""
        if not self._warm or not self._graphs:
            self._warm = True
            return self.launch()
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self.launch()
        self._graph.replay()
        return None
