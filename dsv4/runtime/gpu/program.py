"""Launches bound to buffers: run one by one, or recorded once and replayed as a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.core.contract import Buffers, Launch
from dsv4.kernels.core.library import Library
from dsv4.kernels.core.signature import Argument

Sizes = Mapping[str, int]
"""A size that kernels know at run time, by its name in their arguments -> the most it can be."""


def allocate(
    launches: Iterable[Launch], known: Buffers, sizes: Sizes, device: torch.device
) -> Buffers:
    """What `launches` write and nobody has yet: activations and scratch, zeroed.

    Raises KeyError for a size that `sizes` does not name.
    """
    found: Buffers = {}
    for launch in launches:
        for one in launch.kernel.leaves():
            name = launch.buffer(one)
            if one.role == "in" or name in known:
                continue
            assert isinstance(one.dtype, torch.dtype)
            shape = _resolved(one, sizes)
            if name not in found or found[name].numel() < math.prod(shape):
                found[name] = torch.zeros(shape, dtype=one.dtype, device=device)
    return found


class Program:
    """What a step of `rows` tokens launches, on fixed buffers."""

    def __init__(
        self,
        library: Library,
        launches: Iterable[Launch],
        buffers: Buffers,
        rows: int,
        graphs: bool = True,
    ) -> None:
        """Find every kernel now. Raises KernelError naming one that is missing or stale.

        A buffer that holds a row for each token may hold more: its first `rows` are taken.
        graphs: False to launch one by one whatever is asked.
        """
        self._buffers = buffers  # a graph knows only addresses: they must stay
        self._calls: list[tuple[Callable[..., None], list[Any]]] = []
        for launch in launches:
            views = dict(buffers)
            for one in launch.kernel.leaves():
                views[launch.buffer(one)] = _view(one, buffers[launch.buffer(one)], rows)
            self._calls.append((library.function(launch.kernel), launch.arguments(views)))
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm, self._graphs = False, graphs

    def __len__(self) -> int:
        return len(self._calls)

    def launch(self) -> None:
        """Launch everything on torch's current stream; waits for nothing."""
        for function, arguments in self._calls:
            function(*arguments)

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


def _view(argument: Argument, buffer: Any, rows: int) -> Any:
    """The front part of `buffer` that holds `rows` tokens, in the argument's shape.

    Scratch is shared by kernels that cut it differently: each takes what it needs from the start.
    """
    if not isinstance(buffer, Tensor) or "rows" not in argument.shape:
        return buffer
    if any(isinstance(size, str) and size != "rows" for size in argument.shape):
        return buffer[:rows]
    shape = _resolved(argument, {"rows": rows})
    return buffer.view(-1)[: math.prod(shape)].view(shape)


def _resolved(argument: Argument, sizes: Sizes) -> tuple[int, ...]:
    return tuple(sizes[n] if isinstance(n, str) else n for n in argument.shape)
