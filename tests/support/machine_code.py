"""What a compiled kernel is made of: its PTX, and the resources of its machine code."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from dsv4.kernels.core.build import compile_kernel
from dsv4.kernels.core.signature import Kernel

_EXECUTABLE = 4  # SHF_EXECINSTR


class MachineCode(NamedTuple):
    """ptx: the text; resources: REG, STACK, LOCAL, … of the one function, by cuobjdump; nbytes: of
    its instructions.
    """

    ptx: str
    resources: dict[str, int]
    nbytes: int

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
        cubin: bytes = artifacts.CUBIN
        return MachineCode(artifacts.PTX, resources(cubin), instruction_bytes(cubin))


def resources(cubin: bytes) -> dict[str, int]:
    """Resource usage of the one kernel in `cubin`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}


def instruction_bytes(cubin: bytes) -> int:
    """Size of the executable sections of `cubin`, an ELF file of 64 bits."""
    (sections,) = struct.unpack_from("<Q", cubin, 40)
    size, count = struct.unpack_from("<HH", cubin, 58)
    headers = (struct.unpack_from("<IIQQQQ", cubin, sections + size * i) for i in range(count))
    return sum(header[5] for header in headers if header[2] & _EXECUTABLE)


@functools.cache
def _cuobjdump() -> str:
    files = importlib.metadata.files("nvidia-cuda-cuobjdump") or []
    return str(next(Path(str(f.locate())) for f in files if f.name == "cuobjdump"))
