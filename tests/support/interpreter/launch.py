"""What a kernel's host code would launch: grid, and every parameter's bytes.

The host code of a compiled kernel runs in a process of its own against `driver.c`, with tensors
that are addresses only. As a program: `python launch.py DRIVER SHARED_OBJECT FUNCTION`, argument
descriptions as JSON on stdin, the launch as JSON on stdout.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_CODES = {
    "uint8": (1, 8),
    "int32": (0, 32),
    "int64": (0, 64),
    "float32": (2, 32),
    "bfloat16": (4, 16),
}
_CUDA = 2


@dataclasses.dataclass(frozen=True)
class Launched:
    """grid; threads of a CTA; bytes of dynamic shared memory; each parameter's bytes; CTAs along
    x of a cluster."""

    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    parameters: tuple[bytes, ...]
    cluster: int = 1


def record(shared_object: Path, sizes: list[int], arguments: list[Any]) -> Launched:
    """arguments: (address, dtype's name, shape), numbers, or lists. sizes: of the parameters."""
    driver = shared_object.parent / "driver.so"
    source = Path(__file__).with_name("driver.c")
    soname = "-Wl,-soname,libcute_dsl_runtime.so"
    subprocess.run(["cc", "-shared", "-fPIC", soname, "-o", driver, source], check=True)
    done = subprocess.run(
        [sys.executable, __file__, driver, shared_object, shared_object.stem],
        input=json.dumps({"sizes": sizes, "arguments": arguments}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    found = json.loads(done.stdout)
    config = found["config"]
    return Launched(
        tuple(config[:3]),
        config[3],
        config[6],
        tuple(bytes.fromhex(raw) for raw in found["parameters"]),
        found["cluster"],
    )


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Managed(ctypes.Structure):
    """DLManagedTensor of DLPack."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),
        ("offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    )


# Tensors live as long as the process.
_keep = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)


class _Tensor:
    """An address that says it lies on a GPU."""

    alive: list[Any] = []  # noqa: RUF012

    def __init__(self, address: int, dtype: str, shape: list[int]) -> None:
        code, width = _CODES[dtype]
        dims = (ctypes.c_int64 * len(shape))(*shape)
        device, kind = _Device(_CUDA, 0), _Type(code, width, 1)
        self.managed = _Managed(address, device, len(shape), kind, dims, None, 0, None, _keep)
        self.alive += [dims, self.managed]

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_CUDA, 0)

    def __dlpack__(self, **_: Any) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.managed), b"dltensor", None)


def _cluster(config: int) -> int:
    """The size along x among a launch configuration's attributes."""
    attributes = ctypes.c_uint64.from_address(config + 40).value
    for i in range(ctypes.c_uint32.from_address(config + 48).value):
        number, _, size = (ctypes.c_uint32 * 3).from_address(attributes + 72 * i)
        if number == 4:
            return int(size)
    return 1


def _main(driver_path: str, shared_object: str, name: str) -> None:
    import tvm_ffi

    asked = json.load(sys.stdin)
    driver = ctypes.CDLL(driver_path, mode=ctypes.RTLD_GLOBAL)
    found: dict[str, Any] = {}

    def handed_over(config: int, _: int, arguments: Any) -> int:
        found["config"] = list((ctypes.c_uint32 * 7).from_address(config))
        found["cluster"] = _cluster(config)
        found["parameters"] = [
            ctypes.string_at(arguments[i], size).hex() for i, size in enumerate(asked["sizes"])
        ]
        return 0

    signature = (ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
    callback = ctypes.CFUNCTYPE(ctypes.c_int, *signature)(handed_over)
    target = ctypes.c_void_p.in_dll(driver, "handed_over")
    target.value = ctypes.cast(callback, ctypes.c_void_p).value

    def tensor(argument: Any) -> Any:
        if isinstance(argument, int | float):
            return argument
        if isinstance(argument[0], list):
            return tuple(tensor(one) for one in argument)
        return tvm_ffi.from_dlpack(_Tensor(*argument))

    tvm_ffi.load_module(shared_object)[name](*(tensor(one) for one in asked["arguments"]))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    _main(*sys.argv[1:])
