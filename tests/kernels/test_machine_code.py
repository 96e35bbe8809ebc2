"""Kernels keep their machine code: a change of source that moves an instruction shows here.

The golden file was made by `python -m tests.kernels.machine_code_hashes`, and holds the compiler's
version, as code of another compiler is other code.
"""

from __future__ import annotations

import dataclasses

import pytest

from dsv4.kernels.core.build import compiler_version
from dsv4.kernels.core.signature import Kernel
from dsv4.kernels.names import OPERATIONS
from dsv4.kernels.ops.gemv.contract import Weight, gemv
from tests.kernels import machine_code_hashes
from tests.kernels.machine_code_hashes import GOLDEN, differences, digest, identity

QUICK = ("append", "indexer", "router", "swiglu")
"""Operations whose kernels are compared in every run of the tests; the others in long ones."""
COMPILER, HASHES = machine_code_hashes.read(GOLDEN)
SAMPLE = [
    pytest.param(
        kernel,
        arch,
        id=f"{kernel.operation}-{number}",
        marks=() if kernel.operation in QUICK and arch == "sm_90a" else (pytest.mark.long,),
    )
    for number, (kernel, arch) in enumerate(machine_code_hashes.sample())
]


def same_compiler() -> None:
    """Fail by name where another compiler than the golden file's is installed."""
    if compiler_version() != COMPILER:
        pytest.fail(
            f"{GOLDEN.name} was made by {COMPILER}, but {compiler_version()} is installed, whose "
            "machine code differs; install the former, or write the file again with "
            "python -m tests.kernels.machine_code_hashes tests/kernels/goldens/machine_code.json "
            "--sample"
        )


@pytest.mark.parametrize(("kernel", "arch"), SAMPLE)
def test_the_machine_code_is_what_it_was(kernel: Kernel, arch: str) -> None:
    same_compiler()
    name = identity(kernel, arch)
    assert differences({name: HASHES.get(name, "none")}, {name: digest(kernel, arch)}) == []


def test_every_operation_has_golden_code() -> None:
    """A new operation, or a new kernel of one, is not left out."""
    wanted = {identity(kernel, arch) for kernel, arch in machine_code_hashes.sample()}
    assert differences(dict.fromkeys(wanted, ""), dict.fromkeys(HASHES, "")) == []
    assert {name.split()[1].partition("_")[0] for name in HASHES} == {
        name.partition("_")[0] for name in OPERATIONS
    }


def test_another_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.compiler_version", lambda: "nvidia-cutlass-dsl 0.0.1")
    with pytest.raises(pytest.fail.Exception, match=r"made by nvidia-cutlass-dsl .*but .* 0\.0\.1"):
        same_compiler()


def test_a_kernel_that_computes_something_else_has_another_hash() -> None:
    """Planted: one stage more in the ring. The identity tells both apart, and so does the code."""
    kernel = gemv([Weight("fp8", 128, 512)], tuning={"warps": 2, "stages": 2})
    other = gemv([Weight("fp8", 128, 512)], tuning={"warps": 2, "stages": 3})
    before, after = (digest(one, "sm_90a") for one in (kernel, other))
    name = identity(kernel, "sm_90a")
    assert differences({name: before}, {name: after}) == [f"changed: {name}"]
    assert name != identity(other, "sm_90a")
    moved = dataclasses.replace(kernel, implementation="elsewhere:Gemv")
    assert name == identity(moved, "sm_90a")


def test_unstable_machine_code_is_compared_by_ptx() -> None:
    """ptxas orders the instructions of one attention differently from run to run."""
    by_ptx = [name for name, value in HASHES.items() if value.startswith("ptx ")]
    assert [name.split()[:4] for name in by_ptx] == [
        ["sm_90a", "attention", "Attention", "mode=list"]
    ]
