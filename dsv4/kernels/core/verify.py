"""Does a kernel do what its reference does? Run a case and say what is wrong with it.

Outputs are poisoned and stand between guard bytes; afterwards every element must be within its
bound and every guard as it was. A launch recorded in a CUDA graph must give the same bytes, and
so must a token that is computed alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv4.formats.errors import KernelError
from dsv4.kernels.core.contract import Buffers, Case, Expected
from dsv4.kernels.core.library import Library

GUARD = 0xA5
GUARD_BYTES = 4096
POISON = 0xFF  # NaN in every floating-point format here, -1 in integers


def launcher(case: Case, library: Library, buffers: Buffers) -> Callable[[], None]:
    """A function that launches the case on `buffers`, on torch's current stream."""
    calls = [
        (library.function(launch.kernel), launch.arguments(buffers)) for launch in case.launches
    ]

    def run() -> None:
        for function, arguments in calls:
            function(*arguments)

    return run


def check(case: Case, library: Library, device: torch.device, seed: int = 0) -> list[str]:
    """-> what is wrong, nothing when all is well. Raises KernelError when a kernel is missing."""
    buffers = case.make(torch.Generator(device).manual_seed(seed))
    expected = case.expect(dict(buffers))
    guards = guard_outputs(case, buffers)
    before = {name: buffers[name].clone() for name in guards}
    run = launcher(case, library, buffers)
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    faults = [f for name, want in expected.items() if (f := fault(name, buffers[name], want))]
    faults += [f"{name}: bytes beside it were written" for name in guards if _broken(guards[name])]
    if device.type == "cuda":
        first = {name: buffers[name].clone() for name in guards if name in expected}
        _replay(run, buffers, before)
        faults += [
            f"{name}: the graph gives other bytes than the launch"
            for name, once in first.items()
            if not torch.equal(_bytes(once), _bytes(buffers[name]))
        ]
    return faults


def check_alone(case: Case, library: Library, device: torch.device, seed: int = 0) -> list[str]:
    """-> a sentence for every token whose results differ when it is computed alone.

    A token's results are the outputs whose first dimension is "rows"; its inputs likewise. Raises
    KernelError when such a buffer does not have the case's rows: cut to one, its kernel could read
    beside it.
    """
    if case.joint:
        return []
    made = case.make(torch.Generator(device).manual_seed(seed))
    roles: dict[str, set[str]] = {}
    for launch in case.launches:
        for one in launch.kernel.leaves():
            if one.shape[:1] == ("rows",):
                roles.setdefault(launch.buffer(one), set()).add(one.role)
    for name in roles:
        if len(made[name]) != case.rows:
            raise KernelError(f"{case}: {name} has {len(made[name])} rows, not the case's")
    shared = {n for la in case.launches for n in la.written()} - roles.keys()
    outputs = [name for name, found in roles.items() if found != {"in"}]
    kept = {name: made[name].clone() for name in shared}
    together = _run(case, library, dict(made))
    faults = []
    for row in range(case.rows):
        own = made | {name: made[name][row : row + 1].clone() for name in roles}
        alone = _run(case, library, own | {name: kept[name].clone() for name in shared})
        faults += [
            f"{name}: token {row} differs alone and beside the others"
            for name in outputs
            if not torch.equal(_bytes(together[name][row]), _bytes(alone[name][0]))
        ]
    return faults


def _run(case: Case, library: Library, buffers: Buffers) -> Buffers:
    guard_outputs(case, buffers)
    launcher(case, library, buffers)()
    return buffers


def fault(name: str, found: Tensor, expected: Expected) -> str | None:
    """A sentence when `found` is not within the bound of `expected`, else None."""
    value, tolerance = expected
    if found.shape != value.shape:
        return f"{name}: shape {tuple(found.shape)}, expected {tuple(value.shape)}"
    if isinstance(tolerance, float) and tolerance == 0.0:
        wrong = ~(found == value)
    else:
        excess = (found.to(torch.float64) - value.to(torch.float64)).abs() - tolerance
        wrong = ~(excess <= 0)  # NaN is wrong
    count = int(wrong.sum())
    if not count:
        return None
    place = tuple(int(i) for i in wrong.nonzero()[0])
    return (
        f"{name}: {count} of {wrong.numel()} elements are outside their bound, first at {place}: "
        f"{found[place].item()!r}, expected {value[place].item()!r}"
    )


def guard_outputs(case: Case, buffers: Buffers) -> dict[str, Tensor]:
    """Move every written buffer between guard bytes; poison those that are only written.

    -> name -> the bytes that hold it, guards included.
    """
    roles: dict[str, set[str]] = {}
    for launch in case.launches:
        for argument in launch.kernel.leaves():
            roles.setdefault(launch.buffer(argument), set()).add(argument.role)
    guards = {}
    for name in dict.fromkeys(n for launch in case.launches for n in launch.written()):
        old: Tensor = buffers[name]
        raw = torch.full(
            (old.nbytes + 2 * GUARD_BYTES,), GUARD, dtype=torch.uint8, device=old.device
        )
        new = raw[GUARD_BYTES : GUARD_BYTES + old.nbytes].view(old.dtype).view(old.shape)
        if "inout" in roles[name]:
            new.copy_(old)
        else:
            _bytes(new).fill_(POISON)
        buffers[name], guards[name] = new, raw
    return guards


def _broken(raw: Tensor) -> bool:
    edges = torch.cat((raw[:GUARD_BYTES], raw[-GUARD_BYTES:]))
    return bool((edges != GUARD).any())


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _replay(run: Callable[[], None], buffers: Buffers, before: Buffers) -> None:
    """The same launches from a graph, into outputs that are poisoned again."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for name, old in before.items():
        buffers[name].copy_(old)
    graph.replay()
    torch.cuda.synchronize()
