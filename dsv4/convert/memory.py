"""How a conversion shares out memory, so that it stays below a ceiling whatever the model is.

    ceiling >= base + streams * held + in flight + workers * (one unit at work)

The base is the interpreter with torch. One unit at work is an expert or a tile of rows of a large
matrix. Held and in flight are buffers: larger ones save reading scales twice and waiting.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Self

from dsv4.convert.outputs.base import Output
from dsv4.formats.errors import ConfigError, OutOfSpaceError
from dsv4.formats.plain_text import counted, memory_size

DEFAULT_MEMORY = 2 << 30
BASE_BYTES = 500 << 20  # CPython 3.11 with torch 2.13 loaded, and the plan of the largest model
MIN_BUFFER = 64 << 20
LOCAL_HOLD = 128 << 20  # reading a local range twice costs nothing
MAX_FLIGHT = 384 << 20  # with the units at work: what they take more, the queue takes less
REMOTE_STREAMS = 4


@dataclasses.dataclass(frozen=True)
class Budget:
    """Threads and bytes. hold_bytes: of each stream. flight_bytes: of all together."""

    workers: int
    streams: int
    hold_bytes: int
    flight_bytes: int
    peak_bytes: int

    @classmethod
    def share(
        cls, memory: int, workers: int | None, outputs: Sequence[Output], *, remote: bool
    ) -> Self:
        """Share out `memory` bytes. Raises OutOfSpaceError when they do not suffice.

        workers: as many as asked for; by default one a core, or as many as memory allows.
        """
        if workers is not None and workers < 1:
            raise ConfigError(f"workers is {workers}, expected at least 1")
        unit = max((output.peak_bytes() for output in outputs), default=0)
        spare = memory - BASE_BYTES
        asked = workers or max(1, min(os.cpu_count() or 1, (spare - 2 * MIN_BUFFER) // (2 * unit)))
        while workers is None and asked > 1 and memory < _least(asked, unit, remote):
            asked -= 1
        streams = _streams(asked, remote)
        free = spare - (asked + 1) * unit
        if memory < (needed := _least(asked, unit, remote)):
            fewer = "fewer --workers or " if asked > 1 else ""
            raise OutOfSpaceError(
                f"--memory {memory_size(memory)} does not suffice for "
                f"{counted(asked, 'worker')} on this checkpoint, expected at least "
                f"{memory_size(needed)}; give {fewer}more --memory"
            )
        most = max(MAX_FLIGHT - asked * unit, MIN_BUFFER)
        flight = min(free // (streams + 1), most)
        hold = (free - flight) // streams
        if not remote:
            hold = min(hold, LOCAL_HOLD)
        peak = BASE_BYTES + (asked + 1) * unit + streams * hold + flight
        return cls(asked, streams, hold, flight, peak)


def _streams(workers: int, remote: bool) -> int:
    """Files that are read at once."""
    return min(REMOTE_STREAMS, workers) if remote else max(1, workers // 4)


def _least(workers: int, unit: int, remote: bool) -> int:
    """The memory that so many workers cannot do without."""
    buffers = (_streams(workers, remote) + 1) * MIN_BUFFER
    return BASE_BYTES + (workers + 1) * unit + buffers
