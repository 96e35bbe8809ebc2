"""One pass over a source file: every byte is hashed once, and units get their tensors on the way.

    the file   [header | scales … | w1 of expert 0 | w2 | w3 | w1 of expert 1 | …]
    hashed     every byte, in order: the SHA-256 of the whole file
    held       tensors of units whose other inputs are still to come, up to a limit
    ready      a unit whose last tensor has passed; what was not held it reads again, as ranges

A tensor that is read again must be the one that was hashed, so all readings are fingerprinted. A
pass that an interruption cut short is repeated, and must come by what its finished units have read:
with each of them the digest of the file up to there was kept.
A large tensor that is a unit by itself (the embedding) is never held: its unit takes the rows
while they pass.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import xxhash
from torch import Tensor

from dsv4.convert.outputs.base import Unit
from dsv4.convert.sources.base import ByteStream, Reader, Source, bytes_of, check_rows, empty
from dsv4.formats.errors import ChangedSourceError
from dsv4.formats.model.safetensors_header import TensorEntry
from dsv4.formats.model.source_tensor import Encoding

PIECE_BYTES = 4 << 20  # read and hashed at a time, while it is in cache
INLINE_BYTES = 128 << 20  # a lone tensor above this is transformed while it passes

Ready = Callable[[Unit, "RangeReads"], None]
"""Takes a unit whose tensors have passed, and what to read them from; may wait for room."""

Evidence = dict[str, Any]
"""What a unit has read (JSON types only): its file up to a position, tensors of other files."""


class Fingerprints:
    """What was read, to be compared with what is read again; threads may share it.

    passed: XXH3-64 of tensors as they were hashed. seen: what units of earlier runs have read of a
    file, `(position, SHA-256 up to there)`.
    """

    def __init__(self) -> None:
        self.passed: dict[TensorEntry, int] = {}
        self.seen: dict[str, list[tuple[int, str]]] = {}
        self._again: list[tuple[TensorEntry, int]] = []

    def read_again(self, entry: TensorEntry, fingerprint: int) -> None:
        """Another reading of the tensor gave this. Raises ChangedSourceError when it differs."""
        self._again.append((entry, fingerprint))
        self._compare(entry, fingerprint)

    def remember(self, unit: Unit, evidence: Evidence) -> None:
        """A unit that an earlier run finished has read this."""
        seen = self.seen.setdefault(evidence["file"], [])
        seen.append((evidence["position"], evidence["sha256"]))
        places = {(entry.file, entry.begin, entry.end): entry for entry in entries_of(unit)}
        for *place, fingerprint in evidence["others"]:
            self._again.append((places[tuple(place)], fingerprint))

    def merge(self, other: Fingerprints) -> None:
        """Readings that were made elsewhere."""
        self.passed |= other.passed
        self._again += other._again

    def check(self) -> None:
        """Raise ChangedSourceError when two readings of a tensor differ."""
        for entry, fingerprint in self._again:
            self._compare(entry, fingerprint)

    def _compare(self, entry: TensorEntry, fingerprint: int) -> None:
        if self.passed.get(entry, fingerprint) != fingerprint:
            raise _changed(entry.file, f"{entry.name} changed between two readings")


class Schedule:
    """What becomes of each tensor of a file that somebody needs, decided from headers alone.

    entries: those tensors, in file order. watched: the ones that units of other files read as
    ranges. hold_bytes: the most that may wait for other inputs of its unit.
    """

    def __init__(
        self, file: str, units: Iterable[Unit], watched: Iterable[TensorEntry], hold_bytes: int
    ) -> None:
        self._units: dict[TensorEntry, Unit] = {}  # a fused tensor is many entries of one name
        self._waits_for: dict[str, int] = {}  # by key of a unit
        self._held: dict[str, int] = {}  # bytes, by key of a unit
        self._left = hold_bytes
        entries = set(watched)
        for unit in units:
            mine = [entry for entry in entries_of(unit) if entry.file == file]
            self._waits_for[unit.key] = len(mine)
            self._units |= dict.fromkeys(mine, unit)
            entries.update(mine)
        self.entries = sorted(entries, key=lambda entry: entry.begin)

    def unit_of(self, entry: TensorEntry) -> Unit | None:
        """The unit that is waiting for a tensor; None when it belongs to another file's unit."""
        return self._units.get(entry)

    def hold(self, entry: TensorEntry) -> bool:
        """Whether the tensor that comes next is kept for its unit; counts it if so."""
        if (unit := self._units.get(entry)) is None:
            return False
        last = self._waits_for[unit.key] == 1
        if entry.nbytes > (INLINE_BYTES if last else self._left):
            return False
        self._held[unit.key] = self._held.get(unit.key, 0) + entry.nbytes
        self._left -= entry.nbytes
        return True

    def passed(self, entry: TensorEntry) -> Unit | None:
        """The unit that has all its tensors now that this one has passed, if any."""
        if (unit := self._units.get(entry)) is None:
            return None
        self._waits_for[unit.key] -= 1
        if self._waits_for[unit.key]:
            return None
        self._left += self._held.pop(unit.key, 0)
        return unit

    def read_again_bytes(self) -> int:
        """Bytes that a pass over the file will have to read a second time."""
        again = 0
        for entry in self.entries:
            unit = self.unit_of(entry)
            if unit is not None and is_inline(unit):
                again += entry.nbytes if unit.output.rounded else 0
            elif not self.hold(entry):
                again += entry.nbytes
            self.passed(entry)
        return again


