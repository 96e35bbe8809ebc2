"""Wheels of compiled kernels: `pip install` instead of a compiler on the GPU machine.

    dsv4_kernels_sm90a/sm_90a/<kernel>.so, kernels.json      as `dsv4 kernels build` wrote them
    dsv4_kernels_sm90a/libcute_dsl_runtime.so                what they call to launch

setuptools makes the wheel; it holds data, and an empty module. It asks for the dsv4 of this
version, from whose source its kernels were built; `library` finds it by its entry point.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from dsv4.formats.errors import KernelError
from dsv4.formats.version import VERSION
from dsv4.kernels.core.build import INDEX, RUNTIME_LIBRARY, read_index
from dsv4.kernels.core.library import ENTRY_POINTS

SETUPTOOLS = 77  # the first major version that pyproject.toml below may be given to

_PROJECT = """\
[build-system]
requires = ["setuptools>={setuptools}"]
build-backend = "setuptools.build_meta"

[project]
name = "dsv4-kernels-{short}"
version = "{version}"
description = "GPU kernels of dsv4, compiled for {arch} by {compiler}"
requires-python = ">=3.11"
dependencies = ["dsv4[run]=={version}"]

[project.entry-points."{group}"]
{arch} = "{module}"

[tool.setuptools]
packages = ["{module}"]

[tool.setuptools.package-data]
"{module}" = ["*.so", "{arch}/*"]
"""
_PLATFORM = "[bdist_wheel]\nplat_name = {platform}\n"


def make_wheel(kernels: Path, arch: str, out: Path) -> Path:
    """Make the wheel of `arch` from the folder that a build filled; -> its path in `out`.

    Raises KernelError when the folder holds no kernels of `arch`, when one is not what its build
    wrote, or when the wheel cannot be made.
    """
    index = read_index(kernels / arch)
    entries = index.get("kernels")
    if not isinstance(entries, dict) or not entries:
        raise KernelError(
            f"{kernels} holds no kernels for {arch}; `dsv4 kernels build --arch {arch} --out "
            f"{kernels}` makes them"
        )
    short = arch.replace("_", "")
    module = f"dsv4_kernels_{short}"
    with tempfile.TemporaryDirectory(prefix="dsv4-wheel-") as scratch:
        package = Path(scratch) / module
        (package / arch).mkdir(parents=True)
        for name, entry in entries.items():
            _copy(kernels / arch / f"{name}.so", package / arch, entry.get("sha256"))
        _copy(kernels / arch / INDEX, package / arch)
        _copy(kernels / RUNTIME_LIBRARY, package)
        (package / "__init__.py").write_text(f'"""Kernels of dsv4 {VERSION} for {arch}: data."""\n')
        text = _PROJECT.format(
            setuptools=SETUPTOOLS,
            short=short,
            version=VERSION,
            arch=arch,
            compiler=index["compiler"],
            group=ENTRY_POINTS,
            module=module,
        )
        (Path(scratch) / "pyproject.toml").write_text(text)
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        (Path(scratch) / "setup.cfg").write_text(_PLATFORM.format(platform=platform))
        _run_pip(Path(scratch), out)
    return out / f"{module}-{VERSION}-py3-none-{platform}.whl"


def _copy(file: Path, folder: Path, sha256: object = None) -> None:
    try:
        if sha256 is not None and hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
            raise KernelError(f"{file} is not what the build wrote; remove it, and build again")
        shutil.copyfile(file, folder / file.name)
    except OSError as error:
        raise KernelError(f"{file} cannot be read ({error.strerror}); build again") from None


def _run_pip(project: Path, out: Path) -> None:
    """Build with the setuptools that is here, or let pip fetch it."""
    try:
        there = int(importlib.metadata.version("setuptools").split(".")[0]) >= SETUPTOOLS
    except (importlib.metadata.PackageNotFoundError, ValueError):
        there = False
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(out),
    ]
    command += ["--no-build-isolation"] if there else []
    done = subprocess.run([*command, str(project)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError(f"pip could not make the wheel: {done.stderr.strip()[-500:]}")
