"""Rewrites exactly what is damaged of a complete store, so that its root is again the published.

    examine    every file once: which chunks are not what the manifest pins
    rebuild    FILE.partial: the good bytes of the old file, the lost ones from the source
    prove      its BLAKE3 is the manifest's, or nothing is replaced
    replace    renamed over the old file

A file is never written in place, so a repair that is killed leaves the store no worse than it was.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from dsv4.convert.outputs.base import Output
from dsv4.convert.plan import Plan
from dsv4.convert.sources.base import Source
from dsv4.formats.errors import SourceError, StoreError
from dsv4.formats.store import digest, integrity
from dsv4.formats.store.durable import (
    PIECE_BYTES,
    Directories,
    DirectoryLock,
    bytes_of,
    storage_errors,
    sync_directory,
    write_all,
    write_atomic,
)
from dsv4.formats.store.extents import Sink, partial_path
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import (
    ASSET_DIRECTORY,
    MARKER,
    NODE_DOCUMENT,
    PARTIAL_SUFFIX,
    FileSpec,
)
from dsv4.formats.store.zarr_metadata import metadata_documents
from dsv4.formats.version import TOOL
from dsv4.validate.damage_scan import FileDamage, examine, measure, open_regular, survey
from dsv4.validate.made_from import WRONG_SOURCE, plan_of, source_of
from dsv4.validate.repair_report import FileRepair, RepairReport
from dsv4.validate.watch import Progress

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
_ASSETS = f"{ASSET_DIRECTORY}/"

Make = Callable[[Sink], object]
"""Writes the lost bytes of some files into a sink."""

OpenedSource = Callable[[], tuple[Source, str]]
"""-> (the source, its name), opened when something has to be made again."""


def repair(
    packed: str | Path,
    source: str | Path | None = None,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
    on_wait: Callable[[str], None] | None = None,
) -> RepairReport:
    """Make the damaged files of the complete store `packed` again, from `source` where needed.

    source: what the store was made from; None: the repository and commit its manifest names.
    dry_run: say what would be rewritten, write nothing and read no source. progress: told of what
    is examined, every file once. A whole store is only read: nothing is locked before something
    has to be written. on_wait: told, in a sentence, when the network is waited for.
    Whatever could not be repaired is in the report. Raises StoreError when the root's metadata is
    damaged (it cannot be made from itself), SourceError when the source is needed and is another,
    ConflictError when another process writes there, OutOfSpaceError.
    """
    begin = time.perf_counter()
    root = Path(packed)
    store, published = _open(root)
    absent = store.absent and store.absent.sentence(root)
    report = RepairReport(root, published, absent=absent, dry_run=dry_run)
    suspects = survey(store, progress)
    if dry_run:
        report.files += _to_rewrite(store, suspects)
        report.seconds = time.perf_counter() - begin
        return report
    if suspects or _leftovers(store) or any(integrity.node_faults(store)):
        lock = DirectoryLock(root)
        try:
            with storage_errors(root, "repairing the store"):
                opened = functools.partial(source_of, store, source, on_wait)
                _mend(store, [found.file for found in suspects], opened, report)
        finally:
            lock.release(remove=True)
    report.files += _strangers(store)
    report.seconds = time.perf_counter() - begin
    return report


def rewrite(
    store: PackedStore, damage: Sequence[FileDamage], write: Callable[[FileDamage, Sink], object]
) -> list[FileRepair]:
    """Rebuild damaged files, whose lost bytes `write` puts into a sink; and the documents.

    -> what became of each: one that is not proved by its BLAKE3 is as it was. Raises ConflictError
    when another process writes there, OutOfSpaceError, and what `write` raises.
    """
    lock = DirectoryLock(store.root)
    try:
        repairs = [
            made
            for found in damage
            for made in _replace(store, [found], functools.partial(write, found))
        ]
        return repairs + _rewrite_documents(store)
    finally:
        lock.release(remove=True)


def _mend(
    store: PackedStore,
    files: Sequence[FileSpec],
    opened: OpenedSource,
    report: RepairReport,
) -> None:
    """Make those of `files` whole that still are not, under the lock; and the documents."""
    for key in _leftovers(store):
        (store.root / key).unlink()
    # Another repair may have been here before the lock was ours.
    damage = [found for file in files if (found := examine(store, file)) is not None]
    report.files += _make_lost(store, [d for d in damage if d.chunks], opened, report)
    for found in damage:
        if not found.chunks:
            report.files += _replace(store, [found], lambda sink: None)
    report.files += _rewrite_documents(store)


def _to_rewrite(store: PackedStore, damage: Sequence[FileDamage]) -> Iterator[FileRepair]:
    """What a repair would do, in its order."""
    for found in damage:
        yield FileRepair(found.file.key, found.problem, found.lost_bytes)
    for fault in integrity.node_faults(store):
        yield FileRepair(fault.key, fault.problem, 0)
    leftovers = set(_leftovers(store))
    yield from (found for found in _strangers(store) if found.key not in leftovers)


def _strangers(store: PackedStore) -> list[FileRepair]:
    what = "it is not ours to remove: move it away"
    return [FileRepair(f.key, f.problem, 0, what) for f in integrity.unlisted(store)]


def _open(root: Path) -> tuple[PackedStore, str]:
    """-> (the store, its root recomputed from the metadata)."""
    try:
        store = PackedStore.open(root, check_files=False)
        return store, integrity.check_root(store)
    except StoreError as error:
        if not (root / MARKER).exists():
            raise
        raise StoreError(
            f"{error}; this pins all other files and cannot be repaired: convert the source again"
        ) from error


def _leftovers(store: PackedStore) -> list[str]:
    """Partial files of an interrupted repair; what else ends like them is a stranger's."""
    ours = {file.key for file in store.files_under(None)} | set(_documents(store))
    return [
        key
        for key in integrity.walk(store.root)
        if key.endswith(PARTIAL_SUFFIX) and key.removesuffix(PARTIAL_SUFFIX) in ours
    ]


