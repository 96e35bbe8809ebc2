"""`dsv4 bench load`: a store onto a device beside what others do with the same bytes.

The store's arrays are written once more as safetensors files, a tensor an array. Then, turn by
turn: dsv4 (checksums verified), dsv4 without checksums, safetensors' `load_file` with its mapping
and with its pread backend, fastsafetensors where it is installed. Warm: all bytes are in the page
cache, and the bus is the bound. Cold: the files leave the page cache first, and the disk is.

Both bounds are measured in the same run: the bus by copies of pinned memory, the disk by reading
the same files with O_DIRECT and doing nothing else. Every lane's result is compared with the store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4.bench.first_load import first_load
from dsv4.bench.machine_rates import (
    PIECE,
    Machine,
    bus_rate,
    disk_rate,
    drop,
    file_rate,
    memory_rate,
    settle,
    touch,
)
from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.store.mapped_files import map_file
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import ALIGNMENT, ELEMENTS, ArraySpec, FileSpec
from dsv4.runtime.load import LoadReport, Settings, load_weights, plan_load
from dsv4.synthetic.disk_space import require_space

FILE_BYTES = 4 << 30  # of a safetensors file, about
COLD_LANES = ("dsv4", "safetensors, mapping", "fastsafetensors")
COMPARED = 12  # arrays, the largest among them
COMPARED_BYTES = 2 << 20  # of a file, at its begin, middle and end
_DTYPES = {1: "U8", 2: "BF16", 4: "F32", 8: "I64"}

Result = Callable[[str], Tensor]
"""Path of an array -> its bytes on the device, uint8."""


@dataclasses.dataclass(frozen=True)
class Line:
    """One lane. rates: bytes a second, turn by turn; of_bound: the median's fraction of it."""

    lane: str
    cold: bool
    rates: tuple[float, ...]
    of_bound: float
    correct: bool

    @property
    def rate(self) -> float:
        """The median."""
        return statistics.median(self.rates)


@dataclasses.dataclass(frozen=True)
class Loading:
    """What a run found. reports: of dsv4's first load, in a new process, and of its
    last turn, warm and cold."""

    machine: Machine
    nbytes: int
    lines: tuple[Line, ...]
    reports: Mapping[str, LoadReport]


def require_device(device: torch.device) -> None:
    """Raise RuntimeRefusal unless torch sees the device."""
    if device.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise RuntimeRefusal(f"{device} was asked for, but torch sees no CUDA device here")
    if (device.index or 0) >= (count := torch.cuda.device_count()):
        raise RuntimeRefusal(f"{device} was asked for, but torch sees {count} of them, from 0 on")


