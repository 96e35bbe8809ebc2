"""Kernels on CPU buffers: built, their host code run, their PTX interpreted."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4.kernels.core.build import build
from dsv4.kernels.core.contract import Buffers, Case
from dsv4.kernels.core.signature import Argument, Kernel
from dsv4.kernels.core.verify import fault, guard_outputs
from tests.support.interpreter.ctas import Cta, run
from tests.support.interpreter.launch import Launched, record
from tests.support.interpreter.memory import GlobalMemory
from tests.support.interpreter.source import parse
from tests.support.machine_code import machine_code

Alteration = Callable[[str], str]


def interpret(
    kernel: Kernel,
    arch: str,
    buffers: Buffers,
    seed: int = 0,
    alter: Alteration | None = None,
    pointed: Mapping[str, Tensor] | None = None,
) -> None:
    """Run `kernel` on its arguments, which it writes. alter: changes the PTX first.

    pointed: arguments int64 `[1]` that are the address of another tensor, with this tensor.
    """
    ptx = machine_code(kernel, arch).ptx
    program = parse(alter(ptx) if alter else ptx)
    parameters = list(program.parameters.values())
    launched, memory = _launch(kernel, arch, buffers, parameters, pointed or {})
    width, height, depth = launched.grid
    for first in range(0, width * height * depth, launched.cluster):
        run(
            [
                Cta(
                    program,
                    launched.parameters,
                    memory,
                    (block % width, block // width % height, block // (width * height)),
                    launched.threads,
                    launched.shared_bytes,
                    seed + block,
                    launched.grid,
                )
                for block in range(first, first + launched.cluster)
            ]
        )


def shared_bytes(kernel: Kernel, arch: str, buffers: Buffers) -> int:
    """Dynamic shared memory of a CTA of `kernel`, launched on its arguments."""
    program = parse(machine_code(kernel, arch).ptx)
    return _launch(kernel, arch, buffers, list(program.parameters.values()), {})[0].shared_bytes


def _launch(
    kernel: Kernel,
    arch: str,
    buffers: Buffers,
    parameters: list[int],
    pointed: Mapping[str, Tensor],
) -> tuple[Launched, GlobalMemory]:
    """What the host code asks the driver for, and the memory that it points into."""
    arguments = {one.name: buffers[one.name] for one in kernel.leaves()}
    raw = {
        name: one.view(torch.uint8).view(-1).numpy()
        for name, one in arguments.items()
        if isinstance(one, Tensor)
    }
    raw |= {
        f"{name} points": one.view(torch.uint8).view(-1).numpy() for name, one in pointed.items()
    }
    memory = GlobalMemory(raw)
    for name in pointed:
        address = torch.tensor([memory.address[f"{name} points"]])
        raw[name][:] = address.view(torch.uint8).numpy()

    def describe(argument: Argument | tuple[Argument, ...]) -> Any:
        if isinstance(argument, tuple):
            return [describe(one) for one in argument]
        given = arguments[argument.name]
        if not isinstance(given, Tensor):
            return given
        dtype = str(given.dtype).removeprefix("torch.")
        return memory.address[argument.name], dtype, list(given.shape)

    launched = record(
        _shared_object(kernel, arch),
        parameters,
        [describe(argument) for argument in kernel.arguments],
    )
    return launched, memory


@functools.cache
def _shared_object(kernel: Kernel, arch: str) -> Path:
    folder = Path(tempfile.mkdtemp(dir=_folder().name))
    (built,) = build([kernel], [arch], folder, workers=1)
    return folder / arch / f"{built.name}.so"


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def faults(case: Case, arch: str, seed: int = 0, alter: Alteration | None = None) -> list[str]:
    """What the interpreted kernels of `case` do wrong."""
    buffers = case.make(torch.Generator().manual_seed(seed))
    expected = case.expect(dict(buffers))
    guard_outputs(case, buffers)  # poisons them; the interpreter watches their ends itself
    for launch in case.launches:
        own = {one.name: buffers[launch.buffer(one)] for one in launch.kernel.leaves()}
        pointed = {n: buffers[f"{n}_records"] for n in own if f"{n}_records" in buffers}
        interpret(launch.kernel, arch, own, seed, alter, pointed)
    return [f for name, want in expected.items() if (f := fault(name, buffers[name], want))]


def configured(case: Case, **changes: int) -> Case:
    """`case` with its kernels' configuration changed, say to fewer CTAs."""
    launches = []
    for launch in case.launches:
        config = tuple({**dict(launch.kernel.config), **changes}.items())
        kernel = dataclasses.replace(launch.kernel, config=config)
        launches.append(dataclasses.replace(launch, kernel=kernel))
    return dataclasses.replace(case, launches=tuple(launches))
