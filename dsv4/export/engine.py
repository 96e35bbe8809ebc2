"""Runs an export: files of tensors one by one, then what stands beside them, config.json last.

A file of tensors is the unit of resuming: it is written under a temporary name, synced, renamed and
recorded in `export.jsonl` with its BLAKE3, which a run that goes on compares. Without config.json
the directory is not a checkpoint, so whatever happens before, the same command goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from blake3 import blake3
from torch import Tensor

from dsv4.convert.counter import Event, Progress
from dsv4.export.description import CONFIG_FILE, documents
from dsv4.export.plan import DEFAULT_SHARD_BYTES, Experts, ExportPlan, Shard, make_plan
from dsv4.export.reading import Reading
from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.errors import (
    ConfigError,
    ConflictError,
    OtherConversionError,
    OutOfSpaceError,
    StoreError,
)
from dsv4.formats.plain_text import counted, first, size
from dsv4.formats.store.durable import (
    DirectoryLock,
    create_directory,
    storage_errors,
    sync_directory,
    write_atomic,
    write_file,
)
from dsv4.formats.store.journal import Journal
from dsv4.formats.store.manifest import FileRecord
from dsv4.formats.store.specs import LOCK, PARTIAL_SUFFIX, FileSpec
from dsv4.formats.store.zarr_json import parse_json
from dsv4.formats.threads import one_torch_thread
from dsv4.formats.version import TOOL

JOURNAL = "export.jsonl"
MAX_WORKERS = 4  # more wait for the disk
_OPTIONS = {  # what an export is begun with, as a user says it
    "tool": "the program",
    "root": "the store of root",
    "experts": "--experts",
    "bf16": "--bf16",
    "shard_bytes": "--shard-size",
}
_PIECE = 4 << 20  # of a file that is compared


@dataclasses.dataclass(frozen=True)
class ExportSummary:
    """What a finished export reports. root: the store's. files: BLAKE3 of each file of tensors.

    apart: experts whose gate and up keep two global scales, by the name of the gate.
    """

    out: Path
    root: str
    plan: ExportPlan
    files: dict[str, str]
    resumed_files: int
    apart: tuple[str, ...]

    @property
    def notices(self) -> tuple[str, ...]:
        """What other readers may stumble over: whole sentences."""
        if not self.apart:
            return self.plan.notices
        sentence = (
            f"{counted(len(self.apart), 'expert keeps', 'experts keep')} two global scales for "
            f"gate and up ({first(self.apart)}), since E4M3 cannot hold the difference; a server "
            "that reads one for both computes something else"
        )
        return (*self.plan.notices, sentence)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "out": str(self.out),
            "root": self.root,
            "tensors": self.plan.tensors,
            "bytes": self.plan.nbytes,
            "files": [
                {"name": shard.name, "bytes": shard.nbytes, "blake3": self.files[shard.name]}
                for shard in self.plan.shards
            ],
            "resumed_files": self.resumed_files,
            "two_global_scales": list(self.apart),
            "notices": list(self.notices),
        }


def export(
    packed: str | Path | PackedCheckpoint,
    out: str | Path,
    *,
    experts: Experts = "nvfp4",
    bf16: Sequence[str] = (),
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    workers: int | None = None,
    progress: Progress | None = None,
    notice: Callable[[str], object] = lambda sentence: None,
) -> ExportSummary:
    """Write the checkpoint that the store `packed` holds into the directory `out`.

    Names are the hub's, NVFP4 tensors ModelOpt's; what was carried in its own encoding comes back
    byte for byte. experts: "source" gives back MXFP4 where the experts came from it. bf16: globs
    of NVFP4 matrices to write as BF16, whose values it holds. shard_bytes: of a file, about.
    workers: files written at once. notice: gets each sentence of the summary's notices.
    Resumes when `out` holds an unfinished export of the same store with the same options.
    Raises StoreError for a store that is damaged or unfinished, ConflictError, ConfigError,
    FormatError or OutOfSpaceError.
    """
    checkpoint = packed if isinstance(packed, PackedCheckpoint) else PackedCheckpoint.open(packed)
    if (absent := checkpoint.store.absent) is not None:
        raise StoreError(
            f"{absent.sentence(checkpoint.store.root)}; only a whole store is exported"
        )
    if shard_bytes < 1:
        raise ConfigError(f"--shard-size is {shard_bytes} bytes, expected at least 1")
    out = _checked_out(checkpoint.store.root, out)
    plan = make_plan(checkpoint, experts=experts, bf16=bf16, shard_bytes=shard_bytes)
    assets = {name: _asset(checkpoint, name) for name in checkpoint.store.assets}
    beside = documents(plan, _config(checkpoint, assets))
    for sentence in plan.notices:
        notice(sentence)
    identity = {
        "tool": TOOL,
        "root": checkpoint.store.manifest["root"],
        "experts": experts,
        "bf16": sorted(bf16),
        "shard_bytes": shard_bytes,
    }
    with _Directory(out, identity) as directory:
        work = _Work(plan, Reading(checkpoint), directory, progress)
        work.run(workers or min(MAX_WORKERS, len(os.sched_getaffinity(0))))
        hashes = {shard.name: directory.records[shard.name].blake3 for shard in plan.shards}
        apart = [name for shard in plan.shards for name in directory.notes[shard.name]]
        directory.finish(assets | beside)
    root = str(identity["root"])
    summary = ExportSummary(out, root, plan, hashes, work.resumed, tuple(apart))
    for sentence in summary.notices[len(plan.notices) :]:
        notice(sentence)
    return summary


def _checked_out(root: Path, out: str | Path) -> Path:
    """Where to write: neither inside the store nor around it."""
    if not os.fspath(out):
        raise ConfigError("--out is empty; give the directory to write into")
    a, b = root.resolve(), Path(out).resolve()
    if a == b or a in b.parents or b in a.parents:
        raise ConfigError(f"--out {out} and the store {root} overlap; choose another directory")
    return Path(out)


def _asset(packed: PackedCheckpoint, name: str) -> bytes:
    """A file that travels along, compared with its checksum."""
    store = packed.store
    file = next(f for f in store.files_under(None) if store.root / f.key == store.assets[name])
    return store.map_file(file, keep=False).view(0, file.nbytes).numpy().tobytes()


def _config(packed: PackedCheckpoint, assets: dict[str, bytes]) -> dict[str, Any]:
    if CONFIG_FILE not in assets:
        raise StoreError(
            f"{packed.store.root}: it has no {CONFIG_FILE} of its source, which a checkpoint "
            "needs; convert the source again"
        )
    config = parse_json(assets[CONFIG_FILE], f"{packed.store.root}: {CONFIG_FILE}")
    if not isinstance(config, dict):
        raise StoreError(f"{packed.store.root}: {CONFIG_FILE} is not a JSON object")
    return config


def _begun(error: OtherConversionError) -> str:
    """What was begun where another export is to be written."""
    begun, now = error.begun, error.now
    if begun.keys() != now.keys():
        return "what another command of dsv4 began"
    differences = []
    for key in sorted(key for key in now if begun[key] != now[key]):
        then, here = (
            (", ".join(map(str, value)) or "nothing") if isinstance(value, list) else value
            for value in (begun[key], now[key])
        )
        differences.append(f"{_OPTIONS[key]} {then}, now it is {here}")
    return f"an unfinished export, begun with {'; '.join(differences)}"


class _Directory:
    """The directory that is written: locked, with a journal of finished files of tensors."""

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        with storage_errors(out, "examining the directory"):
            self._new = not out.exists()
        create_directory(out)
        self.out = out
        with storage_errors(out, "examining the directory"):
            self._refuse()
        self._lock = DirectoryLock(out)
        try:
            self._journal = Journal(out / JOURNAL, identity)
            with storage_errors(out, "removing what an interrupted run left behind"):
                for partial in out.glob(f"*{PARTIAL_SUFFIX}"):
                    partial.unlink()
        except OtherConversionError as error:
            self._lock.release()
            raise ConflictError(
                f"{out}: it holds {_begun(error)}; repeat that one, remove the directory, or "
                "choose another one"
            ) from None
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> _Directory:
        return self

    def __exit__(self, *error: object) -> None:
        self._journal.close()
        with contextlib.suppress(OSError):
            if {path.name for path in self.out.iterdir()} == {JOURNAL, LOCK}:  # nothing was done
                (self.out / JOURNAL).unlink()
                self._lock.release(remove=True)
                if self._new:
                    self.out.rmdir()
        self._lock.release()

    @property
    def records(self) -> dict[str, FileRecord]:
        """Files of tensors that are durable."""
        return self._journal.records

    @property
    def notes(self) -> dict[str, Any]:
        """Experts with two global scales, by the file they are in."""
        return self._journal.notes

    def has(self, shard: Shard) -> bool:
        """Whether a file is there with the bytes that were written, by its whole BLAKE3."""
        record, path = self.records.get(shard.name), self.out / shard.name
        with storage_errors(path, "comparing it with its checksum"):
            try:
                if record is None or not path.lstat().st_size == record.nbytes == shard.nbytes:
                    return False
                digest = blake3()
                with path.open("rb") as file:
                    while piece := file.read(_PIECE):
                        digest.update(piece)
                return digest.hexdigest() == record.blake3
            except FileNotFoundError:
                return False

    def write(self, shard: Shard, parts: Iterator[Tensor | bytes], apart: list[str]) -> None:
        """Write a file of tensors and record it; `apart` is known once `parts` are at their end."""
        file = FileSpec(shard.name, (0, 1), 1, shard.nbytes, sharded=False)
        record = write_file(self.out, file, parts)
        self._journal.append({shard.name: record}, {}, {shard.name: apart})

    def require_space(self, nbytes: int) -> None:
        """Raise OutOfSpaceError unless the file system has so much for this user."""
        with storage_errors(self.out, "asking for free space"):
            status = os.statvfs(self.out)
        free = status.f_bavail * status.f_frsize
        if free < nbytes:
            raise OutOfSpaceError(
                f"{self.out}: {size(nbytes)} are still to be written, {size(free)} are free; free "
                "some space or choose another directory"
            )

    def finish(self, files: dict[str, bytes]) -> None:
        """Write the small files, config.json last; then the journal goes."""
        with storage_errors(self.out, "finishing the export"):
            for name in sorted(files, key=lambda name: (name == CONFIG_FILE, name)):
                write_atomic(self.out / name, files[name])
            self._journal.close()
            (self.out / JOURNAL).unlink()
            self._lock.release(remove=True)
            sync_directory(self.out)

    def _refuse(self) -> None:
        names = {path.name for path in self.out.iterdir()}
        if JOURNAL not in names and CONFIG_FILE in names:
            raise ConflictError(
                f"{self.out}: it holds a checkpoint already, as a finished export leaves one; use "
                "it as it is, remove it to export again, or choose an empty directory"
            )
        if JOURNAL not in names and (others := sorted(names - {LOCK})):
            raise ConflictError(
                f"{self.out}: it is not empty ({others[0]}) and holds no unfinished export; choose "
                "an empty directory"
            )


class _Work:
    """The files that are not there yet, on threads, and how far they are."""

    def __init__(
        self, plan: ExportPlan, reading: Reading, directory: _Directory, progress: Progress | None
    ) -> None:
        self._plan = plan
        self._reading = reading
        self._directory = directory
        self._progress = progress
        self._lock = threading.Lock()
        self._stop = threading.Event()
        there = [shard for shard in plan.shards if directory.has(shard)]
        self._missing = [shard for shard in plan.shards if shard not in there]
        self.resumed = len(there)
        self._total = sum(map(_payload, plan.shards))
        self._bytes = self._resumed_bytes = sum(_payload(shard) for shard in there)
        self._tensors = sum(len(piece.names) for shard in there for piece in shard.pieces)
        self._all_tensors = plan.tensors

    def run(self, workers: int) -> None:
        """Write them all. Raises what the first failure raised, once all threads have stopped."""
        self._directory.require_space(sum(shard.nbytes for shard in self._missing))
        pool = ThreadPoolExecutor(workers, "export")
        try:
            with one_torch_thread():
                tasks = [pool.submit(self._write, shard) for shard in self._missing]
                done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
                self._stop.set()
                errors = [task.exception() for task in done if task.exception() is not None]
                if errors and (error := errors[0]) is not None:
                    raise error
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _write(self, shard: Shard) -> None:
        apart: list[str] = []
        self._directory.write(shard, self._parts(shard, apart), apart)

    def _parts(self, shard: Shard, apart: list[str]) -> Iterator[Tensor | bytes]:
        yield shard.head
        for piece in shard.pieces:
            parts = piece.parts(self._reading, apart.append)
            for entry in piece.entries:
                for part in parts[entry.name]:
                    if self._stop.is_set():
                        raise StoreError("the export was stopped")
                    yield part.contiguous()
            self._add(piece.path, piece.nbytes, len(piece.names))

    def _add(self, path: str, nbytes: int, tensors: int) -> None:
        with self._lock:
            self._bytes += nbytes
            self._tensors += tensors
            if self._progress is None:
                return
            self._progress(
                Event(
                    f"{path}/",
                    self._bytes,
                    self._total,
                    self._tensors,
                    self._all_tensors,
                    self._resumed_bytes,
                    None,
                )
            )


def _payload(shard: Shard) -> int:
    return shard.nbytes - len(shard.head)
