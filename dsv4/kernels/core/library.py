"""Compiled kernels at run time: found by name, checked, loaded by apache-tvm-ffi.

No compiler, no DSL, nothing is compiled here. A kernel that is missing, or was built from other
source, is refused with the command that makes it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsv4.formats.errors import KernelError
from dsv4.kernels.core.signature import CAPABILITY, Kernel

INDEX = "kernels.json"
RUNTIME_LIBRARY = "libcute_dsl_runtime.so"
COMPILER = "cutlass"  # the module of nvidia-cutlass-dsl
INSTALL_COMPILER = "pip install 'dsv4[kernels]'"  # brings what loads kernels, too
LOCATION = "DSV4_KERNELS"  # environment variable: the folder that `dsv4 kernels build` filled

Function = Callable[..., None]


def default_location() -> Path:
    """Where kernels are built and looked for: `$DSV4_KERNELS`, else the user's cache folder."""
    if chosen := os.environ.get(LOCATION):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv4" / "kernels"


def architecture(device: torch.device) -> str:
    """The architecture of a CUDA device. Raises KernelError when no kernel is made for it."""
    found = torch.cuda.get_device_capability(device)
    if found not in CAPABILITY:
        raise KernelError(
            f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, "
            f"kernels exist for {', '.join(f'{a}.{b}' for a, b in CAPABILITY)}"
        )
    return CAPABILITY[found]


class Library:
    """The kernels built for one architecture; each is loaded when it is first asked for.

    store: the kernels are for, which the command in messages then names.
    """

    def __init__(self, location: Path, arch: str, store: Path | None = None) -> None:
        self.location, self.arch, self.store = location, arch, store
        self._functions: dict[str, Function] = {}
        try:
            index = json.loads((location / arch / INDEX).read_text())
            self._compiler: str = index["compiler"]
            self._entries: dict[str, dict[str, str]] = index["kernels"]
        except (OSError, ValueError, KeyError, TypeError):
            raise KernelError(
                f"{location} holds no kernels for {arch}; {self._command()} makes them"
            ) from None
        self._load_runtime()

    def function(self, kernel: Kernel) -> Function:
        """The function of `kernel`: takes its arguments in order, on torch's current stream.

        It writes into the buffers it is given, allocates nothing and never waits. Raises
        KernelError when it is not built, or was built from other source.
        """
        if kernel.name not in self._functions:
            self._functions[kernel.name] = self._load(kernel)
        return self._functions[kernel.name]

    def _load(self, kernel: Kernel) -> Function:
        import tvm_ffi

        entry = self._entries.get(kernel.name)
        if entry is None:
            raise KernelError(
                f"kernel {kernel.name} is not built for {self.arch} in {self.location}; "
                f"{self._command()} makes it"
            )
        if entry.get("key") != kernel.key(self.arch, self._compiler):
            raise KernelError(
                f"kernel {kernel.name} in {self.location} was built from other source; "
                f"{self._command()} makes it again"
            )
        file = self.location / self.arch / f"{kernel.name}.so"
        try:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            raise KernelError(
                f"{file} cannot be read ({error.strerror}); {self._command()} makes it"
            ) from None
        if digest != entry.get("sha256"):
            raise KernelError(
                f"{file} is not what the build wrote; remove it, and {self._command()} makes it"
            )
        module: Any = tvm_ffi.load_module(str(file))
        function: Function = module[kernel.name]
        return function

    def _load_runtime(self) -> None:
        """The launch library first, visible to all: the kernels' symbols resolve against it."""
        try:
            import tvm_ffi  # noqa: F401
        except ImportError:
            raise KernelError(
                "apache-tvm-ffi, which loads kernels, is not installed; this needs dsv4[run]: "
                "pip install 'dsv4[run]'"
            ) from None
        try:
            ctypes.CDLL(str(self.location / RUNTIME_LIBRARY), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise KernelError(
                f"the kernels' launch library cannot be loaded ({error}); {self._command()} "
                "writes it again"
            ) from None

    def _command(self) -> str:
        """What makes the kernels: one command, or two in order where the compiler is missing."""
        elsewhere = self.location != default_location()
        place = f" --out {shlex.quote(str(self.location))}" if elsewhere else ""
        store = "" if self.store is None else f"{shlex.quote(str(self.store))} "
        build = f"`dsv4 kernels build {store}--arch {self.arch}{place}`"
        if importlib.util.find_spec(COMPILER) is None:
            return f"`{INSTALL_COMPILER}`, then {build}"
        return build
