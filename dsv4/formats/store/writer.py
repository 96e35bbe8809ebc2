"""Writing a packed store: durable files, a journal to resume from, metadata, and a final marker.

    with StoreWriter(out, identity) as writer:
        for file in spec.files():
            if not writer.has(file):
                writer.write(file, parts)
        root = writer.finish(groups, arrays, manifest)

A store is valid from the instant its marker exists, and the marker is renamed into place last.
Whatever happens before (disk full, kill, power loss), opening a StoreWriter with the same identity
goes on after the last file that the journal knows, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from dsv4.formats.errors import (
    ChangedSourceError,
    ConflictError,
    OutOfSpaceError,
    StoreError,
)
from dsv4.formats.plain_text import size
from dsv4.formats.store.damage import sizes
from dsv4.formats.store.digest import canonical_json
from dsv4.formats.store.durable import (
    Directories,
    DirectoryLock,
    create_directory,
    storage_errors,
    sync_directory,
    sync_file,
    write_atomic,
    write_file,
    write_unsynced,
)
from dsv4.formats.store.extents import (
    Batch,
    Extent,
    covers,
    partial_path,
    publish,
    restore_partial,
    seal,
)
from dsv4.formats.store.file_digest import blake3_hex
from dsv4.formats.store.integrity import is_foreign, walk
from dsv4.formats.store.journal import Journal
from dsv4.formats.store.manifest import (
    FileRecord,
    asset_file,
    check_manifest,
    check_record,
    content_root,
)
from dsv4.formats.store.parts import PART_MARKER
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import (
    ASSET_DIRECTORY,
    FORMAT_VERSION,
    JOURNAL,
    LOCK,
    MARKER,
    NODE_DOCUMENT,
    PARTIAL_SUFFIX,
    ArraySpec,
    FileSpec,
)
from dsv4.formats.store.zarr_json import descriptions, parse_root, with_parents
from dsv4.formats.store.zarr_metadata import metadata_documents

RATE_BYTES = 64 << 20
RATE_PIECE = 1 << 20


class StoreWriter:
    """The one writer of a packed store; all but `finish` and `close` may run in threads.

    out: the directory; created, and locked until the writer is closed.
    identity: what is converted (source, recipe, tool), as JSON; an unfinished store with another
    identity is refused.
    Raises ConflictError when the directory is locked, complete, another conversion's, or holds
    something else.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.out = Path(out)
        _refuse_within_a_store(self.out)
        create_directory(self.out)
        with storage_errors(self.out, "examining the directory"):
            _refuse_foreign(self.out)
        self._lock = DirectoryLock(self.out)
        self._journal: Journal | None = None
        try:
            with storage_errors(self.out, "examining the directory"):
                _refuse_foreign(self.out)
            self._journal = Journal(self.out / JOURNAL, identity)
            with storage_errors(self.out, "removing what an interrupted run left behind"):
                _remove_leftovers(self.out, self._journal)
        except BaseException:
            self.close()
            raise
        self._directories = Directories(self.out)
        self._committing = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up journal and lock; an unfinished store can be resumed. Safe to call twice."""
        if self._journal is not None:
            self._journal.close()
        self._lock.release()

    def require_space(self, nbytes: int) -> None:
        """Raise OutOfSpaceError unless the file system has `nbytes` free for this user."""
        with storage_errors(self.out, "asking for free space"):
            status = os.statvfs(self.out)
        free = status.f_bavail * status.f_frsize
        if free < nbytes:
            raise OutOfSpaceError(
                f"{self.out}: {size(nbytes)} are still to be written, {size(free)} are free; free "
                "some space or choose another directory"
            )

    def measure_rate(self) -> float:
        """Bytes a second at which a plain file can be written and synced here."""
        sample = self.out / f"rate{PARTIAL_SUFFIX}"
        piece = os.urandom(RATE_PIECE)
        begin = time.perf_counter()
        with storage_errors(self.out, "measuring the disk"):
            write_unsynced(sample, piece * (RATE_BYTES // RATE_PIECE))
            sync_file(sample)
            seconds = time.perf_counter() - begin
            sample.unlink()
        return RATE_BYTES / seconds

    def has(self, file: FileSpec) -> bool:
        """Whether `file` is durable: in the journal with these sizes, and so on disk."""
        record = self._open_journal.records.get(file.key)
        if record is None:
            return False
        try:
            check_record(file, record)
        except StoreError:
            return False
        return not any(sizes(self.out, [file]))

    def covers(self, file: FileSpec, begin: int, end: int) -> bool:
        """Whether bytes `[begin, end)` of the payload are durable, in the file or on its way."""
        return covers(self._open_journal.extents.get(file.key, ()), begin, end) or self.has(file)

    def write(self, file: FileSpec, parts: Iterable[Tensor]) -> None:
        """Write `file` from `parts` and record it in the journal (see `durable.write_file`)."""
        self._write(file, parts)

    def adopt(self, records: Mapping[str, FileRecord]) -> None:
        """Count files that lie in their places already; that they survive is not promised."""
        self._journal_append(records, {}, {})

    def commit(self, batch: Batch, notes: Mapping[str, Any] | None = None) -> list[FileSpec]:
        """Record what a sink made durable, with notes; returns the files that are covered now.

        Whoever gets a file has to `complete` it. Raises StoreError when a note is no finite JSON.
        """
        extents = {file.key: found for file, found in batch.extents.items()}
        with self._committing:
            before = {file: self._covered(file) for file in batch.extents}
            self._journal_append(batch.files, extents, notes or {})
            return [file for file, was in before.items() if not was and self._covered(file)]

    def complete(self, file: FileSpec, expected: FileRecord | None = None) -> None:
        """Make a covered file whole.

        expected: what its record has to be, of a file that comes from elsewhere. The file is
        dropped, and StoreError raised, when it is not what was written, ChangedSourceError, when
        it is not what was expected.
        """
        journal = self._open_journal
        try:
            record = seal(self.out, file, journal.extents.get(file.key, ()))
            if expected not in (None, record):
                raise ChangedSourceError(
                    file.key,
                    f"{file.key} arrived with another BLAKE3 than the manifest pins, and is "
                    "dropped; run the command again, and tell whoever published it if that does "
                    "not help",
                )
        except (StoreError, ChangedSourceError):
            self.forget([file])
            raise
        publish(self.out, file)
        journal.append({file.key: record}, {}, {})

    def covered_files(self, files: Iterable[FileSpec]) -> list[FileSpec]:
        """Those of `files` which an interrupted run covered but did not complete."""
        begun = self._open_journal.extents
        return [file for file in files if file.key in begun and self._covered(file)]

    def gaps(self, file: FileSpec) -> list[tuple[int, int]]:
        """Ranges `[begin, end)` of the payload that are not durable, in order."""
        if self.has(file):
            return []
        found, position = [], 0
        extents = self._open_journal.extents.get(file.key, ())
        for extent in sorted(extents, key=lambda extent: extent.offset):
            if extent.offset > position:
                found.append((position, extent.offset))
            position = max(position, extent.end)
        return found + ([(position, file.payload_nbytes)] if position < file.payload_nbytes else [])

    def knows(self, file: FileSpec) -> bool:
        """Whether anything of the file is durable."""
        return file.key in self._open_journal.records or file.key in self._open_journal.extents

    def allocated(self, file: FileSpec) -> int:
        """Bytes of the file that the disk has set aside already."""
        if self.has(file):
            return file.nbytes
        return file.payload_nbytes if file.key in self._open_journal.extents else 0

    def forget(self, files: Iterable[FileSpec], notes: Iterable[str] = ()) -> None:
        """Drop files, whole or not, and notes: what they hold has proved wrong."""
        files = list(files)
        self._open_journal.forget((file.key for file in files), notes)
        with storage_errors(self.out, "removing files"):
            for file in files:
                (self.out / file.key).unlink(missing_ok=True)
                partial_path(self.out, file).unlink(missing_ok=True)

    def _covered(self, file: FileSpec) -> bool:
        extents = self._open_journal.extents.get(file.key, ())
        return bool(extents) and covers(extents, 0, file.payload_nbytes)

    def write_asset(self, name: str, data: bytes) -> None:
        """Write the asset `name` (a base name); does nothing when it is durable already.

        Raises SourceError for a name that is no harmless base name.
        """
        file = asset_file(name, len(data))
        record = self._open_journal.records.get(file.key)
        wanted = blake3_hex(data)
        if record is None or record.blake3 != wanted or not self.has(file):
            self._write(file, [data])

    def note(self, key: str, value: Any) -> None:
        """Keep a JSON value in the journal, to be found by `notes` after an interruption.

        Raises StoreError when `value` is no finite JSON.
        """
        self._journal_append({}, {}, {key: value})

    def notes(self) -> Mapping[str, Any]:
        """What `note` kept, in this run and in the interrupted ones before it."""
        return self._open_journal.notes

    def finish(
        self,
        groups: Mapping[str, Mapping[str, Any]],
        arrays: Sequence[ArraySpec],
        manifest: Mapping[str, Any],
    ) -> str:
        """Make the store valid and close the writer; returns the Merkle root in hex.

        groups: path -> Zarr attributes (missing parents are added). manifest: its sections without
        `format_version`, `files` and `root`. Raises StoreError when a file is missing, belongs to
        no array, or the metadata would not be readable; nothing is lost then.
        """
        journal = self._open_journal
        specs = {spec.path: spec for spec in arrays}
        if len(specs) != len(arrays):
            raise StoreError(f"{self.out}: two arrays have the same path")
        records = self._settled_records(specs.values(), journal.records)
        root, documents = _metadata(
            self.out, dict(groups), dict(sorted(specs.items())), manifest, records
        )
        marker = {
            "format_version": FORMAT_VERSION,
            "root": root,
            "metadata_sha256": hashlib.sha256(documents[NODE_DOCUMENT]).hexdigest(),
        }
        self._publish(documents, json.dumps(marker, indent=2).encode() + b"\n", records)
        return root

    def finish_copy(
        self, store: PackedStore, documents: Mapping[str, bytes], marker: bytes
    ) -> None:
        """Make the directory a copy of `store`, all of whose files are written; close the writer.

        documents: every `zarr.json` by key. marker: the store's, whole or with parts absent; in
        that case the journal stays, for the pull that fetches them. Raises StoreError when a file
        is missing or is not what the manifest of `store` pins.
        """
        journaled = self._open_journal.records
        records = self._settled_records(store.hierarchy.arrays.values(), journaled)
        for key in records.keys() | {file.key for file in store.files_under(None)}:
            if records.get(key) != store.records.get(key):
                raise StoreError(f"{self.out}: {key} is not what the manifest pins")
        self._publish(documents, marker, records, partial=store.absent is not None)

    def _publish(
        self,
        documents: Mapping[str, bytes],
        marker: bytes,
        files: Mapping[str, FileRecord],
        *,
        partial: bool = False,
    ) -> None:
        """Write the documents, then the marker; of a whole store the journal is then of no use."""
        with storage_errors(self.out, "finishing the store"):
            self._refuse_strangers(files.keys() | documents.keys())
            self._write_documents(documents)
            write_atomic(self.out / (PART_MARKER if partial else MARKER), marker)
            self._open_journal.close()
            if not partial:
                (self.out / JOURNAL).unlink()
            self._lock.release(remove=True)
            sync_directory(self.out)

    @property
    def _open_journal(self) -> Journal:
        if self._journal is None or self._journal.closed:
            raise StoreError(f"{self.out}: the writer is closed")
        return self._journal

    def _write(self, file: FileSpec, parts: Iterable[Tensor | bytes]) -> None:
        journal = self._open_journal
        with storage_errors(self.out, f"creating the directory of {file.key}"):
            self._directories.ensure(file.key.rpartition("/")[0])
            self._directories.sync()
        journal.append({file.key: write_file(self.out, file, parts)}, {}, {})

    def _journal_append(
        self,
        records: Mapping[str, FileRecord],
        extents: Mapping[str, Sequence[Extent]],
        notes: Mapping[str, Any],
    ) -> None:
        try:
            self._open_journal.append(records, extents, notes)
        except (ValueError, TypeError) as error:
            raise StoreError(f"{self.out}: a note cannot be kept: {error}") from None

    def _settled_records(
        self, arrays: Iterable[ArraySpec], journaled: Mapping[str, FileRecord]
    ) -> dict[str, FileRecord]:
        """The journal's records of exactly the files of `arrays` and the assets, sorted."""
        files = [file for spec in arrays for file in spec.files()]
        if missing := [file.key for file in files if not self.has(file)]:
            raise StoreError(
                f"{self.out}: {len(missing)} files are not written, first {missing[0]}"
            )
        expected = {file.key for file in files}
        strays = [
            key
            for key in journaled
            if key not in expected and not key.startswith(f"{ASSET_DIRECTORY}/")
        ]
        if strays:
            raise StoreError(f"{self.out}: {len(strays)} files belong to no array: {strays[0]}")
        return dict(sorted(journaled.items()))

    def _refuse_strangers(self, expected: Iterable[str]) -> None:
        known = {*expected, JOURNAL, LOCK}
        keys = (key for key in walk(self.out) if key not in known and not is_foreign(key))
        if stranger := next(keys, None):
            raise StoreError(
                f"{self.out}: {stranger} belongs to nothing in the store; move it away and run "
                "the same command again"
            )

    def _write_documents(self, documents: Mapping[str, bytes]) -> None:
        """All `zarr.json`; in place, for nothing is valid before the marker."""
        touched = {self.out}
        for key, content in documents.items():
            self._directories.ensure(key.rpartition("/")[0])
            write_unsynced(self.out / key, content)
            touched.add((self.out / key).parent)
        for key in documents:  # after all are written: the disk sees them in few transactions
            sync_file(self.out / key)
        for directory in sorted(touched):
            sync_directory(directory)


