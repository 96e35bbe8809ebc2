"""Ahead-of-time compilation: every kernel into a shared object, without a GPU.

    DIR/sm_90a/<kernel>.so        one function each, loaded by apache-tvm-ffi
    DIR/sm_90a/kernels.json       {"compiler", "kernels": {name: {"file", "key", "sha256"}}}
    DIR/libcute_dsl_runtime.so    what the functions call to launch

A kernel whose key (source, compiler, architecture, shapes) has a build already is kept. Needs the
extra `kernels` (nvidia-cutlass-dsl, apache-tvm-ffi) and a C compiler to link with; what comes out
needs neither.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from dsv4.formats.errors import KernelError
from dsv4.kernels.core.signature import Argument, Kernel

INDEX = "kernels.json"
RUNTIME_LIBRARY = "libcute_dsl_runtime.so"
_LINKER = ("cc", "gcc", "clang")


@dataclasses.dataclass(frozen=True)
class Built:
    """One kernel of a build. fresh: compiled now, not found. seconds: it took."""

    name: str
    arch: str
    fresh: bool
    seconds: float


def compiler_version() -> str:
    """Name and version of the kernel compiler. Raises KernelError when it is not installed."""
    try:
        return f"nvidia-cutlass-dsl {importlib.metadata.version('nvidia-cutlass-dsl')}"
    except importlib.metadata.PackageNotFoundError:
        raise KernelError(
            "nvidia-cutlass-dsl is not installed; pip install 'dsv4[kernels]' brings it"
        ) from None


def build(
    kernels: Iterable[Kernel],
    archs: Sequence[str],
    out: Path,
    *,
    workers: int | None = None,
    progress: Callable[[Built, int, int], None] | None = None,
) -> list[Built]:
    """Compile what is missing or stale in `out`; -> one entry per kernel and architecture.

    progress: called with each, how many are done, and how many there are.
    Raises KernelError when compiler or linker are missing or a kernel does not compile.
    """
    compiler = compiler_version()
    linker = next((found for name in _LINKER if (found := shutil.which(name))), None)
    if linker is None:
        raise KernelError(f"no C compiler to link kernels with, expected one of {_LINKER}")
    unique = {one.name: one for one in kernels}
    by_arch = {a: [one for one in unique.values() if a in one.architectures] for a in archs}
    total = sum(map(len, by_arch.values()))
    done: list[Built] = []

    def tell(one: Built) -> None:
        done.append(one)
        if progress is not None:
            progress(one, len(done), total)

    for arch, wanted in by_arch.items():
        _build_for(arch, wanted, out / arch, compiler, linker, workers, tell)
    _copy_runtime(out)
    return done


def _build_for(
    arch: str,
    wanted: Sequence[Kernel],
    folder: Path,
    compiler: str,
    linker: str,
    workers: int | None,
    tell: Callable[[Built], None],
) -> None:
    """Compile into `folder` what it does not hold; other kernels in it stay."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = _entries(folder, compiler)
    keys = {one.name: one.key(arch, compiler) for one in wanted}
    jobs: list[_Job] = []
    for one in wanted:
        if entries.get(one.name, {}).get("key") == keys[one.name]:
            tell(Built(one.name, arch, False, 0.0))
        else:
            entries.pop(one.name, None)
            jobs.append((one, arch, folder, linker))
    try:
        for name, digest, seconds in _compile_all(jobs, workers):
            entries[name] = {"file": f"{name}.so", "key": keys[name], "sha256": digest}
            tell(Built(name, arch, True, seconds))
    finally:  # what is done stays done
        _write_index(folder, {"compiler": compiler, "kernels": dict(sorted(entries.items()))})


def _entries(folder: Path, compiler: str) -> dict[str, dict[str, str]]:
    """What the index says is there and really is. Nothing, if another compiler made it."""
    index = read_index(folder)
    if index.get("compiler") != compiler:
        return {}
    known: dict[str, dict[str, str]] = index.get("kernels", {})
    return {name: entry for name, entry in known.items() if (folder / f"{name}.so").is_file()}


_Job = tuple[Kernel, str, Path, str]