def _documents(store: PackedStore) -> Iterator[str]:
    nodes = (*store.hierarchy.groups, *store.hierarchy.arrays)
    return (f"{path}/{NODE_DOCUMENT}" for path in nodes)


def _make_lost(
    store: PackedStore, damage: Sequence[FileDamage], opened: OpenedSource, report: RepairReport
) -> list[FileRepair]:
    """Make what is lost again. Raises SourceError when the source gives nothing of it."""
    if not damage:
        return []
    source, report.source = opened()
    repairs: list[FileRepair] = []
    for group, make in _work(plan_of(store, source), source, damage):
        repairs += _replace(store, group, make)
    failures = [made.failure for made in repairs if made.failure is not None]
    if len(failures) == len(repairs) and all(WRONG_SOURCE in why for why in failures):
        raise SourceError(f"{failures[0]}; the store is as it was")
    return repairs


def _work(
    plan: Plan, source: Source, damage: Sequence[FileDamage]
) -> Iterator[tuple[list[FileDamage], Make]]:
    """Damaged files that are made together, and how."""
    lost = {found.file.key: found for found in damage}
    planned = {file.key: file for file in plan.files()}
    for key, found in lost.items():
        if not key.startswith(_ASSETS) and planned.get(key) != found.file:
            raise SourceError(f"it gives no such file as {key}: {WRONG_SOURCE}")
    for output in plan.outputs:
        keys = [file.key for array in output.arrays() for file in array.files()]
        if group := [lost[key] for key in keys if key in lost]:
            yield group, _maker(output, group, source)
    for key, found in lost.items():
        if key.startswith(_ASSETS):
            yield [found], _asset_maker(found.file, source)


def _maker(output: Output, group: Sequence[FileDamage], source: Source) -> Make:
    """Runs the units that write anything lost; all, where a file needs every unit's result."""

    def make(sink: Sink) -> None:
        units = output.units()
        lost = {found.file.key: found for found in group}
        late = bool(lost.keys() - {target.file.key for unit in units for target in unit.targets})
        results = [
            unit.run(source, sink)
            for unit in units
            if late
            or any(
                target.file.key in lost and lost[target.file.key].overlaps(target.begin, target.end)
                for target in unit.targets
            )
        ]
        if late:
            output.complete(results, sink)

    return make


def _asset_maker(file: FileSpec, source: Source) -> Make:
    name = file.key.removeprefix(_ASSETS)

    def make(sink: Sink) -> None:
        data = source.aux_files().get(name, b"")
        sink.write_at(file, 0, [data[: file.nbytes]])

    return make


