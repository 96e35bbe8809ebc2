"""`dsv4 bench kernels`: each kernel on real shapes, checked, then timed.

A case's launches are recorded in a CUDA graph, once per copy of its cold buffers (weights,
caches), so that every launch finds them outside the L2 cache; the graph is replayed and the median
taken. The bound is the bytes that must move, at the bandwidth measured in the same run: the best
of a copy, a scaled copy and a plain sum of 2 GiB.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from dsv4.formats.errors import KernelError
from dsv4.kernels.core.contract import Buffers, Case
from dsv4.kernels.core.library import Library, architecture
from dsv4.kernels.core.verify import check, check_alone, launcher
from dsv4.kernels.ops.gemv.contract import MAX_ROWS

L2_TIMES = 4  # of the L2's size that the copies of a case's cold buffers take together
MOST_COPIES = 64
REPLAYS = 15
_STREAM_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Line:
    """One case. seconds: median of a run, None when it was not timed; fraction: of the bound, which
    is bytes at the measured bandwidth or operations at the measured matrix rate. skipped: why it
    was not run at all, or nothing.
    """

    operation: str
    shape: str
    model: str
    rows: int
    seconds: float | None
    nbytes: int
    fraction: float | None
    faults: tuple[str, ...]
    note: str
    skipped: str = ""


@dataclasses.dataclass(frozen=True)
class Machine:
    """The GPU and what it was measured to do: bytes and bfloat16 operations a second."""

    name: str
    bandwidth: float
    matrix_rate: float


def open_library(device: torch.device, location: Path | None, command: str) -> Library:
    """The kernels built for `device`. Raises KernelError without a GPU, which `command` needs."""
    if not torch.cuda.is_available():
        raise KernelError(f"torch sees no CUDA device here; `{command}` needs one")
    return Library(location, architecture(device))


def measure_machine(device: torch.device) -> Machine:
    """Name, memory bandwidth and bfloat16 matrix rate of the GPU."""
    name = torch.cuda.get_device_name(device)
    return Machine(name, _bandwidth(device), _matrix_rate(device))


def _bandwidth(device: torch.device) -> float:
    source = torch.empty(_STREAM_BYTES // 4, device=device).normal_()
    target, total = torch.empty_like(source), torch.empty((), device=device)
    both = 2 * _STREAM_BYTES
    return max(
        both / graph_seconds([lambda: target.copy_(source)]),
        both / graph_seconds([lambda: torch.mul(source, 2.0, out=target)]),
        _STREAM_BYTES / graph_seconds([lambda: torch.sum(source, dim=0, out=total)]),
    )


def _matrix_rate(device: torch.device) -> float:
    a, b = (torch.randn(8192, 8192, device=device).to(torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    return 2 * 8192**3 / graph_seconds([lambda: torch.mm(a, b, out=c)])


def measure(
    cases: Iterable[Case],
    library: Library,
    machine: Machine,
    device: torch.device,
    timed: bool = True,
) -> Iterator[Line]:
    """Check and time each case, or only check it. A case that fails is reported.

    A case with a kernel that is not made for the library's architecture is skipped, and says so.
    """
    for case in cases:
        seconds, faults, skipped = None, list[str](), ""
        if any(library.arch not in kernel.architectures for kernel in case.kernels):
            skipped = f"not built for {library.arch}"
        else:
            try:
                faults = check(case, library, device)
                if case.rows <= MAX_ROWS:
                    faults += check_alone(case, library, device)
                if timed:
                    seconds = time_case(case, library, device)
            except KernelError as error:
                faults = [str(error)]
        bound = max(case.nbytes / machine.bandwidth, case.flops / machine.matrix_rate)
        yield Line(
            case.operation,
            case.shape,
            case.model,
            case.rows,
            seconds,
            case.nbytes,
            bound / seconds if seconds else None,
            tuple(faults),
            case.note,
            skipped,
        )
        torch.cuda.empty_cache()


def time_case(case: Case, library: Library, device: torch.device) -> float:
    """Median seconds of one run of the case, its cold buffers outside the L2 cache."""
    rng = torch.Generator(device).manual_seed(1)
    buffers = case.make(rng)
    copies = copies_of(sum(buffers[name].nbytes for name in case.cold), device)
    sets: list[Buffers] = [buffers]
    for _ in range(copies - 1):
        sets.append(buffers | {name: buffers[name].clone() for name in case.cold})
    return graph_seconds([launcher(case, library, one) for one in sets])


def copies_of(nbytes: int, device: torch.device) -> int:
    """How many copies of so many bytes to take in turn, so that each comes from memory."""
    if not nbytes or device.type != "cuda":
        return 1
    wanted = L2_TIMES * int(torch.cuda.get_device_properties(device).L2_cache_size)
    return min(MOST_COPIES, max(2, -(-wanted // nbytes)))


def graph_seconds(runs: Sequence[Callable[[], object]]) -> float:
    """Median seconds of one of `runs`, replayed one after another as one CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    repeats = max(1, 8 // len(runs))
    stream.wait_stream(torch.cuda.current_stream())  # what made the buffers
    with torch.cuda.stream(stream):
        for run in runs:
            run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(repeats):
                for run in runs:
                    run()
        times = []
        for turn in range(REPLAYS + 1):
            begin, end = _event(), _event()
            begin.record(stream)
            graph.replay()
            end.record(stream)
            stream.synchronize()
            if turn:  # the first warms up
                times.append(float(begin.elapsed_time(end)) / 1e3)
    return statistics.median(times) / (repeats * len(runs))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
