"""What a compiled kernel is made of: its PTX, and the resources of its machine code."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from dsv4.kernels.build import compile_kernel
from dsv4.kernels.compiled import Kernel


class MachineCode(NamedTuple):
    """ptx: the text; resources: REG, STACK, LOCAL, … of the one function, by cuobjdump."""

    ptx: str
    resources: dict[str, int]

    @property
    def spilled(self) -> int:
        """Bytes of local memory a thread uses: registers that did not fit, or indexed arrays."""
        return self.resources["STACK"] + self.resources["LOCAL"]


@functools.cache
def machine_code(kernel: Kernel, arch: str) -> MachineCode:
    """Compile `kernel` for `arch`, without a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        options = f"--keep-ptx --keep-cubin --dump-dir {folder}"
        artifacts = compile_kernel(kernel, arch, options).artifacts
        return MachineCode(artifacts.PTX, resources(artifacts.CUBIN))


def resources(cubin: bytes) -> dict[str, int]:
    """Resource usage of the one kernel in `cubin`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}


@functools.cache
def _cuobjdump() -> str:
    files = importlib.metadata.files("nvidia-cuda-cuobjdump") or []
    return str(next(Path(str(f.locate())) for f in files if f.name == "cuobjdump"))