def _metadata(
    out: Path,
    groups: Mapping[str, Mapping[str, Any]],
    arrays: Mapping[str, ArraySpec],
    manifest: Mapping[str, Any],
    records: Mapping[str, FileRecord],
) -> tuple[str, dict[str, bytes]]:
    """-> (Merkle root, every metadata document), proved readable by reading it back."""
    try:
        complete = with_parents(groups, arrays)
        sections = {**manifest, "format_version": FORMAT_VERSION}
        sections = json.loads(canonical_json(sections))
        check_manifest(sections)
        nodes = json.loads(canonical_json(descriptions(complete, arrays)))
        root = content_root(sections, nodes, records)
        sections["files"] = {key: record.to_json() for key, record in records.items()}
        sections["root"] = root
        documents = metadata_documents(sections, complete, arrays)
        written = PackedStore(out, parse_root(documents[NODE_DOCUMENT]), verify=False)
    except (ValueError, TypeError) as error:
        raise StoreError(f"{out}: the metadata cannot be stored: {error}") from error
    read_back = written.hierarchy
    if descriptions(read_back.groups, read_back.arrays) != nodes or read_back.manifest != sections:
        raise StoreError(f"{out}: zarr-python did not keep the metadata as given")
    return root, documents


def _refuse_within_a_store(out: Path) -> None:
    """Raise ConflictError for a directory below a store: its files would be strangers in it."""
    for above in out.resolve().parents:
        unfinished = (above / JOURNAL).exists() and (above / LOCK).exists()
        if unfinished or (above / MARKER).exists() or (above / PART_MARKER).exists():
            raise ConflictError(
                f"{out} is inside the packed store {above}; choose a directory outside it"
            )