def _compile_all(jobs: list[_Job], workers: int | None) -> Iterable[tuple[str, str, float]]:
    if not jobs:
        return
    count = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    if count == 1:
        yield from (_compile_one(*job) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # the compiler's threads do not survive a fork
    with ProcessPoolExecutor(count, mp_context=spawn) as pool:
        waiting = [pool.submit(_compile_one, *job) for job in jobs]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _compile_one(kernel: Kernel, arch: str, folder: Path, linker: str) -> tuple[str, str, float]:
    """-> (name, SHA-256 of the shared object, seconds)."""
    begin = time.perf_counter()
    try:
        compiled = compile_kernel(kernel, arch)
    except Exception as error:
        why = " ".join(re.sub(r"\x1b\[\d+m", "", str(error)).split())
        raise KernelError(f"{kernel.name} does not compile for {arch}: {why}") from None
    from cutlass.cute.runtime import find_runtime_libraries

    target, partial = folder / f"{kernel.name}.so", folder / f"{kernel.name}.o"
    compiled.export_to_c(str(partial), function_name=kernel.name)
    libraries = find_runtime_libraries(enable_tvm_ffi=True)
    command = [linker, "-shared", "-o", str(target), str(partial), *libraries]
    linked = subprocess.run(command, capture_output=True, text=True, check=False)
    partial.unlink()
    if linked.returncode:
        raise KernelError(f"{kernel.name} does not link: {linked.stderr.strip()[-500:]}")
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    return kernel.name, digest, time.perf_counter() - begin


def compile_kernel(kernel: Kernel, arch: str, options: str = "") -> Any:
    """The compiled function, not loaded; `artifacts` has its PTX and machine code if kept."""
    from cutlass import cute
    from cutlass.cute.runtime import make_fake_stream

    module, _, name = kernel.implementation.partition(":")
    made = getattr(importlib.import_module(module), name)
    config: dict[str, Any] = dict(kernel.config)
    if "arch" in inspect.signature(made).parameters:
        config["arch"] = arch
    function = made(**config)
    sizes: dict[str, Any] = {}
    arguments = [
        tuple(_fake(one, sizes) for one in argument)
        if isinstance(argument, tuple)
        else _fake(argument, sizes)
        for argument in kernel.arguments
    ]
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    options = f"--gpu-arch {arch} --enable-tvm-ffi {options}".strip()
    return cute.compile(function, *arguments, stream, options=options)


def _fake(argument: Argument, sizes: dict[str, Any]) -> Any:
    """A stand-in for the argument: its type, rank and known sizes."""
    import cutlass
    from cutlass import cute
    from cutlass.cute.runtime import make_fake_compact_tensor

    if argument.scalar:
        return cutlass.Float32(0.0) if argument.dtype is float else cutlass.Int32(0)
    types = {
        torch.float32: cutlass.Float32,
        torch.bfloat16: cutlass.BFloat16,
        torch.uint8: cutlass.Uint8,
        torch.int32: cutlass.Int32,
        torch.int64: cutlass.Int64,
    }
    for size in argument.shape:
        if isinstance(size, str) and size not in sizes:
            sizes[size] = cute.sym_int()
    shape = tuple(sizes[size] if isinstance(size, str) else size for size in argument.shape)
    return make_fake_compact_tensor(
        types[argument.dtype],  # type: ignore[index]
        shape,
        stride_order=tuple(reversed(range(len(shape)))),
        assumed_align=argument.align,
    )


def read_index(folder: Path) -> dict[str, Any]:
    """What a folder of one architecture says that it holds; empty where it says nothing."""
    try:
        found = json.loads((folder / INDEX).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_index(folder: Path, index: dict[str, Any]) -> None:
    partial = folder / f"{INDEX}.partial"
    partial.write_text(json.dumps(index, indent=1))
    partial.replace(folder / INDEX)


def _copy_runtime(out: Path) -> None:
    """Put the launch library beside the kernels, for machines without the compiler."""
    from cutlass.cute.runtime import find_runtime_libraries

    source = next(Path(path) for path in find_runtime_libraries() if RUNTIME_LIBRARY in path)
    target = out / RUNTIME_LIBRARY
    if not target.is_file() or target.stat().st_size != source.stat().st_size:
        shutil.copyfile(source, target)
