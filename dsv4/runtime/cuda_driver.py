"""The few calls of the CUDA driver that are made before torch is there, or too often for it.

Calls that return at once keep the interpreter's lock: to hand it to a thread that sleeps takes
longer than they do. Calls that wait give it up.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from dsv4.formats.errors import RuntimeRefusal

LIBRARY = "libcuda.so.1"
NOT_READY = 600
_PORTABLE = 1  # pinned for every context
_DEVICEMAP = 2  # and at an address of the device
_EVENT = 1 | 2  # waiting threads sleep: their cores are needed by those who read; no timing
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "cuCtxGetCurrent": (ctypes.c_void_p,),
    "cuCtxSetCurrent": (ctypes.c_void_p,),
    "cuEventCreate": (ctypes.c_void_p, ctypes.c_uint),
    "cuEventDestroy_v2": (ctypes.c_void_p,),
    "cuEventQuery": (ctypes.c_void_p,),
    "cuEventRecord": (ctypes.c_void_p, ctypes.c_void_p),
    "cuEventSynchronize": (ctypes.c_void_p,),
    "cuMemHostGetDevicePointer_v2": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint),
    "cuMemHostRegister_v2": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint),
    "cuMemHostUnregister": (ctypes.c_void_p,),
    "cuMemcpyHtoDAsync_v2": (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p),
}


class Driver:
    """Copies from pinned memory and events, in the context that was current when it was made."""

    def __init__(self) -> None:
        """Raises RuntimeRefusal when a call fails, here and below."""
        quick, slow = _libraries()
        for library in (quick, slow):
            for name, types in _ARGUMENTS.items():
                getattr(library, name).argtypes = types
        self._quick, self._slow = quick, slow
        context = ctypes.c_void_p()
        _check("cuCtxGetCurrent", quick.cuCtxGetCurrent(ctypes.byref(context)))
        self._context = context

    def enter(self) -> None:
        """Make the context current in this thread."""
        _check("cuCtxSetCurrent", self._quick.cuCtxSetCurrent(self._context))

    def pin(self, address: int, nbytes: int) -> None:
        """Make memory known to the GPU, so that copies from it are done by the GPU alone."""
        _check("cuMemHostRegister", self._slow.cuMemHostRegister_v2(address, nbytes, _PORTABLE))

    def map(self, address: int, nbytes: int) -> int:
        """Pin memory for kernels to read, too: -> its address for them."""
        both, found = _PORTABLE | _DEVICEMAP, ctypes.c_uint64()
        _check("cuMemHostRegister", self._slow.cuMemHostRegister_v2(address, nbytes, both))
        code = self._quick.cuMemHostGetDevicePointer_v2(ctypes.byref(found), address, 0)
        if code:
            self.unpin(address)
        _check("cuMemHostGetDevicePointer", code)
        return found.value

    def unpin(self, address: int) -> None:
        """The opposite."""
        _check("cuMemHostUnregister", self._slow.cuMemHostUnregister(address))

    def event(self) -> int:
        """A new event; `destroy` it."""
        made = ctypes.c_void_p()
        _check("cuEventCreate", self._quick.cuEventCreate(ctypes.byref(made), _EVENT))
        return made.value or 0

    def destroy(self, event: int) -> None:
        """Give an event back."""
        _check("cuEventDestroy", self._quick.cuEventDestroy_v2(event))

    def copy(self, target: int, source: int, nbytes: int, stream: int, event: int) -> None:
        """Queue a copy of pinned memory to the device; `event` happens when it is done."""
        quick = self._quick
        _check("cuMemcpyHtoDAsync", quick.cuMemcpyHtoDAsync_v2(target, source, nbytes, stream))
        _check("cuEventRecord", quick.cuEventRecord(event, stream))

    def wait(self, event: int) -> None:
        """Until it has happened; an event that was never recorded has."""
        code = self._quick.cuEventQuery(event)
        if code == NOT_READY:
            code = self._slow.cuEventSynchronize(event)
        _check("cuEventSynchronize", code)


def wake(device: int = 0) -> threading.Thread:
    """Begin to make a GPU's context in a thread: it takes a third of a second.

    Nothing happens where there is no GPU; who needs one says what is wrong.
    """

    def work() -> None:
        try:
            _, slow = _libraries()
        except OSError:
            return
        number, context = ctypes.c_int(), ctypes.c_void_p()
        if not slow.cuInit(0) and not slow.cuDeviceGet(ctypes.byref(number), device):
            slow.cuDevicePrimaryCtxRetain(ctypes.byref(context), number)

    thread = threading.Thread(target=work, name="dsv4-wake", daemon=True)
    thread.start()
    return thread


def _libraries() -> tuple[Any, Any]:
    """-> (with calls that keep the interpreter's lock, with calls that do not)."""
    return ctypes.PyDLL(LIBRARY), ctypes.CDLL(LIBRARY)


def _check(call: str, code: int) -> None:
    if code:
        raise RuntimeRefusal(f"the CUDA driver's {call} failed with error {code}")