def _refuse_foreign(out: Path) -> None:
    names = {path.name for path in out.iterdir()}
    if MARKER in names:
        raise ConflictError(
            f"{out}: it already holds a complete packed checkpoint; choose another directory or "
            "remove it"
        )
    if not _has_begun(out / JOURNAL) and (others := sorted(names - {LOCK, JOURNAL})):
        raise ConflictError(
            f"{out}: it is not empty ({others[0]}) and holds no conversion or pull to go on with; "
            "choose an empty directory"
        )


def _has_begun(journal: Path) -> bool:
    """Whether the journal has its first line; nothing else of a store is written before it."""
    try:
        with journal.open("rb") as stream:
            return stream.readline().endswith(b"\n")
    except FileNotFoundError:
        return False


def _remove_leftovers(out: Path, journal: Journal) -> None:
    """Remove what an interrupted run left behind, but for partial files with durable extents.

    A store with parts left out is none from now on, until its writer finishes again.
    """
    (out / PART_MARKER).unlink(missing_ok=True)
    if gone := [k for k, found in journal.extents.items() if not restore_partial(out, k, found)]:
        journal.forget(gone)
    begun = {key + PARTIAL_SUFFIX for key in journal.extents}
    for key in list(walk(out)):
        temporary = key.endswith(PARTIAL_SUFFIX) and key not in begun
        if temporary or key.rpartition("/")[2] == NODE_DOCUMENT:
            (out / key).unlink()
