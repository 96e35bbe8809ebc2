"""What `bench kernels` says of a kernel: right, wrong, or not made for this GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dsv4.bench.kernels import Line, Machine, measure
from dsv4.commands.bench_tables import kernel_line, kernels_table
from dsv4.formats.errors import KernelError
from dsv4.formats.model.releases import FLASH
from dsv4.kernels.core.contract import Case, Expected, Launch
from dsv4.kernels.core.library import Function, Library
from dsv4.kernels.core.signature import Argument, Kernel, kernel
from dsv4.kernels.names import CONTRACTS
from dsv4.kernels.ops import cases

MACHINE = Machine("none", 1e12, 1e12)
DOUBLE = kernel(
    "double",
    "dsv4.kernels.ops.gemv.kernel:Gemv",
    {},
    (Argument("x", torch.float32, ("n",)), Argument("y", torch.float32, ("n",), "out")),
)


class Fake(Library):
    """One kernel, in torch, for one architecture."""

    def __init__(self, arch: str, factor: float, missing: bool = False) -> None:
        self.location, self.arch, self.factor, self.missing = Path(), arch, factor, missing

    def function(self, kernel: Kernel) -> Function:
        if self.missing:
            raise KernelError("kernel double is not built")
        return lambda x, y: y.copy_(x * self.factor)


def _measured(library: Library, architectures: tuple[str, ...]) -> Line:
    case = Case(
        "double",
        "test",
        "none",
        2048,
        (Launch(dataclasses.replace(DOUBLE, architectures=architectures)),),
        nbytes=0,
        make=lambda rng: {"x": torch.randn(16, generator=rng), "y": torch.empty(16)},
        expect=lambda buffers: {"y": Expected(buffers["x"] * 2)},
    )
    (line,) = measure([case], library, MACHINE, torch.device("cpu"), timed=False)
    return line


def _shown(line: Line) -> str:
    """The line of progress and the table, one below the other."""
    console = Console(width=200)
    with console.capture() as captured:
        console.print(kernels_table([line], MACHINE))
    return f"{kernel_line(line)}\n{captured.get()}"


def test_a_kernel_for_another_architecture_is_not_wrong() -> None:
    line = _measured(Fake("sm_90a", 2.0, missing=True), ("sm_100a",))
    assert (line.skipped, line.faults, line.seconds) == ("not built for sm_90a", (), None)
    assert _shown(line).count("not built for sm_90a") == 2
    assert "WRONG" not in _shown(line)
    assert "right" not in _shown(line)


@pytest.mark.parametrize("library", [Fake("sm_100a", 3.0), Fake("sm_100a", 2.0, missing=True)])
def test_a_kernel_for_this_architecture_that_fails_is_wrong(library: Library) -> None:
    line = _measured(library, ("sm_100a",))
    assert line.faults and not line.skipped
    assert _shown(line).count("WRONG") == 2


def test_a_right_kernel_is_right() -> None:
    line = _measured(Fake("sm_100a", 2.0), ("sm_90a", "sm_100a"))
    assert not line.faults and not line.skipped
    assert _shown(line).count("right") == 2


def test_the_products_of_fp4_with_fp4_are_made_for_blackwell_alone() -> None:
    only = {
        one.operation
        for one in cases(FLASH, "flash", (1, 8, 2048), tuple(CONTRACTS))
        if any("sm_90a" not in made.architectures for made in one.kernels)
    }
    assert only == {"fp4_gemm", "fp4_gemm_grouped"}
