"""One pass over a file: what units are handed, what is read twice for it, and what is noticed."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dsv4.convert.outputs.base import Unit
from dsv4.convert.pipeline import Part, make_parts
from dsv4.convert.plan import make_plan
from dsv4.convert.sources import hashing_reader
from dsv4.convert.sources.base import Reader, bytes_of
from dsv4.convert.sources.hashing_reader import (
    Evidence,
    FilePass,
    Fingerprints,
    RangeReads,
    Schedule,
    entries_of,
)
from dsv4.convert.sources.local import LocalSource
from dsv4.formats.errors import ChangedSourceError
from dsv4.formats.model.recipes import make_recipe
from dsv4.formats.model.safetensors_header import TensorEntry
from dsv4.synthetic.tiny import TINY, write_tiny
from tests.convert.faults import scatter

Pass = Callable[[Unit, RangeReads], None]


class Counting(LocalSource):
    """Counts what is read as ranges, and flips a bit of a tensor where it is told to.

    lies: tensors whose ranges, as opposed to the stream, are wrong.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.ranged: Counter[str] = Counter()
        self.lies: set[str] = set()

    def read_into(self, file: str, position: int, view: memoryview, what: str) -> None:
        super().read_into(file, position, view, what)
        self.ranged[what] += len(view)
        if what in self.lies:
            view[0] ^= 1


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "hub"
    write_tiny(path, TINY)
    return path


