"""How long a start takes, phase by phase, from the process's first moment to the first token.

A phase is marked when it ends; it took the time since the one before it. The clock starts where the
kernel says that the process did, so the interpreter's own start counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

Mark = Callable[[str], object]
"""Called with the name of a phase when it ends."""

_STATUS = Path("/proc/self/stat")
_START = 19  # field of it, counted behind the command's name: clock ticks since the machine started


class Timeline:
    """phases: name -> seconds since the process started, when it ended; in order."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._start = time.perf_counter() - process_age()

    def mark(self, phase: str) -> None:
        """`phase` ends now. One that is marked again keeps its first end."""
        self.phases.setdefault(phase, time.perf_counter() - self._start)

    def line(self) -> str:
        """For people: what each phase took, and when the last one ended."""
        begins = [0.0, *self.phases.values()]
        took = [f"{n} {end - begins[i]:.2f}" for i, (n, end) in enumerate(self.phases.items())]
        return f"start   {', '.join(took)}: {begins[-1]:.2f} s after the process's start"


def process_age() -> float:
    """Seconds since this process started, to a hundredth; 0 where nobody says."""
    try:
        fields = _STATUS.read_text().rpartition(")")[2].split()
        started = int(fields[_START]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError):
        return 0.0