class FilePass:
    """Reads `file` once, by a schedule that was made for it."""

    def __init__(
        self, source: Source, file: str, schedule: Schedule, fingerprints: Fingerprints
    ) -> None:
        self.source = source
        self.fingerprints = fingerprints
        self.position = 0
        self._file = file
        self._schedule = schedule
        self._held: dict[str, dict[TensorEntry, Tensor]] = {}  # by key of a unit
        self._digest = hashlib.sha256()
        self._seen = deque(sorted(fingerprints.seen.get(file, ())))
        self._stopped: Callable[[], bool] = lambda: False

    def run(self, ready: Ready, stopped: Callable[[], bool]) -> str | None:
        """Read the file; -> its SHA-256 in hex, or None when `stopped` said so.

        Raises SourceError when it cannot be read, ChangedSourceError when it is not the file the
        repository published, or not the one that an earlier run has read.
        """
        self._stopped = stopped
        try:
            with self.source.stream(self._file) as stream:
                for entry in self._schedule.entries:
                    self.pass_by(stream, entry.begin)
                    self._take(stream, entry, ready)
                self.pass_by(stream, self.source.sizes[self._file])
        except _StoppedError:
            return None
        measured = self._digest.hexdigest()
        published = self.source.published_sha256(self._file)
        if published is not None and published != measured:
            raise ChangedSourceError(
                self._file,
                f"{self._file}: what was read has SHA-256 {measured}, the repository says "
                f"{published}; it was damaged on its way: run the same command again",
            )
        return measured

    def _take(self, stream: ByteStream, entry: TensorEntry, ready: Ready) -> None:
        """Let one tensor pass, and hand over the unit that was waiting for it."""
        unit = self._schedule.unit_of(entry)
        if unit is not None and is_inline(unit):
            passing = _Passing(self, stream, entry)
            ready(unit, passing)
            passing.finish()
            return
        if unit is not None and self._schedule.hold(entry):
            tensor = empty(entry)
            self._held.setdefault(unit.key, {})[entry] = tensor
            self.read(stream, bytes_of(tensor))
        else:
            checksum = xxhash.xxh3_64()
            self.pass_by(stream, entry.end, checksum)
            self.fingerprints.passed[entry] = checksum.intdigest()
        if (complete := self._schedule.passed(entry)) is not None:
            held = self._held.pop(complete.key, {})
            ready(complete, RangeReads(self.source, held, self.fingerprints, self.seen()))

    def seen(self) -> Evidence:
        """What of the file has passed."""
        return {
            "file": self._file,
            "position": self.position,
            "sha256": self._digest.hexdigest(),
        }

    def read(self, stream: ByteStream, view: memoryview, checksum: Any = None) -> None:
        """Fill `view` with what comes next, and hash it."""
        for begin in range(0, len(view), PIECE_BYTES):
            if self._stopped():
                raise _StoppedError
            piece = view[begin : begin + PIECE_BYTES]
            stream.readinto(piece)
            if checksum is not None:
                checksum.update(piece)
            self._hash(piece)

    def _hash(self, piece: memoryview) -> None:
        """Hash a piece; up to where an earlier run has read, it must be what that run has read."""
        end = self.position + len(piece)
        while self._seen and self._seen[0][0] <= end:
            position, sha256 = self._seen.popleft()
            self._digest.update(piece[: position - self.position])
            piece = piece[position - self.position :]
            self.position = position
            if self._digest.hexdigest() != sha256:
                raise _changed(self._file, "it is not what an earlier run has read")
        self._digest.update(piece)
        self.position = end

    def pass_by(self, stream: ByteStream, end: int, checksum: Any = None) -> None:
        """Hash up to byte `end` of the file without keeping anything."""
        if self.position < end:
            scratch = memoryview(bytearray(min(PIECE_BYTES, end - self.position)))
            while self.position < end:
                self.read(stream, scratch[: end - self.position], checksum)


