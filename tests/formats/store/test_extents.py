"""Files written in pieces: what is covered, what makes a file whole, what the journal keeps."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch import Tensor

from dsv4.formats.errors import OutOfSpaceError, StoreError
from dsv4.formats.store import digest
from dsv4.formats.store.durable import write_file
from dsv4.formats.store.extents import (
    Batch,
    Extent,
    Sink,
    covers,
    partial_path,
    publish,
    restore_partial,
    seal,
)
from dsv4.formats.store.journal import Journal
from dsv4.formats.store.manifest import FileRecord
from dsv4.formats.store.specs import JOURNAL, FileSpec
from dsv4.formats.store.writer import StoreWriter

CHUNK, CHUNKS = 4096, 6
FILE = FileSpec("a/b/c/0/0", (0, CHUNKS), CHUNKS, CHUNK, True)
PLAIN = FileSpec("plain", (0, 1), 1, 1000, False)
IDENTITY = {"tool": "test"}
SIZE = CHUNK * CHUNKS


def payload(file: FileSpec = FILE) -> Tensor:
    """Random bytes, the same every time."""
    draw = torch.Generator().manual_seed(len(file.key))
    size = (file.payload_nbytes,)
    return torch.randint(0, 256, size, generator=draw, dtype=torch.uint8)


def pieces(*sizes: int) -> list[tuple[int, Tensor]]:
    """The payload cut into these sizes, each with its offset."""
    assert sum(sizes) == SIZE
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    return [(at, payload()[at : at + size]) for at, size in zip(begins, sizes, strict=True)]


def written(root: Path, what: Iterable[tuple[int, Tensor]], file: FileSpec = FILE) -> Batch:
    """Written by a sink, and synced."""
    with Sink(root) as sink:
        for offset, part in what:
            sink.write_at(file, offset, [part])
        return sink.sync()


def whole(root: Path, file: FileSpec = FILE) -> tuple[FileRecord, bytes]:
    """The same file written in one go: record and bytes."""
    (root / file.key).parent.mkdir(parents=True)
    record = write_file(root, file, [payload(file)])
    return record, (root / file.key).read_bytes()


# --- coverage -----------------------------------------------------------------------------------


def test_covers_is_the_union_of_the_extents() -> None:
    rng = random.Random(1)
    for _ in range(300):
        extents = [
            Extent(rng.randint(0, 30), rng.randint(0, 8), 0) for _ in range(rng.randint(0, 9))
        ]
        held = {at for extent in extents for at in range(extent.offset, extent.end)}
        for begin, end in ((0, 30), (rng.randint(0, 15), rng.randint(15, 35))):
            assert covers(extents, begin, end) == (set(range(begin, end)) <= held)


# --- sink ---------------------------------------------------------------------------------------


def test_pieces_in_any_order_make_the_same_file(tmp_path: Path) -> None:
    expected = whole(tmp_path / "expected")
    for seed in range(4):
        root = tmp_path / str(seed)
        root.mkdir()
        cut = pieces(CHUNK, 100, SIZE - 2 * CHUNK - 100, CHUNK)
        random.Random(seed).shuffle(cut)
        batch = written(root, cut)
        assert not (root / FILE.key).exists()
        record = seal(root, FILE, batch.extents[FILE])
        publish(root, FILE)
        assert (record, (root / FILE.key).read_bytes()) == expected
        assert not partial_path(root, FILE).exists()


def test_threads_share_a_sink(tmp_path: Path) -> None:
    expected = whole(tmp_path / "expected")
    with Sink(tmp_path) as sink, ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(sink.write_at, FILE, offset, [part])
            for offset, part in pieces(*[SIZE // 24] * 24)
        ]
        for job in jobs:
            job.result()
        assert sink.unsynced_bytes == SIZE
        batch = sink.sync()
        assert sink.unsynced_bytes == 0
    assert seal(tmp_path, FILE, batch.extents[FILE]) == expected[0]


def test_a_batch_is_what_was_written_since_the_last(tmp_path: Path) -> None:
    with Sink(tmp_path) as sink:
        sink.write_at(FILE, 0, [payload()[:10], payload()[10:30]])
        sink.write(PLAIN, [payload(PLAIN)])
        batch = sink.sync()
        expected = [
            Extent(begin, end - begin, xxhash.xxh3_64_intdigest(payload()[begin:end].numpy().data))
            for begin, end in ((0, 10), (10, 30))
        ]
        assert batch.extents == {FILE: expected}
        assert list(batch.files) == [PLAIN.key]
        assert (tmp_path / PLAIN.key).read_bytes() == payload(PLAIN).numpy().tobytes()
        assert sink.sync() == Batch({}, {})


def test_a_piece_beyond_the_file_is_refused(tmp_path: Path) -> None:
    with Sink(tmp_path) as sink, pytest.raises(StoreError, match="beyond its"):
        sink.write_at(FILE, SIZE - 5, [payload()[:6]])


def test_room_for_payload_and_index_is_taken_at_once(tmp_path: Path) -> None:
    with Sink(tmp_path) as sink:
        sink.write_at(FILE, 0, [payload()[:10]])
        assert partial_path(tmp_path, FILE).stat().st_size == FILE.nbytes


def test_no_room_is_met_again_by_whoever_writes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    open_before = len(list(Path("/proc/self/fd").iterdir()))
    with Sink(tmp_path) as sink:
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            for _ in range(3):
                with pytest.raises(OutOfSpaceError):
                    sink.write_at(FILE, 0, [payload()])
        assert len(list(Path("/proc/self/fd").iterdir())) == open_before
        sink.write_at(FILE, 0, [payload()])
        assert FILE in sink.sync().extents


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_fallocate_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def unsupported(descriptor: int, offset: int, nbytes: int) -> None:
        raise OSError(code, os.strerror(code))

    expected = whole(tmp_path / "expected")
    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    batch = written(tmp_path, [(0, payload())])
    assert seal(tmp_path, FILE, batch.extents[FILE]) == expected[0]


def test_durable_ranges_are_left_alone(tmp_path: Path) -> None:
    """A unit that is done again writes what was lost, and opens no file that is whole."""
    written(tmp_path, [(0, payload())])

    def durable(file: FileSpec, begin: int, end: int) -> bool:
        return file == FILE and end <= CHUNK

    with Sink(tmp_path, durable) as sink:
        sink.write_at(FILE, 0, [torch.zeros(CHUNK, dtype=torch.uint8)])
        assert sink.sync() == Batch({}, {})
        sink.write_at(FILE, CHUNK, [payload()[CHUNK : 2 * CHUNK]])
        assert [e.offset for e in sink.sync().extents[FILE]] == [CHUNK]
    raw = partial_path(tmp_path, FILE).read_bytes()
    assert raw[:SIZE] == payload().numpy().tobytes()


# --- completion ---------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[CHUNK + 7] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (_flip, "are not what was written"),
        (lambda path: os.truncate(path, CHUNK + 7), "shorter than what was written"),
        (lambda path: path.unlink(), "No such file"),
    ],
    ids=["flipped", "truncated", "deleted"],
)
def test_what_is_not_what_was_written_is_never_sealed(
    tmp_path: Path, harm: Callable[[Path], Any], sentence: str
) -> None:
    with StoreWriter(tmp_path, IDENTITY) as writer:
        assert writer.commit(written(tmp_path, pieces(CHUNK, SIZE - CHUNK))) == [FILE]
        harm(partial_path(tmp_path, FILE))
        with pytest.raises(StoreError, match=sentence):
            writer.complete(FILE)
        assert not writer.covers(FILE, 0, 1)  # all of it is forgotten
        assert not partial_path(tmp_path, FILE).exists()
        assert writer.commit(written(tmp_path, pieces(CHUNK, SIZE - CHUNK))) == [FILE]
        writer.complete(FILE)
        assert writer.has(FILE)


def test_gaps_and_overlaps_are_refused(tmp_path: Path) -> None:
    batch = written(tmp_path, pieces(CHUNK, CHUNK, SIZE - 2 * CHUNK))
    first, second, last = batch.extents[FILE]
    for extents in ([first, last], [first, second], [second, last], []):
        with pytest.raises(StoreError, match="written"):
            seal(tmp_path, FILE, extents)
    again = Extent(first.offset, first.nbytes, first.xxh3)
    seal(tmp_path, FILE, [second, last, first, again])


def test_sealing_twice_gives_the_same(tmp_path: Path) -> None:
    """As after a kill between rename and journal."""
    extents = written(tmp_path, pieces(CHUNK, SIZE - CHUNK)).extents[FILE]
    record = seal(tmp_path, FILE, extents)
    publish(tmp_path, FILE)
    raw = (tmp_path / FILE.key).read_bytes()
    assert raw[SIZE:] == digest.dense_index(CHUNKS, CHUNK)
    assert restore_partial(tmp_path, FILE.key, extents)
    assert not (tmp_path / FILE.key).exists()
    assert seal(tmp_path, FILE, extents) == record
    assert partial_path(tmp_path, FILE).read_bytes() == raw


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_rename_that_fails_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """What is sealed is on disk; whether its name is there is for the next run to find out."""
    with StoreWriter(tmp_path, IDENTITY) as writer:
        writer.commit(written(tmp_path, [(0, payload())]))
        calls, original = 0, getattr(os, call)

        def failing(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == (1 if call == "replace" else 2):  # the first fsync is the file's own
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            with pytest.raises(StoreError, match="run the same command again"):
                writer.complete(FILE)
    with StoreWriter(tmp_path, IDENTITY) as writer:
        assert writer.covers(FILE, 0, SIZE)
        assert writer.covered_files([FILE]) == [FILE]
        writer.complete(FILE)
        assert writer.has(FILE)


# --- journal ------------------------------------------------------------------------------------


def test_extents_are_replayed_until_the_file_is_whole(tmp_path: Path) -> None:
    cut = pieces(CHUNK, SIZE - CHUNK)
    with StoreWriter(tmp_path, IDENTITY) as writer:
        assert writer.commit(written(tmp_path, cut[:1]), {"unit": 1}) == []
    with StoreWriter(tmp_path, IDENTITY) as writer:
        assert writer.covers(FILE, 0, CHUNK)
        assert not writer.covers(FILE, 0, CHUNK + 1)
        assert writer.notes() == {"unit": 1}
        assert writer.allocated(FILE) == SIZE
        assert writer.commit(written(tmp_path, cut[1:])) == [FILE]
    with StoreWriter(tmp_path, IDENTITY) as writer:
        assert writer.covered_files([FILE]) == [FILE]
        writer.complete(FILE)
        assert writer.covered_files([FILE]) == []
    with StoreWriter(tmp_path, IDENTITY) as writer:
        assert writer.has(FILE)
        assert writer.covers(FILE, 0, SIZE)
        assert writer.allocated(FILE) == FILE.nbytes


@pytest.mark.parametrize("size", [None, 0, 2 * CHUNK - 1, 2 * CHUNK])
def test_extents_of_what_vanished_do_not_count(tmp_path: Path, size: int | None) -> None:
    with StoreWriter(tmp_path, IDENTITY) as writer:
        writer.commit(written(tmp_path, pieces(2 * CHUNK, SIZE - 2 * CHUNK)[:1]))
    partial = partial_path(tmp_path, FILE)
    if size is None:
        partial.unlink()
    else:
        os.truncate(partial, size)
    for _ in range(2):  # and that is kept, too
        with StoreWriter(tmp_path, IDENTITY) as writer:
            assert writer.covers(FILE, 0, 2 * CHUNK) == (size == 2 * CHUNK)
            assert partial.exists() == (size == 2 * CHUNK)


def test_a_link_in_the_place_of_a_partial_file_is_not_followed(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    with StoreWriter(out, IDENTITY) as writer:
        writer.commit(written(out, pieces(CHUNK, SIZE - CHUNK)[:1]))
    partial_path(out, FILE).rename(elsewhere)
    partial_path(out, FILE).symlink_to(elsewhere)
    with StoreWriter(out, IDENTITY) as writer:
        assert not writer.covers(FILE, 0, CHUNK)
    assert not partial_path(out, FILE).is_symlink()
    assert elsewhere.exists()


def test_a_file_the_journal_calls_whole_is_not_demoted(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, IDENTITY) as writer:
        writer.commit(written(tmp_path, [(0, payload())]))
        writer.complete(FILE)
    with StoreWriter(tmp_path, IDENTITY):
        assert (tmp_path / FILE.key).exists()


def test_forgetting_is_one_line_for_all_and_lasts(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, IDENTITY) as writer:
        writer.commit(written(tmp_path, pieces(CHUNK, SIZE - CHUNK)[:1]), {"a": 1, "b": 2})
        with Sink(tmp_path) as sink:
            sink.write(PLAIN, [payload(PLAIN)])
            writer.commit(sink.sync())
        before = (tmp_path / JOURNAL).read_bytes()
        writer.forget([FILE, PLAIN], ["a"])
        added = (tmp_path / JOURNAL).read_bytes().removeprefix(before).splitlines()
    assert added[0].startswith(b'{"forget":')  # files first: a torn note is only asked for again
    for _ in range(2):
        with StoreWriter(tmp_path, IDENTITY) as writer:
            assert not writer.has(PLAIN)
            assert not writer.covers(FILE, 0, 1)
            assert writer.notes() == {"a": None, "b": 2}
            assert not (tmp_path / PLAIN.key).exists()
            assert not partial_path(tmp_path, FILE).exists()


def test_a_journal_cut_anywhere_is_a_prefix_of_itself(tmp_path: Path) -> None:
    """Whatever a torn write leaves: whole lines count, the rest is cut off and written again."""
    with StoreWriter(tmp_path, IDENTITY) as writer:
        writer.commit(written(tmp_path, pieces(CHUNK, SIZE - CHUNK)), {"a": 1, "b": 2})
    raw = (tmp_path / JOURNAL).read_bytes()
    begin = raw.index(b"\n") + 1
    for end in range(begin, len(raw) + 1, 7):
        (tmp_path / JOURNAL).write_bytes(raw[:end])
        journal = Journal(tmp_path / JOURNAL, IDENTITY)
        lines = raw[:end].count(b"\n") - 1
        assert len(journal.extents) + len(journal.notes) == lines
        journal.append({}, {}, {"c": 3})
        journal.close()
        journal = Journal(tmp_path / JOURNAL, IDENTITY)
        assert journal.notes["c"] == 3
        assert len(journal.extents) + len(journal.notes) == lines + 1
        journal.close()


def test_a_torn_append_that_is_interrupted_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of a line: the next line does not continue it."""
    original = os.write

    def torn(descriptor: int, data: memoryview) -> int:
        original(descriptor, bytes(data[:5]))
        raise KeyboardInterrupt

    journal = Journal(tmp_path / JOURNAL, IDENTITY)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "write", torn)
        journal.append({}, {}, {"a": 1})
    journal.append({}, {}, {"b": 2})
    journal.close()
    journal = Journal(tmp_path / JOURNAL, IDENTITY)
    assert journal.notes == {"b": 2}
    journal.close()
