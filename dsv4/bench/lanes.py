"""What the convert bench times, each in a process of its own so that its peak memory is its own.

    copy                a plain copy: read and write in pieces, fsync of files and directory
    native, standard    dsv4 with that recipe
    today               what a user does without dsv4: load, stack, swizzle scales, save

Run as `python -m dsv4.bench.lanes LANE SRC OUT WORKERS`; prints one JSON document.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4.convert.engine import convert
from dsv4.formats.store.durable import sync_directory, sync_file

PIECE_BYTES = 8 << 20
RECIPES = ("native", "standard")
LANES = ("copy", *RECIPES, "today")
ROW_TILE, COLUMN_TILE = 128, 4  # of block-scaled matrix products' scales
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(w[123])\.(weight|scale)")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a lane: seconds without start-up, on a core, and the process's peak memory."""

    seconds: float
    warm_up_seconds: float
    cpu_seconds: float
    page_faults: int
    base_rss: int
    peak_rss: int


def copy(source: Path, out: Path) -> None:
    """Every file of `source` into `out`, durably."""
    out.mkdir()
    buffer = memoryview(bytearray(PIECE_BYTES))
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as reads, (out / path.name).open("wb", 0) as writes:
            while count := reads.readinto(buffer):
                writes.write(buffer[:count])
            os.fsync(writes.fileno())
    sync_directory(out)


def today(source: Path, out: Path) -> None:
    """Every file loaded whole, experts stacked, scales swizzled as kernels read them, saved."""
    out.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        tensors = load_file(path)
        save_file(stack_experts(tensors), out / path.name)
        sync_file(out / path.name)
    sync_directory(out)


def stack_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Per layer `w13` and `w2` with their scales, stacked over experts; others as they are.

    Takes the experts out of `tensors`. Codes `[E, N, K/2]`, scales `[E, N/128, K/32/4, 512]`.
    """
    experts: dict[str, dict[int, dict[tuple[str, str], Tensor]]] = {}
    for name in list(tensors):
        if found := _EXPERT.fullmatch(name):
            prefix, index, projection, kind = found.groups()
            parts = experts.setdefault(prefix, {}).setdefault(int(index), {})
            parts[projection, kind] = tensors.pop(name)
    stacked = dict(tensors)
    for prefix, by_index in experts.items():
        ordered = [by_index[index] for index in sorted(by_index)]
        for kind, finish in (("weight", _same), ("scale", swizzle)):
            for stack, names in (("w13", ("w1", "w3")), ("w2", ("w2",))):
                whole = (
                    torch.cat([parts.pop((name, kind)) for name in names]) for parts in ordered
                )
                stacked[f"{prefix}.{stack}.{kind}"] = torch.stack([finish(x) for x in whole])
    return stacked


def swizzle(scales: Tensor) -> Tensor:
    """Block scales `[R, C]` -> uint8 `[R/128, C/4, 512]`, in the order that kernels read them."""
    rows, columns = scales.shape
    down, across = -(-rows // ROW_TILE), -(-columns // COLUMN_TILE)
    padded = torch.zeros(down * ROW_TILE, across * COLUMN_TILE, dtype=torch.uint8)
    padded[:rows, :columns] = scales.view(torch.uint8)
    tiles = padded.view(down, 4, 32, across, COLUMN_TILE).permute(0, 3, 2, 1, 4)
    return tiles.reshape(down, across, ROW_TILE * COLUMN_TILE)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def run(lane: str, source: Path, out: Path, workers: int) -> Run:
    """Run one lane in this process."""
    base, begin = peak_rss(), time.perf_counter()
    _warm_up(out, sum(path.stat().st_size for path in source.iterdir()))
    warm_up = time.perf_counter() - begin
    work: dict[str, Callable[[Path, Path], None]] = {"copy": copy, "today": today}
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    if lane in RECIPES:
        convert(source, out, lane, workers)
    else:
        torch.set_num_threads(workers)
        work[lane](source, out)
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    faults = after.ru_minflt - before.ru_minflt
    return Run(seconds, warm_up, cpu, faults, base, peak_rss())


def _warm_up(out: Path, nbytes: int) -> None:
    """Let the machine touch as much page cache as the lane will fill.

    A virtual machine may have given free memory back to its host; whoever takes it first pays.
    """
    piece = bytes(PIECE_BYTES)
    path = out.with_name(out.name + ".warm-up")
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(0, nbytes, PIECE_BYTES):
                file.write(piece)
    finally:
        path.unlink(missing_ok=True)


def peak_rss() -> int:
    """The most memory this process has held, in bytes.

    From the kernel's status page: getrusage also counts what the parent held when it forked.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    """Run the lane that the arguments name, and print what it took."""
    lane, source, out, workers = sys.argv[1:]
    print(json.dumps(dataclasses.asdict(run(lane, Path(source), Path(out), int(workers)))))


if __name__ == "__main__":
    main()