class _Scratch(Sink):
    """Writes into the partial files of what is being repaired; drops everything else."""

    def __init__(self, root: Path, wanted: Iterable[str]) -> None:
        super().__init__(root)
        self._wanted = frozenset(wanted)

    def write(self, file: FileSpec, parts: Iterable[Tensor | bytes]) -> None:
        """As the base class, but the file is not renamed into place."""
        offset = 0
        for part in parts if file.key in self._wanted else ():
            self.write_at(file, offset, [part])
            offset += len(bytes_of(file, part))

    def write_at(self, file: FileSpec, offset: int, parts: Iterable[Tensor | bytes]) -> None:
        """As the base class, for files that are wanted."""
        if file.key in self._wanted:
            super().write_at(file, offset, parts)


def _replace(store: PackedStore, group: Sequence[FileDamage], make: Make) -> list[FileRepair]:
    """Rebuild some files, and rename those that are proved into place."""
    failures = {found.file: _begin(store.root, found) for found in group}
    begun = [file for file, why in failures.items() if why is None]
    try:
        with _Scratch(store.root, [file.key for file in begun]) as sink:
            if begun:
                make(sink)
            sink.sync()
        for file in begun:
            failures[file] = _prove(store, file)
            if failures[file] is None:
                target = store.root / file.key
                partial_path(store.root, file).replace(target)
                sync_directory(target.parent)
    finally:
        for file in begun:
            partial_path(store.root, file).unlink(missing_ok=True)
    return [
        FileRepair(found.file.key, found.problem, 0 if why else found.lost_bytes, why)
        for found, why in zip(group, failures.values(), strict=True)
    ]


def _begin(root: Path, found: FileDamage) -> str | None:
    """Make the partial file with what is good of the old one; -> what is in the way, if so."""
    target = root / found.file.key
    if target.is_dir() and not target.is_symlink():
        return "a directory lies in its place: move it away"
    try:
        Directories(root).ensure(found.file.key.rpartition("/")[0])
        with storage_errors(root, f"writing {found.file.key}"):
            descriptor = os.open(partial_path(root, found.file), _CREATE, 0o644)
            try:
                if found.keeps_some:
                    _copy(target, descriptor, found.file.payload_nbytes)
            finally:
                os.close(descriptor)
    except StoreError as error:
        return str(error)
    return None


def _copy(old: Path, descriptor: int, nbytes: int) -> None:
    """As many of the first `nbytes` bytes as there are."""
    with open_regular(old) as opened:
        while nbytes and (piece := opened.read(min(nbytes, PIECE_BYTES))):
            write_all(descriptor, piece)
            nbytes -= len(piece)


def _prove(store: PackedStore, file: FileSpec) -> str | None:
    """Append the index and read the rebuilt file back; -> how it is not what the manifest pins."""
    partial = partial_path(store.root, file)
    if file.sharded:
        with partial.open("r+b") as rebuilt:
            rebuilt.seek(file.payload_nbytes)
            rebuilt.write(digest.dense_index(file.chunks, file.chunk_nbytes))
    with open_regular(partial) as opened:
        _, found = measure(opened, file)
        os.fsync(opened.fileno())
    record = store.records[file.key]
    if found == record:
        return None
    tool = store.manifest["tool"]
    other = "" if tool == TOOL else f", or {TOOL} writes other bytes than {tool} did"
    return (
        f"{file.key}: what was made again has BLAKE3 {found.blake3}, the manifest says "
        f"{record.blake3}: {WRONG_SOURCE}{other}"
    )


def _rewrite_documents(store: PackedStore) -> list[FileRepair]:
    """The nodes' own documents, made from the root's."""
    faults = list(integrity.node_faults(store))
    if not faults:
        return []
    hierarchy = store.hierarchy
    documents = metadata_documents(hierarchy.manifest, hierarchy.groups, hierarchy.arrays)
    directories, repairs = Directories(store.root), []
    for fault in faults:
        failure = None
        try:
            directories.ensure(fault.key.rpartition("/")[0])
            with storage_errors(store.root, f"writing {fault.key}"):
                write_atomic(store.root / fault.key, documents[fault.key])
        except StoreError as error:
            failure = str(error)
        size = 0 if failure else len(documents[fault.key])
        repairs.append(FileRepair(fault.key, fault.problem, size, failure))
    return repairs
