"""Compiled kernels at run time: found by name, checked, loaded by apache-tvm-ffi.

No compiler, no DSL, nothing is compiled here. Where kernels are looked for, each by itself:

    1. the folder that $DSV4_KERNELS names; if it is set, nowhere else
    2. the user's cache folder, which `dsv4 kernels build` fills
    3. installed wheels such as dsv4-kernels-sm90a (`dsv4 kernels wheel` makes them)

A wheel is found by its entry point in the group `dsv4.kernels`, named as the architecture; of its
package nothing is imported. Wherever a kernel lies, its key has to be the one that this source has,
and its machine code the one whose hash the index holds. A kernel that is missing, or was built from
other source, is refused with the command that makes it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dsv4.formats.errors import KernelError
from dsv4.kernels.core.signature import CAPABILITY, Kernel

INDEX = "kernels.json"
RUNTIME_LIBRARY = "libcute_dsl_runtime.so"
COMPILER = "cutlass"  # the module of nvidia-cutlass-dsl
INSTALL_COMPILER = "pip install 'dsv4[kernels]'"  # brings what loads kernels, too
LOCATION = "DSV4_KERNELS"  # environment variable: the folder that `dsv4 kernels build` filled
ENTRY_POINTS = "dsv4.kernels"  # the group in which wheels of kernels say their packages

Function = Callable[..., None]


def default_location() -> Path:
    """Where kernels are built: `$DSV4_KERNELS`, else the user's cache folder."""
    if chosen := os.environ.get(LOCATION):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv4" / "kernels"


def locations(arch: str) -> list[Path]:
    """Where kernels of `arch` are looked for, in this order."""
    if os.environ.get(LOCATION):
        return [default_location()]
    return [default_location(), *_installed(arch)]


def _installed(arch: str) -> Iterator[Path]:
    """Folders of installed wheels of `arch`, found without importing anything of them."""
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS, name=arch):
        if not point.module.isidentifier():  # a package below another would be imported to be found
            continue
        found = importlib.util.find_spec(point.module)
        for folder in (found.submodule_search_locations or ()) if found else ():
            yield Path(folder)


def architecture(device: torch.device) -> str:
    """The architecture of a CUDA device. Raises KernelError when no kernel is made for it."""
    found = torch.cuda.get_device_capability(device)
    if found not in CAPABILITY:
        raise KernelError(
            f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, "
            f"kernels exist for {', '.join(f'{a}.{b}' for a, b in CAPABILITY)}"
        )
    return CAPABILITY[found]


class _Place(NamedTuple):
    """A folder with kernels of one architecture: who compiled them, and its index."""

    location: Path
    compiler: str
    entries: Mapping[str, Mapping[str, str]]


class Library:
    """The kernels built for one architecture; each is loaded when it is first asked for.

    location: the only folder to look into; None: `locations`. store: the kernels are for, which
    the command in messages then names.
    """

    def __init__(self, location: Path | None, arch: str, store: Path | None = None) -> None:
        self.location, self.arch, self.store = location or default_location(), arch, store
        self._functions: dict[str, Function] = {}
        searched = locations(arch) if location is None else [location]
        self._places = [place for one in searched if (place := _place(one, arch)) is not None]
        if not self._places:
            everywhere = location is None and not os.environ.get(LOCATION)
            wheel = ", nor does an installed wheel" if everywhere else ""
            raise KernelError(
                f"{self.location} holds no kernels for {arch}{wheel}; {self._command()} makes them"
            )
        self._compiler: str | None = None  # of all that is loaded: one launch library serves it
        if len(self._places) == 1:
            self._load_runtime(self._places[0])

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

        place = self._place_of(kernel)
        file = self._checked_file(kernel, place)
        self._load_runtime(place)
        module: Any = tvm_ffi.load_module(str(file))
        function: Function = module[kernel.name]
        return function

    def _place_of(self, kernel: Kernel) -> _Place:
        """The first that has the kernel, made of this source."""
        places = [p for p in self._places if self._compiler in (None, p.compiler)]
        having = [place for place in places if kernel.name in place.entries]
        if not having:
            raise KernelError(
                f"kernel {kernel.name} is not built for {self.arch} in {_named(places)}; "
                f"{self._command()} makes it"
            )
        for place in having:
            if place.entries[kernel.name].get("key") == kernel.key(self.arch, place.compiler):
                return place
        raise KernelError(
            f"kernel {kernel.name} in {_named(having)} was built from other source; "
            f"{self._command()} makes it again"
        )

    def _checked_file(self, kernel: Kernel, place: _Place) -> Path:
        """Its machine code, which is what the build wrote."""
        file = place.location / self.arch / f"{kernel.name}.so"
        try:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
        except OSError as error:
            raise KernelError(
                f"{file} cannot be read ({error.strerror}); {self._command()} makes it"
            ) from None
        if digest != place.entries[kernel.name].get("sha256"):
            raise KernelError(
                f"{file} is not what the build wrote; remove it, and {self._command()} makes it"
            )
        return file

    def _load_runtime(self, place: _Place) -> None:
        """The launch library first, visible to all: the kernels' symbols resolve against it."""
        if self._compiler is not None:
            return
        try:
            import tvm_ffi  # noqa: F401
        except ImportError:
            raise KernelError(
                "apache-tvm-ffi, which loads kernels, is not installed; this needs dsv4[run]: "
                "pip install 'dsv4[run]'"
            ) from None
        try:
            ctypes.CDLL(str(place.location / RUNTIME_LIBRARY), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise KernelError(
                f"the kernels' launch library cannot be loaded ({error}); {self._command()} "
                "writes it again"
            ) from None
        self._compiler = place.compiler

    def _command(self) -> str:
        """What makes the kernels, in one line; where the compiler is missing, that comes first."""
        elsewhere = self.location != default_location()
        place = f" --out {shlex.quote(str(self.location))}" if elsewhere else ""
        store = "" if self.store is None else f"{shlex.quote(str(self.store))} "
        build = f"dsv4 kernels build {store}--arch {self.arch}{place}"
        if importlib.util.find_spec(COMPILER) is None:
            build = f"{INSTALL_COMPILER} && {build}"
        return f"`{build}`"


def _place(location: Path, arch: str) -> _Place | None:
    """What a folder holds; None where it has no index that can be read."""
    try:
        index = json.loads((location / arch / INDEX).read_text())
        place = _Place(location, index["compiler"], index["kernels"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return place if isinstance(place.entries, dict) else None


def _named(places: Sequence[_Place]) -> str:
    return " and ".join(str(place.location) for place in places)
