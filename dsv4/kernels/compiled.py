"""What a compiled kernel is: one function of fixed arguments, its source and its configuration.

Nothing here needs a compiler or a GPU. `build.py` compiles a `Kernel` with CuTe DSL, `library.py`
finds the result again by its name and refuses it when source, architecture or arguments differ.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Literal

import torch

from dsv4.kernels.names import ARCHITECTURES

Role = Literal["in", "out", "inout"]

CAPABILITY = {(9, 0): "sm_90a", (10, 0): "sm_100a"}


@dataclasses.dataclass(frozen=True)
class Argument:
    """One argument: a contiguous tensor on the device, or a number.

    dtype: of the tensor, or `float` or `int`. shape: a name stands for a size known at run time,
    the same wherever it recurs; `()` for a number. align: bytes the address is a multiple of.
    """

    name: str
    dtype: torch.dtype | type[float] | type[int]
    shape: tuple[int | str, ...] = ()
    role: Role = "in"
    align: int = 16

    @property
    def scalar(self) -> bool:
        """Whether it is a number."""
        return not isinstance(self.dtype, torch.dtype)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A function that `dsv4 kernels build` compiles.

    operation: what it computes; implementation: "module:Class" in CuTe DSL; config: the class's
    arguments. Equal ones are one function. architectures: those it is compiled for.
    """

    operation: str
    implementation: str
    config: tuple[tuple[str, int | float | str | bool], ...]
    arguments: tuple[Argument, ...]
    architectures: tuple[str, ...] = ARCHITECTURES

    @property
    def name(self) -> str:
        """An identifier that tells what it is, made from operation and configuration."""
        words = [self.operation, *(f"{key}{value}" for key, value in self.config)]
        return re.sub(r"\W", "_", "_".join(words))

    def key(self, arch: str, compiler: str) -> str:
        """What a build of it depends on, hashed: source, compiler, architecture, arguments."""
        arguments = [(a.name, str(a.dtype), a.shape, a.role, a.align) for a in self.arguments]
        parts = [self.implementation, self.config, arguments, arch, compiler, source_digest(self)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def kernel(
    operation: str,
    implementation: str,
    config: Mapping[str, int | float | str | bool],
    arguments: tuple[Argument, ...],
    architectures: tuple[str, ...] = ARCHITECTURES,
) -> Kernel:
    """A `Kernel` with its configuration as a mapping."""
    return Kernel(operation, implementation, tuple(config.items()), arguments, architectures)


def source_digest(kernel: Kernel) -> str:
    """SHA-256 of all modules of the package that the implementation lies in."""
    return _package_digest(kernel.implementation.partition(":")[0].rpartition(".")[0])


@functools.cache
def _package_digest(package: str) -> str:
    whole = hashlib.sha256()
    parts = {package, "dsv4.kernels.sm90"}  # what sm100 builds on
    for part in sorted(parts):
        for file in sorted(resources.files(part).iterdir(), key=lambda file: file.name):
            if file.name.endswith(".py"):
                whole.update(file.name.encode() + b"\0" + file.read_bytes())
    return whole.hexdigest()
