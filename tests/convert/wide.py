"""Copies of a checkpoint whose experts have block scales far apart, or other bytes of any kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HELD = 17  # octaves between the largest power of two of E4M3, 2^8, and the smallest, 2^-9
COLUMNS = 32  # of one MXFP4 scale
THREES = 0x55  # two codes of 3: three octaves below 2^-9 they are 3/8 of it, which is no code

Bytes = NDArray[np.uint8]
Edit = Callable[[Bytes], None]


def edited(source: Path, out: Path, edits: Mapping[str, Edit]) -> Path:
    """A copy of `source` in which tensors (their bytes, in order) were changed in place."""
    shutil.copytree(source, out)
    left = set(edits)
    for file in sorted(out.glob("*.safetensors")):
        raw = np.frombuffer(file.read_bytes(), np.uint8).copy()
        length = int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8 : 8 + length].tobytes())
        for name in left & header.keys():
            begin, end = header[name]["data_offsets"]
            edits[name](raw[8 + length + begin : 8 + length + end])
            left.discard(name)
        file.write_bytes(raw.tobytes())
    assert not left, f"not in {source}: {left}"
    return out


def widened(
    source: Path, out: Path, names: Iterable[str], *, octaves: int, blocks: int = 1
) -> Path:
    """`source` with experts, of which the first `blocks` scales lie `octaves` below the largest.

    What they scale are codes of 3. All other blocks share one scale, so that these alone decide.
    """

    def scales(raw: Bytes) -> None:
        raw[:] = 120
        raw[:blocks] = 120 - octaves

    def codes(raw: Bytes) -> None:
        raw[: blocks * COLUMNS // 2] = THREES

    edits: dict[str, Edit] = {}
    for name in names:
        edits |= {name: codes, name.removesuffix("weight") + "scale": scales}
    return edited(source, out, edits)
