"""Faults to plant in a kernel's PTX."""

from __future__ import annotations

import re
from collections.abc import Callable

Alteration = Callable[[str], str]

WAIT = r"\{\s*\.reg \.pred\s+P1;.*?DONE:\s*\}"
"""A wait for a barrier in shared memory."""


def without(pattern: str, which: int) -> Alteration:
    """Remove an instruction."""

    def alter(ptx: str) -> str:
        found = list(re.finditer(pattern, ptx, re.DOTALL))[which]
        return ptx[: found.start()] + ptx[found.end() :]

    return alter


def instead(pattern: str, other: str) -> Alteration:
    """Replace all of an instruction; there has to be one."""

    def alter(ptx: str) -> str:
        altered, count = re.subn(pattern, other, ptx)
        assert count
        return altered

    return alter
