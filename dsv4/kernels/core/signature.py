"""What a compiled kernel is: one function of fixed arguments, its source and its configuration.

Nothing here needs a compiler or a GPU. `build.py` compiles a `Kernel` with CuTe DSL, `library.py`
finds the result again by its name and refuses it when source, architecture or arguments differ.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch

from dsv4.kernels.names import ARCHITECTURES

Role = Literal["in", "out", "inout"]

NAME_LENGTH = 100  # of the readable part of a kernel's name
_PACKAGE = "dsv4.kernels."
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
    arguments. Equal ones are one function. arguments: in order; several in a tuple are passed as
    one. architectures: those it is compiled for.
    """

    operation: str
    implementation: str
    config: tuple[tuple[str, int | float | str | bool], ...]
    arguments: tuple[Argument | tuple[Argument, ...], ...]
    architectures: tuple[str, ...] = ARCHITECTURES

    @property
    def name(self) -> str:
        """An identifier: the operation, how its configuration begins, and a digest of all of it,
        the arguments' shapes included: kernels of several models lie in one folder.
        """
        words = "_".join([self.operation, *(f"{key}{value}" for key, value in self.config)])
        parts = [self.implementation, self.config, self._described()]
        digest = hashlib.sha256(json.dumps(parts).encode())
        return f"{re.sub(r'[^a-z0-9]+', '_', words.lower())[:NAME_LENGTH]}_{digest.hexdigest()[:8]}"

    def leaves(self) -> Iterator[Argument]:
        """All arguments, one by one."""
        for argument in self.arguments:
            yield from argument if isinstance(argument, tuple) else (argument,)

    def key(self, arch: str, compiler: str) -> str:
        """What a build of it depends on, hashed: source, compiler, architecture, arguments."""
        own = [self.implementation, self.config, self._described()]
        parts = [*own, arch, compiler, source_digest(self)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def _described(self) -> list[tuple[object, ...]]:
        return [(a.name, str(a.dtype), a.shape, a.role, a.align) for a in self.leaves()]


def kernel(
    operation: str,
    implementation: str,
    config: Mapping[str, int | float | str | bool],
    arguments: tuple[Argument | tuple[Argument, ...], ...],
    architectures: tuple[str, ...] = ARCHITECTURES,
) -> Kernel:
    """A `Kernel` with its configuration as a mapping."""
    return Kernel(operation, implementation, tuple(config.items()), arguments, architectures)


def source_digest(kernel: Kernel) -> str:
    """SHA-256 of the module that the implementation lies in and of all of ours that it imports."""
    return _digest(kernel.implementation.partition(":")[0])


@functools.cache
def _digest(implementation: str) -> str:
    whole = hashlib.sha256()
    for module in sorted(_reachable(implementation)):
        whole.update(f"{module}\0".encode() + _source(module))
    return whole.hexdigest()


@functools.cache
def _reachable(module: str) -> frozenset[str]:
    """`module` and the modules of this package that it imports, directly or not."""
    found, waiting = {module}, [module]
    while waiting:
        new = _imported(waiting.pop()) - found
        found |= new
        waiting += new
    return frozenset(found)


@functools.cache
def _imported(module: str) -> frozenset[str]:
    """The modules of this package that `module` imports; each is parsed once."""
    found = set()
    for node in ast.walk(ast.parse(_source(module))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name for name in names if name.startswith(_PACKAGE) and _path(name).is_file()}
    return frozenset(found)


def _source(module: str) -> bytes:
    return _path(module).read_bytes()


def _path(module: str) -> Path:
    return (
        Path(__file__)
        .parents[1]
        .joinpath(*module.removeprefix(_PACKAGE).split("."))
        .with_suffix(".py")
    )
