"""Where a conversion's time goes: its functions are wrapped while it is watched, not before.

    with watch() as seconds:
        convert(...)
    seconds["hash source"].cpu

Times are exclusive: what a stage spends in another one is the other's. They add up over threads,
so two busy cores give two seconds a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from dsv4.convert import pipeline
from dsv4.convert.outputs import base as outputs
from dsv4.convert.sources import hashing_reader, local_file
from dsv4.formats.store import extents, writer

_WATCHED: tuple[tuple[str, Any, str], ...] = (
    ("read", local_file.LocalStream, "readinto"),
    ("hash source", hashing_reader.FilePass, "read"),
    ("cast and layout", outputs.Unit, "run"),
    ("allocate", os, "posix_fallocate"),
    ("write", extents.Sink, "write_at"),
    ("write", extents.Sink, "write"),
    ("sync", os, "fdatasync"),
    ("sync", os, "fsync"),
    ("read back and hash", writer, "seal"),
    ("journal", writer.StoreWriter, "commit"),
    ("wait for room", pipeline._Room, "enter"),
)
STAGES = tuple(dict.fromkeys(stage for stage, *_ in _WATCHED))


@dataclasses.dataclass
class Seconds:
    """Of one stage, over all threads: elapsed, and of them on a core; and how often it began."""

    wall: float = 0.0
    cpu: float = 0.0
    calls: int = 0


class _Clock(threading.local):
    """What the stages entered inside the present one have taken, in this thread."""

    inner: tuple[float, float] = (0.0, 0.0)


@contextlib.contextmanager
def watch() -> Iterator[dict[str, Seconds]]:
    """Measure every stage until the block ends; not to be nested."""
    totals = {stage: Seconds() for stage in STAGES}
    clock, lock = _Clock(), threading.Lock()

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            outside, clock.inner = clock.inner, (0.0, 0.0)
            begin = time.perf_counter(), time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                wall, cpu = time.perf_counter() - begin[0], time.thread_time() - begin[1]
                with lock:
                    totals[stage].calls += 1
                    totals[stage].wall += wall - clock.inner[0]
                    totals[stage].cpu += cpu - clock.inner[1]
                clock.inner = outside[0] + wall, outside[1] + cpu

        return call

    with contextlib.ExitStack() as restore:
        for stage, owner, name in _WATCHED:
            original = getattr(owner, name)
            restore.callback(setattr, owner, name, original)
            setattr(owner, name, timed(stage, original))
        yield totals