class RangeReads(Reader):
    """Tensors that were held, and ranges of the source for all others, fingerprinted."""

    def __init__(
        self,
        source: Source,
        held: dict[TensorEntry, Tensor],
        fingerprints: Fingerprints,
        seen: Evidence,
    ) -> None:
        self._source = source
        self._held = held
        self._fingerprints = fingerprints
        self._seen = seen
        self._others: list[list[Any]] = []
        self._partly: dict[TensorEntry, tuple[int, Any]] = {}

    def evidence(self) -> Evidence:
        """What was read so far, for `Fingerprints.remember`."""
        return {**self._seen, "others": self._others}

    def read(self, entry: TensorEntry) -> Tensor:
        """The tensor; one that was held is given away."""
        held = self._held.pop(entry, None)
        return super().read(entry) if held is None else held

    def read_rows(self, entry: TensorEntry, start: int, stop: int) -> Tensor:
        """Rows of the tensor; a view of one that is held."""
        held = self._held.get(entry)
        if held is None:
            return super().read_rows(entry, start, stop)
        check_rows(entry, start, stop)
        return held[start:stop]

    def fill(self, entry: TensorEntry, position: int, view: memoryview) -> None:
        """A range of the source. Ranges that make up a whole tensor in order are fingerprinted."""
        self._source.fill(entry, position, view)
        at, checksum = self._partly.pop(entry, (entry.begin, xxhash.xxh3_64()))
        if position == at:
            checksum.update(view)
            at += len(view)
            if at == entry.end:
                fingerprint = checksum.intdigest()
                if entry.file != self._seen["file"]:
                    self._others.append([entry.file, entry.begin, entry.end, fingerprint])
                self._fingerprints.read_again(entry, fingerprint)
            else:
                self._partly[entry] = at, checksum


class _Passing(RangeReads):
    """One tensor while it passes: rows that are asked for in order come from the stream itself."""

    def __init__(self, owner: FilePass, stream: ByteStream, entry: TensorEntry) -> None:
        super().__init__(owner.source, {}, owner.fingerprints, owner.seen())
        self._owner = owner
        self._stream = stream
        self._entry = entry
        self._checksum = xxhash.xxh3_64()

    def fill(self, entry: TensorEntry, position: int, view: memoryview) -> None:
        """From the stream where it stands at `position`, else a range of the source."""
        if entry == self._entry and position == self._owner.position:
            self._owner.read(self._stream, view, self._checksum)
            self._note()
        else:
            super().fill(entry, position, view)

    def finish(self) -> None:
        """Let what the unit left of the tensor pass, too."""
        self._owner.pass_by(self._stream, self._entry.end, self._checksum)
        self._note()

    def _note(self) -> None:
        """Once all of the tensor has passed, it is known."""
        self._seen = self._owner.seen()
        if self._owner.position == self._entry.end:
            self._fingerprints.passed[self._entry] = self._checksum.intdigest()


class _StoppedError(Exception):
    """Another thread has failed, so there is no use in reading on."""


def _changed(file: str, what: str) -> ChangedSourceError:
    return ChangedSourceError(
        file,
        f"{file}: {what}; do not change a checkpoint while it is converted, and run the same "
        "command again",
    )


def entries_of(unit: Unit) -> list[TensorEntry]:
    """Everything a unit reads: weights, scales and global scales."""
    return [entry for tensor in unit.inputs for entry in tensor.entries.values()]


def is_inline(unit: Unit) -> bool:
    """Whether the unit is one large unquantised tensor."""
    first, *others = unit.inputs
    return not others and first.encoding is Encoding.PLAIN and first.nbytes > INLINE_BYTES
