"""The journal of a conversion: what it converts, and what of it is on disk for good.

One JSON document a line: first the identity, then one line per durable file, per durable extents
of a file that is not whole yet, or per note (what a caller wants to find again when it resumes).
Lines are appended and synced in groups. A torn last line (power loss) is cut off; anything else
malformed is refused.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv4.formats.errors import ConflictError, OtherConversionError, StoreError
from dsv4.formats.store.digest import canonical_json
from dsv4.formats.store.durable import storage_errors, sync_directory, write_all
from dsv4.formats.store.extents import Extent
from dsv4.formats.store.manifest import FileRecord
from dsv4.formats.store.zarr_json import parse_json

_VERSION = 4
_IDENTITY_KEY = "dsv4_journal"


class Journal:
    """An open journal. records: file key -> what is on disk under it. notes: key -> JSON value.

    extents: file key -> which pieces of a file that is not whole yet are on disk.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Start the journal at `path`, or go on with it.

        Raises ConflictError when it belongs to another conversion, StoreError when it is damaged.
        """
        self._path = path
        self._lock = threading.Lock()
        self.records: dict[str, FileRecord] = {}
        self.extents: dict[str, list[Extent]] = {}
        self.notes: dict[str, Any] = {}
        with storage_errors(path.parent, "opening the journal"):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._descriptor: int | None = os.open(path, flags, 0o644)
        try:
            self._resume(identity)
        except BaseException:
            self.close()
            raise

    def append(
        self,
        records: Mapping[str, FileRecord],
        extents: Mapping[str, Sequence[Extent]],
        notes: Mapping[str, Any],
    ) -> None:
        """Record what is durable: whole files and extents of files by key, and notes by key.

        Returns when the lines are durable themselves. Of two notes under one key the last counts.
        Raises ValueError or TypeError when a note is no finite JSON.
        """
        lines: list[dict[str, Any]] = [
            *({"path": key, **record.to_json()} for key, record in records.items()),
            *({"extents": key, "of": _to_json(found)} for key, found in extents.items()),
            *({"note": key, "value": value} for key, value in notes.items()),
        ]
        self._append(lines)

    def forget(self, keys: Iterable[str], notes: Iterable[str] = ()) -> None:
        """The files of these keys, or the extents they have, and these notes no longer count."""
        self._append([{"forget": sorted(keys)}, *({"note": key, "value": None} for key in notes)])

    def _append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        raw = [canonical_json(line) for line in lines]
        if not raw:
            return
        with self._lock:
            self._write(b"\n".join(raw))
            for line in raw:
                self._replay(line)

    @property
    def closed(self) -> bool:
        """Whether nothing can be appended any more."""
        return self._descriptor is None

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _resume(self, identity: Mapping[str, Any]) -> None:
        raw = self._path.read_bytes()
        durable = raw[: raw.rfind(b"\n") + 1]
        lines = durable.splitlines()
        if lines:
            _check_identity(self._path, lines[0], identity)
            for line in lines[1:]:
                self._replay(line)
        with storage_errors(self._path.parent, "repairing the journal"):
            assert self._descriptor is not None
            os.ftruncate(self._descriptor, len(durable))
            os.lseek(self._descriptor, 0, os.SEEK_END)
        if not lines:
            self._write(canonical_json({_IDENTITY_KEY: _VERSION, "identity": identity}))
            sync_directory(self._path.parent)

    def _replay(self, line: bytes) -> None:
        entry = parse_json(line, f"{self._path}: a line of the journal")
        keys = entry.keys() if isinstance(entry, dict) else set()
        if keys == {"note", "value"}:
            self.notes[str(entry["note"])] = entry["value"]
        elif keys == {"extents", "of"}:
            self.extents.setdefault(str(entry["extents"]), []).extend(self._parse(entry["of"]))
        elif keys == {"forget"} and isinstance(entry["forget"], list):
            for key in entry["forget"]:
                self.extents.pop(key, None)
                self.records.pop(key, None)
        elif isinstance(entry, dict) and isinstance(entry.get("path"), str):
            key = entry.pop("path")
            self.records[key] = FileRecord.from_json(key, entry)
            self.extents.pop(key, None)
        else:
            raise self._damaged()

    def _parse(self, found: Any) -> list[Extent]:
        """The inverse of `_to_json`."""
        if not isinstance(found, list) or not all(map(_is_row, found)):
            raise self._damaged()
        return [Extent(*row) for row in found]

    def _damaged(self) -> StoreError:
        return StoreError(f"{self._path}: the journal is damaged; remove the directory")

    def _write(self, line: bytes) -> None:
        with storage_errors(self._path.parent, "writing the journal"):
            if self._descriptor is None:
                raise StoreError(f"{self._path}: the journal is closed")
            begin = os.lseek(self._descriptor, 0, os.SEEK_CUR)
            try:
                write_all(self._descriptor, line + b"\n")
                os.fsync(self._descriptor)
            except BaseException:
                os.ftruncate(self._descriptor, begin)
                os.lseek(self._descriptor, begin, os.SEEK_SET)
                raise


def _check_identity(path: Path, line: bytes, identity: Mapping[str, Any]) -> None:
    try:
        head = json.loads(line)
    except ValueError:
        head = None
    if (
        not isinstance(head, dict)
        or type(head.get(_IDENTITY_KEY)) is not int
        or not isinstance(head.get("identity"), dict)
    ):
        raise ConflictError(
            f"{path.parent}: {path.name} is not a journal of dsv4; choose an empty directory"
        )
    if head[_IDENTITY_KEY] != _VERSION:
        raise ConflictError(
            f"{path.parent}: it holds an unfinished conversion of another version of dsv4; go on "
            "with that version, remove the directory, or choose another one"
        )
    begun, now = head["identity"], json.loads(canonical_json(identity))
    if begun != now:
        keys = sorted(k for k in begun.keys() | now.keys() if begun.get(k) != now.get(k))
        raise OtherConversionError(
            f"{path.parent}: it holds an unfinished conversion that differs in {', '.join(keys)}; "
            "repeat that conversion, remove the directory, or choose another one",
            begun,
            now,
        )


def _to_json(extents: Sequence[Extent]) -> list[list[int]]:
    return [[extent.offset, extent.nbytes, extent.xxh3] for extent in extents]


def _is_row(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 3 and all(type(n) is int and n >= 0 for n in row)