@pytest.fixture(scope="module")
def scattered(hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every expert lies in three files."""
    path = tmp_path_factory.mktemp("scattered") / "hub"
    scatter(hub, path, 3)
    return path


@pytest.fixture
def source(hub: Path) -> Counting:
    return Counting(hub)


def _parts(source: LocalSource) -> list[Part]:
    return make_parts(make_plan(source, make_recipe("native")).units, source.sizes)


def _walk(
    source: LocalSource,
    part: Part,
    ready: Pass,
    hold: int = 1 << 30,
    known: Fingerprints | None = None,
) -> str | None:
    known = known or Fingerprints()
    schedule = Schedule(part.file, part.units, part.watched, hold)
    walk = FilePass(source, part.file, schedule, known)
    return walk.run(ready, lambda: False)


def _read_all(unit: Unit, reader: Reader) -> dict[TensorEntry, bytes]:
    return {entry: bytes(bytes_of(reader.read(entry))) for entry in entries_of(unit)}


def _truth(directory: Path, entry: TensorEntry) -> bytes:
    with (directory / entry.file).open("rb") as file:
        file.seek(entry.begin)
        return file.read(entry.nbytes)


def _inputs(units: tuple[Unit, ...], file: str) -> list[list[TensorEntry]]:
    """Of every unit, what lies in `file`, in its order."""
    found = ([e for e in entries_of(unit) if e.file == file] for unit in units)
    return [sorted(entries, key=lambda entry: entry.begin) for entries in found]


@pytest.mark.parametrize("cut", ["hub", "scattered"])
@pytest.mark.parametrize("hold", [0, 30_000, 1 << 30])
def test_units_get_the_files_bytes_whatever_is_held(
    cut: str, hold: int, request: pytest.FixtureRequest
) -> None:
    directory: Path = request.getfixturevalue(cut)
    source, known = Counting(directory), Fingerprints()
    straddling = reread = 0
    for part in _parts(source):
        found: dict[str, dict[TensorEntry, bytes]] = {}
        source.ranged.clear()

        def ready(unit: Unit, reader: RangeReads) -> None:
            found[unit.key] = _read_all(unit, reader)  # noqa: B023

        sha256 = _walk(source, part, ready, hold, known)
        assert sha256 == hashlib.sha256((directory / part.file).read_bytes()).hexdigest()
        assert sorted(found) == sorted(unit.key for unit in part.units)
        for read in found.values():
            assert all(value == _truth(directory, entry) for entry, value in read.items())
        others = sum(
            e.nbytes for unit in part.units for e in entries_of(unit) if e.file != part.file
        )
        straddling += others
        all_but_last = sum(
            e.nbytes for inputs in _inputs(part.units, part.file) for e in inputs[:-1]
        )
        again = source.ranged.total() - others
        reread += again
        if hold == 0:
            assert again == all_but_last
        elif hold == 30_000:
            assert 0 <= again <= all_but_last
        else:
            assert again == 0
        known.check()
    assert (straddling > 0) == (cut == "scattered")
    if hold == 30_000:
        assert reread > 0


def test_more_room_means_less_to_read_again(hub: Path) -> None:
    again = []
    for hold in (0, 10_000, 20_000, 40_000, 1 << 20):
        source = Counting(hub)
        for part in _parts(source):
            _walk(source, part, _take, hold)
        again.append(source.ranged.total())
    assert again == sorted(again, reverse=True)
    assert again[0] > again[2] > again[-1] == 0


def _take(unit: Unit, reader: Reader) -> None:
    """Read everything and forget it."""
    _read_all(unit, reader)


# --- tensors that are taken while they pass ------------------------------------------------------


def _embedding(source: LocalSource) -> Part:
    return next(p for p in _parts(source) if any(u.key == "embed/weight" for u in p.units))


def _rows(unit: Unit, reader: Reader, step: int) -> bytes:
    entry = entries_of(unit)[0]
    rows = range(0, entry.shape[0], step)
    return b"".join(bytes(bytes_of(reader.read_rows(entry, r, r + step))) for r in rows)


@pytest.mark.parametrize("times", [1, 2])
def test_a_large_tensor_is_taken_while_it_passes(
    source: Counting, hub: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setattr(hashing_reader, "INLINE_BYTES", 1000)
    part, known = _embedding(source), Fingerprints()
    entry = next(e for u in part.units for e in entries_of(u) if u.key == "embed/weight")
    evidence: list[Evidence] = []

    def ready(unit: Unit, reader: RangeReads) -> None:
        for _ in range(times if unit.key == "embed/weight" else 0):
            assert _rows(unit, reader, 64) == _truth(hub, entry)
            evidence.append(reader.evidence())

    sha256 = _walk(source, part, ready, 0, known)
    raw = (hub / part.file).read_bytes()
    assert sha256 == hashlib.sha256(raw).hexdigest()
    assert source.ranged["embed.weight"] == (times - 1) * entry.nbytes
    for read in evidence:
        assert read["position"] == entry.end
        assert read["sha256"] == hashlib.sha256(raw[: entry.end]).hexdigest()
    known.check()


def test_the_second_look_at_a_large_tensor_is_compared(
    source: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing_reader, "INLINE_BYTES", 1000)
    source.lies.add("embed.weight")

    def ready(unit: Unit, reader: RangeReads) -> None:
        _rows(unit, reader, 64)
        _rows(unit, reader, 64)

    with pytest.raises(ChangedSourceError, match=r"embed\.weight changed between two readings"):
        _walk(source, _embedding(source), ready)


def test_a_large_tensor_that_nobody_takes_is_hashed(
    source: Counting, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing_reader, "INLINE_BYTES", 1000)
    part = _embedding(source)
    sha256 = _walk(source, part, lambda unit, reader: None)
    assert sha256 == hashlib.sha256((hub / part.file).read_bytes()).hexdigest()


# --- what changes --------------------------------------------------------------------------------


def test_a_tensor_that_changes_before_it_is_read_again(source: Counting) -> None:
    """It is noticed before the unit has ended, so nothing made from it is kept."""
    part = _parts(source)[1]
    unit = next(u for u in part.units if len(_inputs((u,), part.file)[0]) > 1)
    lie = _inputs((unit,), part.file)[0][0]
    source.lies.add(lie.name)
    ended: list[str] = []

    def ready(unit: Unit, reader: RangeReads) -> None:
        _read_all(unit, reader)
        ended.append(unit.key)

    with pytest.raises(ChangedSourceError, match="changed between two readings") as caught:
        _walk(source, part, ready, 0)
    assert caught.value.file == part.file
    assert unit.key not in ended


@pytest.mark.parametrize("resumed", [False, True])
def test_a_tensor_of_another_file_is_compared_in_the_end(scattered: Path, resumed: bool) -> None:
    """Also when an interruption lies between the two readings."""
    source, known = Counting(scattered), Fingerprints()
    parts = _parts(source)
    unit = next(u for u in parts[-1].units if any(e.file != parts[-1].file for e in entries_of(u)))
    lie = next(e for e in entries_of(unit) if e.file != parts[-1].file)
    source.lies.add(lie.name)
    evidence: dict[str, Evidence] = {}

    def ready(unit: Unit, reader: RangeReads) -> None:
        _read_all(unit, reader)
        evidence[unit.key] = reader.evidence()

    _walk(source, parts[-1], ready, known=known)  # before the files that it looks into
    if resumed:
        known = Fingerprints()
        known.remember(unit, evidence[unit.key])
    known.check()  # nothing to compare with yet
    other = next(part for part in parts if part.file == lie.file)
    _walk(source, other, lambda unit, reader: None, known=known)
    with pytest.raises(ChangedSourceError, match=lie.name) as caught:
        known.check()
    assert caught.value.file == lie.file


@pytest.mark.parametrize("where", ["before", "behind"])
def test_a_file_that_is_not_what_an_earlier_run_has_read(
    hub: Path, tmp_path: Path, where: str
) -> None:
    """Bytes before a finished unit's last tensor must be the same; others may be new."""
    source = Counting(hub)
    part = _parts(source)[1]
    evidence: dict[str, Evidence] = {}

    def ready(unit: Unit, reader: RangeReads) -> None:
        evidence[unit.key] = reader.evidence()

    _walk(source, part, ready)
    unit = sorted(part.units, key=lambda unit: int(evidence[unit.key]["position"]))[3]
    position = evidence[unit.key]["position"]
    copy = tmp_path / "hub"
    copy.mkdir()
    for path in hub.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    raw = bytearray((copy / part.file).read_bytes())
    raw[position - 1 if where == "before" else position] ^= 1
    (copy / part.file).write_bytes(raw)
    known = Fingerprints()
    known.remember(unit, evidence[unit.key])
    if where == "before":
        with pytest.raises(ChangedSourceError, match="not what an earlier run has read"):
            _walk(LocalSource(copy), part, lambda unit, reader: None, known=known)
    else:
        sha256 = _walk(LocalSource(copy), part, lambda unit, reader: None, known=known)
        assert sha256 == hashlib.sha256(raw).hexdigest()


class Published(LocalSource):
    """Says what the SHA-256 of every file should be."""

    def published_sha256(self, file: str) -> str | None:
        return "0" * 64


def test_a_file_that_is_not_the_published_one(hub: Path) -> None:
    source = Published(hub)
    part = _parts(source)[1]
    with pytest.raises(ChangedSourceError, match=f"the repository says {'0' * 64}") as caught:
        _walk(source, part, lambda unit, reader: None)
    assert caught.value.file == part.file


# --- stop ----------------------------------------------------------------------------------------


def test_a_pass_stops_between_pieces(source: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no unit wants anything of the file."""
    monkeypatch.setattr(hashing_reader, "PIECE_BYTES", 4096)
    file = max(source.sizes, key=source.sizes.__getitem__)
    asked = 0

    def stopped() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    walk = FilePass(source, file, Schedule(file, (), (), 0), Fingerprints())
    assert walk.run(lambda unit, reader: None, stopped) is None
    assert walk.position == 3 * 4096


def test_evidence_is_of_the_file_up_to_the_unit(source: Counting, hub: Path) -> None:
    part = _parts(source)[1]
    raw = (hub / part.file).read_bytes()
    checked = 0

    def ready(unit: Unit, reader: RangeReads) -> None:
        nonlocal checked
        evidence = reader.evidence()
        end = max(entry.end for entry in entries_of(unit))
        assert evidence["file"] == part.file
        assert evidence["position"] == end
        assert evidence["sha256"] == hashlib.sha256(raw[:end]).hexdigest()
        assert evidence["others"] == []
        checked += 1

    _walk(source, part, ready)
    assert checked == len(part.units)


def test_rows_of_a_held_tensor_are_its_rows(source: Counting, hub: Path) -> None:
    part = _parts(source)[1]

    def ready(unit: Unit, reader: RangeReads) -> None:
        for entry in entries_of(unit):
            if len(entry.shape) == 2 and entry.shape[0] >= 3:
                rows = reader.read_rows(entry, 1, 3)
                row_bytes = math.prod(entry.shape[1:]) * rows.element_size()
                raw = _truth(hub, entry)[row_bytes : 3 * row_bytes]
                assert bytes(bytes_of(rows.clone(memory_format=torch.contiguous_format))) == raw

    _walk(source, part, ready)
    assert not source.ranged
