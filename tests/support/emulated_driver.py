"""The CUDA driver's calls that a load makes, on host memory, as late as they may happen."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from dsv4.runtime.cuda_driver import NOT_READY

OUT_OF_MEMORY = 2


class Function:
    """Callable like one of ctypes, which has argument types."""

    def __init__(self, call: Any) -> None:
        self.call, self.argtypes = call, ()

    def __call__(self, *arguments: Any) -> int:
        assert len(arguments) == len(self.argtypes) or not self.argtypes
        return int(self.call(*arguments) or 0)


class EmulatedCuda:
    """Its `cu...` attributes are functions. A copy is done when somebody waits for it.

    pinned: address -> length. events: those that are alive. eager: says of every event that it
    happened. failing: name of a call -> the code that it returns. pin_limit: most bytes pinned.
    """

    def __init__(
        self,
        *,
        eager: bool = False,
        failing: dict[str, int] | None = None,
        pin_limit: int = 1 << 62,
    ) -> None:
        self.pin_limit = pin_limit
        self.pinned: dict[int, int] = {}
        self.events: set[int] = set()
        self.entered: list[int] = []  # threads, which may follow each other under one number
        self.eager = eager
        self.stream_handle = 7
        self._queue: list[tuple[int, int, int] | int] = []
        self._lock = threading.RLock()
        self._made = 0
        for name in [name for name in dir(self) if name.startswith("_cu")]:
            setattr(self, name[1:], Function(getattr(self, name)))
        for name, code in (failing or {}).items():
            setattr(self, name, Function(lambda *arguments, code=code: code))

    @property
    def cuda_stream(self) -> int:
        """It is its own stream as well."""
        return self.stream_handle

    def synchronize(self) -> None:
        """All copies happen."""
        with self._lock:
            self._run(len(self._queue))

    def _run(self, count: int) -> None:
        for one in self._queue[:count]:
            if isinstance(one, tuple):
                ctypes.memmove(*one)
        del self._queue[:count]

    def _cuCtxGetCurrent(self, found: Any) -> None:
        ctypes.cast(found, ctypes.POINTER(ctypes.c_void_p))[0] = 0xC0

    def _cuCtxSetCurrent(self, context: ctypes.c_void_p) -> None:
        assert context.value == 0xC0
        with self._lock:
            self.entered.append(threading.get_ident())

    def _cuEventCreate(self, made: Any, flags: int) -> None:
        with self._lock:
            self._made += 1
            self.events.add(self._made)
            ctypes.cast(made, ctypes.POINTER(ctypes.c_void_p))[0] = self._made

    def _cuEventDestroy_v2(self, event: int) -> None:
        self.events.remove(event)

    def _cuEventQuery(self, event: int) -> int:
        with self._lock:
            return NOT_READY if event in self._queue and not self.eager else 0

    def _cuEventRecord(self, event: int, stream: int) -> None:
        assert event in self.events and stream == self.stream_handle
        with self._lock:
            self._queue.append(event)

    def _cuEventSynchronize(self, event: int) -> None:
        with self._lock:
            last = max((n for n, one in enumerate(self._queue) if one == event), default=-1)
            self._run(last + 1)

    def _cuMemHostRegister_v2(self, address: int, nbytes: int, flags: int) -> int:
        if sum(self.pinned.values()) + nbytes > self.pin_limit:
            return OUT_OF_MEMORY
        self.pinned[address] = nbytes
        return 0

    def _cuMemHostGetDevicePointer_v2(self, found: Any, address: int, flags: int) -> None:
        assert address in self.pinned and not flags
        ctypes.cast(found, ctypes.POINTER(ctypes.c_uint64))[0] = address

    def _cuMemHostUnregister(self, address: int) -> None:
        del self.pinned[address]

    def _cuMemcpyHtoDAsync_v2(self, target: int, source: int, nbytes: int, stream: int) -> None:
        assert threading.get_ident() in self.entered and stream == self.stream_handle
        assert any(at <= source and source + nbytes <= at + n for at, n in self.pinned.items())
        with self._lock:
            self._queue.append((target, source, nbytes))
