"""What a compiled kernel is made of: its PTX, and the resources of its machine code."""

from __future__ import annotations

import functools
import hashlib
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
    """ptx: the text; cubin: what ptxas made of it, an ELF file of 64 bits with one function."""

    ptx: str
    cubin: bytes

    @property
    def resources(self) -> dict[str, int]:
        """REG, STACK, LOCAL, … of the function, as cuobjdump reports them."""
        return resources(self.cubin)

    @property
    def nbytes(self) -> int:
        """Size of the instructions."""
        return len(instructions(self.cubin))

    @property
    def digest(self) -> str:
        """SHA-256 of the instructions: no name, no debug information, no metadata is in it."""
        return hashlib.sha256(instructions(self.cubin)).hexdigest()

    @property
    def ptx_digest(self) -> str:
        """SHA-256 of the PTX without comments and without the names of its functions."""
        text = re.sub(r"//.*|\bkernel_\w+", "", self.ptx)
        return hashlib.sha256(text.encode()).hexdigest()

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
        return MachineCode(artifacts.PTX, artifacts.CUBIN)


@functools.cache
def resources(cubin: bytes) -> dict[str, int]:
    """Resource usage of the one kernel in `cubin`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text)}


def instructions(cubin: bytes) -> bytes:
    """The executable sections of `cubin`, one after another."""
    (sections,) = struct.unpack_from("<Q", cubin, 40)
    size, count = struct.unpack_from("<HH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + size * i) for i in range(count)]
    return b"".join(
        cubin[offset : offset + length]
        for _, _, flags, _, offset, length in headers
        if flags & _EXECUTABLE
    )


@functools.cache
def _cuobjdump() -> str:
    files = importlib.metadata.files("nvidia-cuda-cuobjdump") or []
    return str(next(Path(str(f.locate())) for f in files if f.name == "cuobjdump"))