def measure(
    path: Path,
    scratch: Path,
    device: torch.device,
    *,
    settings: Settings,
    rounds: int,
    cold: bool = True,
    peers: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Loading:
    """Measure all lanes on the store at `path`; safetensors files go into the folder `scratch`.

    Raises RuntimeRefusal without the device, OutOfSpaceError when the disk or the device cannot
    hold the bytes.
    """
    require_device(device)
    store = PackedStore.open(path)
    plan = plan_load(store)
    specs = [placed.spec for placed in plan.arrays.values()]
    files = [file for spec in specs for file in spec.files()]
    copies = _write_safetensors(store, specs, scratch) if peers else []
    reports: dict[str, LoadReport] = {}
    lanes = dict(_lanes(store, copies, device, settings, reports))
    everything = [path / file.key for file in files] + copies
    disk = None
    if cold:
        os.sync()
        drop(everything)
        disk = disk_rate(path, files, settings.threads, settings.slot_nbytes)
    machine = _machine(path, files, device, settings, disk)
    judge = _judge(store, specs)
    kept: dict[str, LoadReport] = {}
    lines = []
    for state in ("warm", "cold") if disk else ("warm",):
        if state == "warm":
            touch(everything, settings.threads)
            kept["first"] = first_load(path, device, settings)
        bound = machine.bus if state == "warm" else disk or machine.bus
        chosen = {n: lane for n, lane in lanes.items() if state == "warm" or n in COLD_LANES}
        for name, rates, correct in _turns(
            chosen, everything, plan.payload_nbytes, device, judge, rounds, state == "cold", say
        ):
            of_bound = statistics.median(rates) / bound
            lines.append(Line(name, state == "cold", rates, of_bound, correct))
        kept[state] = reports.pop("last")
    return Loading(machine, plan.payload_nbytes, tuple(lines), kept)


def _machine(
    root: Path,
    files: Sequence[FileSpec],
    device: torch.device,
    settings: Settings,
    disk: float | None,
) -> Machine:
    """Measure it; afterwards the store's files are in the page cache."""
    touch([root / file.key for file in files], settings.threads)
    return Machine(
        torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        len(os.sched_getaffinity(0)),
        bus_rate(device),
        disk,
        file_rate(root, files, settings.threads, settings.slot_nbytes, direct=False) or 0.0,
        memory_rate(settings.threads),
    )


def _turns(
    lanes: Mapping[str, Callable[[], Result]],
    files: Sequence[Path],
    nbytes: int,
    device: torch.device,
    judge: Callable[[Result], bool],
    rounds: int,
    cold: bool,
    say: Callable[[str], None],
) -> Iterator[tuple[str, tuple[float, ...], bool]]:
    """Each lane in turns; the first warm turn does not count: libraries wake up in it."""
    rates: dict[str, list[float]] = {name: [] for name in lanes}
    correct = dict.fromkeys(lanes, True)
    for turn in range(rounds if cold else rounds + 1):
        for name, run in lanes.items():
            if cold:
                drop(files)
            begin = time.perf_counter()
            result = run()
            settle(device)
            seconds = time.perf_counter() - begin
            what = "cold" if cold else "warm" if turn else "first"
            say(f"{what}: {name}: {seconds:.3f} s, {nbytes / seconds / 1e9:.2f} GB/s")
            if cold or turn:
                rates[name].append(nbytes / seconds)
            if turn == rounds - 1:
                correct[name] = judge(result)
            del result
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    for name in lanes:
        yield name, tuple(rates[name]), correct[name]


def _lanes(
    store: PackedStore,
    copies: Sequence[Path],
    device: torch.device,
    settings: Settings,
    reports: dict[str, LoadReport],
) -> Iterator[tuple[str, Callable[[], Result]]]:
    def ours(**how: Any) -> Result:
        weights = load_weights(store, device, settings=dataclasses.replace(settings, **how))
        if not how:
            reports["last"] = weights.reports[-1]
        return lambda path: weights.share_of(path).view(-1).view(torch.uint8)

    def theirs(backend: str) -> Result:
        from safetensors.torch import load_file

        found: dict[str, Tensor] = {}
        for copy in copies:
            found |= load_file(copy, device=str(device), backend=backend)
        return lambda path: found[path].view(-1).view(torch.uint8)

    yield "dsv4", ours
    yield "dsv4, readers hash", lambda: ours(verify="readers")
    yield "dsv4, checksums off", lambda: ours(verify="off")
    if copies:
        if device.type != "cpu":  # where it only maps, and nothing is loaded
            yield "safetensors, mapping", lambda: theirs("mmap")
        yield "safetensors, pread", lambda: theirs("pread")
        if importlib.util.find_spec("fastsafetensors") and device.type == "cuda":
            yield "fastsafetensors", lambda: _fastsafetensors(copies, device)


def _fastsafetensors(copies: Sequence[Path], device: torch.device) -> Result:
    from fastsafetensors import SafeTensorsFileLoader

    loader = SafeTensorsFileLoader(None, f"cuda:{device.index or 0}", nogds=True)
    loader.add_filenames({0: [str(copy) for copy in copies]})
    buffers = loader.copy_files_to_device()
    found = {name: buffers.get_tensor(name) for name in loader.get_keys()}

    def result(path: str) -> Tensor:
        assert buffers  # lives as long as what it loaded
        tensor: Tensor = found[path]
        return tensor.view(-1).view(torch.uint8)

    return result


def _judge(store: PackedStore, specs: Sequence[ArraySpec]) -> Callable[[Result], bool]:
    """Whether a lane's arrays are the store's: pieces of the largest and of some others."""
    by_size = sorted(specs, key=lambda spec: -spec.nbytes)
    chosen = by_size[: COMPARED // 2] + by_size[COMPARED // 2 :: len(specs) // 6 + 1]

    def right(result: Result) -> bool:
        for spec in chosen:
            found, at = result(spec.path), 0
            for file in spec.files():
                nbytes = file.payload_nbytes
                stored = map_file(store.root / file.key, file.nbytes)
                for begin in {0, nbytes // 2, max(nbytes - COMPARED_BYTES, 0)}:
                    piece = slice(begin, min(begin + COMPARED_BYTES, nbytes))
                    here = found[at + piece.start : at + piece.stop]
                    if not torch.equal(here.cpu(), stored[piece]):
                        return False
                at += nbytes
        return True

    return right


def _write_safetensors(store: PackedStore, specs: Sequence[ArraySpec], out: Path) -> list[Path]:
    """The arrays as safetensors files of about `FILE_BYTES`, a tensor an array, by its path."""
    require_space(out, sum(spec.nbytes for spec in specs))
    groups: list[list[ArraySpec]] = [[]]
    for spec in specs:
        if sum(one.nbytes for one in groups[-1]) > FILE_BYTES:
            groups.append([])
        groups[-1].append(spec)
    jobs = [(out / f"{n:03}.safetensors", group) for n, group in enumerate(groups)]
    with ThreadPoolExecutor(8) as pool:
        for path, group in jobs:
            _write_one(store, path, group, pool)
    return [path for path, _ in jobs]


def _write_one(
    store: PackedStore, path: Path, specs: Sequence[ArraySpec], pool: ThreadPoolExecutor
) -> None:
    header: dict[str, Any] = {}
    at = 0
    places: list[tuple[FileSpec, int]] = []
    for spec in specs:
        width = ELEMENTS[spec.element].nbytes
        header[spec.path] = {
            "dtype": _DTYPES[width],
            "shape": [spec.nbytes // width],
            "data_offsets": [at, at + spec.nbytes],
        }
        for file in spec.files():
            places.append((file, at))
            at += file.payload_nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-(len(raw) + 8) % ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
    data = 8 + len(raw)

    def copy(place: tuple[FileSpec, int]) -> None:
        file, begin = place
        with contextlib.ExitStack() as stack:
            source = stack.enter_context((store.root / file.key).open("rb"))
            target = stack.enter_context(path.open("r+b"))
            done = 0
            buffer = memoryview(bytearray(PIECE))
            while done < file.payload_nbytes:
                piece = buffer[: min(PIECE, file.payload_nbytes - done)]
                os.preadv(source.fileno(), [piece], done)
                os.pwrite(target.fileno(), piece, data + begin + done)
                done += len(piece)

    list(pool.map(copy, places))
