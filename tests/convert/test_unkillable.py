"""Kills, full disks, broken disks and changing sources: the same root in the end, always.

Every conversion here is the real command line in a process of its own (see `tests.convert.faults`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv4.convert import engine, pipeline
from dsv4.convert.memory import Budget
from dsv4.convert.sources.base import ByteStream
from dsv4.convert.sources.local import SAMPLE_BYTES, LocalSource
from dsv4.formats.errors import ChangedSourceError, ConflictError, StoreError
from dsv4.formats.store.durable import DirectoryLock
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import JOURNAL, MARKER
from dsv4.formats.store.writer import StoreWriter
from dsv4.synthetic.tiny import TINY, write_tiny
from tests.convert.faults import (
    ANY,
    CALLS,
    COMMIT_BYTES,
    INTERRUPT,
    KILL,
    KILL_AFTER,
    READ_BACK,
    SYNCS,
    TERMINATE,
    Fault,
    Outcome,
    Subject,
    scatter,
)

CONFIG = dataclasses.replace(
    TINY,
    num_hidden_layers=2,
    compress_ratios=(0, 0),
    num_hash_layers=1,
    n_routed_experts=6,
    num_experts_per_tok=2,
    num_draft_layers=0,
)
KILLS, BY_THE_CLOCK = 50, 12  # the clock, and a few others, may strike after the end


@dataclasses.dataclass(frozen=True)
class Reference:
    """A conversion that nothing disturbed, and how often it called the system."""

    source: Path
    root: str
    tree: dict[str, bytes]
    calls: dict[str, int]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    with Subject(tmp_path_factory.mktemp("subject")) as subject:
        yield subject


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file per layer, as released."""
    path = tmp_path_factory.mktemp("hub") / "hub"
    write_tiny(path, CONFIG)
    return path


@pytest.fixture(scope="module")
def reference(subject: Subject, hub: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Three files, across which all experts are scattered; one worker."""
    base = tmp_path_factory.mktemp("reference")
    scatter(hub, base / "hub", 3)
    done = _convert(subject, base / "hub", base / "out", workers=1)
    assert done.code == 0, done.stderr
    return Reference(base / "hub", _root(base / "out"), _tree(base / "out"), done.calls)


def _convert(
    subject: Subject,
    source: Path,
    out: Path,
    fault: Fault | None = None,
    *,
    workers: int = 2,
    seconds: float | None = None,
) -> Outcome:
    done = subject.run(
        "convert", "--hf", source, "--out", out, "--workers", str(workers), fault=fault,
        seconds=seconds,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def _root(out: Path) -> str:
    root: str = PackedStore.open(out).manifest["root"]
    return root


def _tree(out: Path) -> dict[str, bytes]:
    """Every file but those that only say that a run was killed while it tidied up."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in (JOURNAL, ".lock")
    }


def _resumes(subject: Subject, reference: Reference, out: Path, workers: int = 2) -> Outcome:
    """The next run ends with the reference's bytes."""
    done = _convert(subject, reference.source, out, workers=workers)
    assert done.code == 0, done.stderr
    assert (_root(out), _tree(out)) == (reference.root, reference.tree)
    return done


def _unfinished(subject: Subject, out: Path) -> bool:
    """Whether there is no marker; then nothing takes the directory for a store."""
    if (out / MARKER).exists():
        return False
    with pytest.raises(StoreError):
        PackedStore.open(out)
    return True


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_bytes_do_not_depend_on_workers(
    subject: Subject, reference: Reference, tmp_path: Path, workers: int
) -> None:
    _resumes(subject, reference, tmp_path / "out", workers)


# --- kills --------------------------------------------------------------------------------------


def _instants(rng: random.Random, calls: dict[str, int]) -> list[tuple[Fault | None, float | None]]:
    """Before and after calls of every kind, wherever in the run; and by the clock alone."""
    instants: list[tuple[Fault | None, float | None]] = []
    for call in (*CALLS, READ_BACK):
        for do in (KILL, KILL_AFTER):
            instants.append((Fault(call, rng.randint(1, max(calls[call], 1)), do), None))
    for last in range(2):  # the marker is the last rename, the journal's end the last unlink
        for do in (KILL, KILL_AFTER):
            instants.append((Fault("replace", calls["replace"] - last, do), None))
    while len(instants) < KILLS:
        instants.append((Fault(ANY, rng.randint(1, calls[ANY] - 50), KILL), None))
    instants += [(None, rng.uniform(0.0, 0.3)) for _ in range(BY_THE_CLOCK)]
    rng.shuffle(instants)
    return instants


def test_killed_at_fifty_instants(subject: Subject, reference: Reference, tmp_path: Path) -> None:
    """Killed again and again on the same directory, or carried to the end: the same store."""
    rng = random.Random(20261121)
    kills, whole, number = 0, 0, 0
    for fault, seconds in _instants(rng, reference.calls):
        while True:
            out = tmp_path / str(number)
            fresh = not out.exists()
            workers = rng.choice((1, 2, 5))
            done = _convert(subject, reference.source, out, fault, workers=workers, seconds=seconds)
            kills += done.killed
            if not out.exists():  # killed while it planned
                break
            if not _unfinished(subject, out):
                assert (_root(out), _tree(out)) == (reference.root, reference.tree)
                assert subject.run("validate", out).code == 0
                whole, number = whole + 1, number + 1
                if not (done.killed or fresh):
                    continue  # what was left to do was over before the instant came
            else:
                assert done.killed, done
                refused = subject.run("validate", out)
                assert refused.code == 1, refused
                if rng.random() < 0.3:
                    _resumes(subject, reference, out, rng.choice((1, 2)))
                    whole, number = whole + 1, number + 1
            break
    assert kills >= KILLS
    assert whole >= 10


@pytest.mark.parametrize(("do", "code"), [(INTERRUPT, 130), (TERMINATE, -signal.SIGTERM)])
@pytest.mark.parametrize("call", ["preadv", "pwrite", READ_BACK])
def test_ctrl_c_and_termination(
    subject: Subject, reference: Reference, tmp_path: Path, do: str, code: int, call: str
) -> None:
    nth = reference.calls[call] // 2
    done = _convert(subject, reference.source, tmp_path / "out", Fault(call, nth, do))
    assert done.code == code, done
    if do == INTERRUPT:
        assert "nothing finished is lost; run the same command again to continue" in done.stderr
    assert _unfinished(subject, tmp_path / "out")
    done = _resumes(subject, reference, tmp_path / "out")
    assert call == "preadv" or "units were done already" in done.stdout


def test_a_file_renamed_before_the_journal_knew_is_kept(
    subject: Subject, reference: Reference, tmp_path: Path
) -> None:
    """Its units, too, are at the last durable point: none is done again."""
    out = tmp_path / "out"
    last = Fault("replace", reference.calls["replace"], KILL)  # the marker's
    assert _convert(subject, reference.source, out, last).killed
    lines = (out / JOURNAL).read_bytes().splitlines(keepends=True)
    renamed = b'"path":"layers/0/ffn/experts/w13/codes/'
    kept = [line for line in lines if renamed not in line]
    assert len(kept) < len(lines)
    (out / JOURNAL).write_bytes(b"".join(kept))
    assert any("w13/codes" in key and (out / key).exists() for key in _begun(out))
    units = json.loads(subject.run("plan", reference.source, "--json").stdout)["units"]
    assert f"{units} of {units} units were done already" in _resumes(subject, reference, out).stdout


def _begun(out: Path) -> dict[str, int]:
    """By the journal: files with durable extents that are not whole, and where the first ends."""
    begun: dict[str, int] = {}
    for line in (out / JOURNAL).read_bytes().splitlines()[1:]:
        entry = json.loads(line)
        if "extents" in entry:
            begun.setdefault(entry["extents"], sum(entry["of"][0][:2]))
        elif "path" in entry:
            begun.pop(entry["path"], None)
        for key in entry.get("forget", ()):
            begun.pop(key, None)
    return begun


# --- disks --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _small_disk(where: Path, kib: int) -> Iterator[bool]:
    """Mount a disk of `kib` KiB at `where`; False where this machine does not allow that."""
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(where)]
    try:
        mounted = not subprocess.run(command, capture_output=True, check=False).returncode
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(where)], check=True)


def test_a_full_disk(subject: Subject, reference: Reference, tmp_path: Path) -> None:
    """Room for the arrays' bytes, so that it starts, but not for their last blocks."""
    plan = json.loads(subject.run("plan", reference.source, "--json").stdout)
    disk = tmp_path / "disk"
    with _small_disk(disk, plan["peak_disk_bytes"] // 1024 + 64) as mounted:
        fault = None if mounted else Fault("write", 300, errno.ENOSPC, lasting=True)
        done = _convert(subject, reference.source, disk / "out", fault)
        assert done.code == 3, done
        assert "disk is full" in done.stderr
        assert "run the same command again to continue" in done.stderr
        assert _unfinished(subject, disk / "out")
        again = _convert(subject, reference.source, disk / "out", fault)
        assert again.code == 3, again  # still full
        if mounted:
            command = ["mount", "-o", "remount,size=64m", str(disk)]
            subprocess.run(command, check=True)
        assert "units were done already" in _resumes(subject, reference, disk / "out").stdout


def test_a_disk_that_is_too_small_is_refused_at_once(
    subject: Subject, reference: Reference, tmp_path: Path
) -> None:
    with _small_disk(tmp_path / "disk", 1024) as mounted:
        if not mounted:
            pytest.skip("this machine does not allow to mount a small disk")
        done = _convert(subject, reference.source, tmp_path / "disk" / "out")
    assert done.code == 3
    assert "1.0 MB are free" in done.stderr


_WRITES = ("posix_fallocate", "pwrite", "write", "ftruncate", "mkdir", "replace")
_BROKEN = [
    *((call, errno.ENOSPC) for call in ("posix_fallocate", "pwrite", "write", "mkdir")),
    *((call, errno.EDQUOT) for call in ("pwrite", "fdatasync")),
    *((call, errno.EIO) for call in (*_WRITES, "fdatasync", "fsync", READ_BACK)),
]


@pytest.mark.parametrize(
    ("call", "code"), _BROKEN, ids=[f"{call}-{errno.errorcode[code]}" for call, code in _BROKEN]
)
def test_a_call_that_fails_once(
    subject: Subject, reference: Reference, tmp_path: Path, call: str, code: int
) -> None:
    """Once is harder than for good: whoever goes on after it must not forget that it failed."""
    out = tmp_path / "out"
    nth = max(1, reference.calls[call] * 2 // 3)
    done = _convert(subject, reference.source, out, Fault(call, nth, code))
    assert done.code == (2 if code == errno.EIO else 3), done
    assert re.search(r"run the same command\s+again", done.stderr)
    assert _unfinished(subject, out)
    assert "units were done already" in _resumes(subject, reference, out).stdout


def test_every_commit_may_be_the_one_that_fails(
    subject: Subject, reference: Reference, tmp_path: Path
) -> None:
    """Also the last one, after which no worker asks for its result."""
    for number, nth in enumerate(range(1, reference.calls["fdatasync"] + 1, 5)):
        out = tmp_path / str(number)
        done = _convert(subject, reference.source, out, Fault("fdatasync", nth, errno.EIO))
        if done.code:
            assert done.code == 2, done
            _resumes(subject, reference, out)
        assert _root(out) == reference.root


# --- the directory between two runs -------------------------------------------------------------


def test_another_conversion_is_refused(
    subject: Subject, reference: Reference, hub: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert _convert(subject, reference.source, out, Fault("pwrite", 30, KILL)).killed
    journal = out / JOURNAL
    kept = journal.read_bytes()
    done = subject.run("convert", "--hf", reference.source, "--out", out, "--recipe", "native")
    assert (done.code, "begun by recipe standard, now it is native" in done.stderr) == (2, True)
    done = _convert(subject, hub, out)
    assert (done.code, "not those it was begun from" in done.stderr) == (2, True)
    assert journal.read_bytes() == kept
    journal.write_bytes(kept.replace(b'"tool":"dsv4', b'"tool":"dsv3', 1))
    done = _convert(subject, reference.source, out)
    assert (done.code, "it was begun by dsv3" in done.stderr) == (2, True)
    journal.write_bytes(kept)
    _resumes(subject, reference, out)


def test_a_second_converter_is_refused(
    subject: Subject, reference: Reference, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert _convert(subject, reference.source, out, Fault("pwrite", 30, KILL)).killed
    lock = DirectoryLock(out)
    done = _convert(subject, reference.source, out)
    assert (done.code, "another process is writing" in done.stderr) == (2, True)
    with pytest.raises(ConflictError):
        DirectoryLock(out)
    lock.release()
    _resumes(subject, reference, out)


def _killed(subject: Subject, reference: Reference, out: Path) -> Path:
    """A killed conversion; -> a partial file of it, some extents of which are durable."""
    for nth in range(12, reference.calls["fdatasync"]):
        done = _convert(subject, reference.source, out, Fault("fdatasync", nth, KILL), workers=1)
        assert done.killed
        for key in _begun(out):
            if (partial := out / f"{key}.partial").exists():
                return partial
    raise AssertionError("no kill left a partial file with durable extents")


@pytest.mark.parametrize("how", ["deleted", "emptied", "truncated", "grown"])
def test_a_partial_file_that_lost_bytes_is_made_again(
    subject: Subject, reference: Reference, tmp_path: Path, how: str
) -> None:
    out = tmp_path / "out"
    partial = _killed(subject, reference, out)
    size = partial.stat().st_size
    if how == "deleted":
        partial.unlink()
    else:
        first = _begun(out)[partial.relative_to(out).as_posix().removesuffix(".partial")]
        wanted = {"emptied": 0, "truncated": first - 1, "grown": size + 5}[how]
        with partial.open("r+b") as file:
            file.truncate(wanted)
    _resumes(subject, reference, out)


def test_an_altered_partial_file_is_noticed_and_healed(
    subject: Subject, reference: Reference, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    partial = _killed(subject, reference, out)
    first = _begun(out)[partial.relative_to(out).as_posix().removesuffix(".partial")]
    with partial.open("r+b") as file:
        file.seek(first - 1)
        byte = file.read(1)[0]
        file.seek(first - 1)
        file.write(bytes([byte ^ 1]))
    done = _convert(subject, reference.source, out)
    assert done.code == 2, done
    assert "are not what was written" in done.stderr
    assert "run the same command again" in done.stderr
    assert _unfinished(subject, out)
    _resumes(subject, reference, out)


def test_a_lost_file_of_an_expert_whose_other_file_is_whole(
    subject: Subject, reference: Reference, tmp_path: Path
) -> None:
    """The expert is done again, and what is whole of it is left as it is."""
    out = tmp_path / "out"
    nth = reference.calls["replace"] - 1  # everything is there but some metadata
    assert _convert(subject, reference.source, out, Fault("replace", nth, KILL)).killed
    lost, kept = (_first_file(out / f"layers/0/ffn/experts/w13/{a}/c") for a in ("scales", "codes"))
    inode = kept.stat().st_ino
    lost.unlink()
    _resumes(subject, reference, out)
    assert kept.stat().st_ino == inode


def _first_file(directory: Path) -> Path:
    return next(path for path in sorted(directory.rglob("*")) if path.is_file())


def test_a_torn_journal(subject: Subject, reference: Reference, tmp_path: Path) -> None:
    """Cut anywhere in what a conversion wrote: notes without extents, extents without notes."""
    out = tmp_path / "out"
    rng = random.Random(7)
    for _ in range(6):
        done = _convert(subject, reference.source, out, Fault("pwrite", 25, KILL))
        if not done.killed:
            break
        raw = (out / JOURNAL).read_bytes()
        end = rng.randint(max(raw.index(b"\n") + 1, len(raw) - 20_000), len(raw))
        (out / JOURNAL).write_bytes(raw[:end])
    if _unfinished(subject, out):
        _resumes(subject, reference, out)


# --- the source changes -------------------------------------------------------------------------


def _flip(file: Path, position: int) -> None:
    """Change one bit in place, where no cheap fingerprint looks."""
    with file.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 1]))


def _copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def _unsampled(source: Path, file: str) -> int:
    """A position of an expert's weight that no fingerprint of the whole file covers."""
    size = (source / file).stat().st_size
    sampled = [range(at, at + SAMPLE_BYTES) for at in (0, size // 2, size - SAMPLE_BYTES)]
    entries = LocalSource(source).entries.values()
    ends = (entry.end for entry in entries if entry.file == file and entry.dtype == "I8")
    for at in sorted(end - 1 for end in ends):
        if not any(at in span for span in sampled):
            return at
    raise AssertionError("no expert lies there")


def test_a_file_that_changed_after_it_was_partly_converted(
    subject: Subject, reference: Reference, tmp_path: Path
) -> None:
    """Refused by name and dropped; then it is converted as it is now, or as it was."""
    source, out = _copy(reference.source, tmp_path / "hub"), tmp_path / "out"
    _, second, _ = sorted(path.name for path in source.glob("*.safetensors"))
    identity = LocalSource(source).fingerprint()
    reads = reference.calls["preadv"] // 2
    for step in range(20):  # until units of the second file are durable, but not all of it
        fault = Fault("preadv", reads + 4 * step, KILL)
        assert _convert(subject, source, tmp_path / f"{step}", fault, workers=1).killed
        out = tmp_path / f"{step}"
        if _furthest(out).get(second, 0) > _unsampled(source, second):
            break
    _flip(source / second, _unsampled(source, second))
    assert LocalSource(source).fingerprint() == identity
    kept = _copy(out, tmp_path / "kept")
    done = _convert(subject, source, out)
    assert done.code == 2, done
    assert f"{second}: it is not what an earlier run has read" in done.stderr
    assert "run the same command again" in done.stderr
    changed = _convert(subject, source, out)
    assert changed.code == 0, changed.stderr
    anew = _convert(subject, source, tmp_path / "anew")
    assert anew.code == 0
    assert _tree(out) == _tree(tmp_path / "anew")
    assert _root(out) != reference.root
    # The same, but the file is put right before anything is converted from it again.
    done = _convert(subject, source, kept)
    assert done.code == 2, done
    _flip(source / second, _unsampled(source, second))
    _resumes(subject, reference, kept)


def _furthest(out: Path) -> dict[str, int]:
    """By the journal: how far into each source file finished units have read."""
    found: dict[str, int] = {}
    for line in (out / JOURNAL).read_bytes().splitlines()[1:]:
        read = json.loads(line).get("value", {}).get("read")
        if read is not None:
            found[read["file"]] = max(found.get(read["file"], 0), read["position"])
    return found


class Damaged(LocalSource):
    """A source whose hashes are known, and whose bytes are damaged on their way while `damage`.

    What is streamed has one bit flipped at `at`; ranges are right.
    """

    def __init__(self, directory: Path, file: str, at: int) -> None:
        super().__init__(directory)
        self._file, self._at = file, at
        self._directory = directory
        self.damage = True
        self.patience = 0.0  # for workers to end what they have, before the hash is compared

    @contextlib.contextmanager
    def stream(self, file: str) -> Iterator[ByteStream]:
        with super().stream(file) as stream:
            yield _Flipping(stream, self._at) if self.damage and file == self._file else stream

    def published_sha256(self, file: str) -> str | None:
        time.sleep(self.patience)
        return hashlib.sha256((self._directory / file).read_bytes()).hexdigest()


class _Flipping:
    """A stream with one bit flipped."""

    def __init__(self, stream: ByteStream, at: int) -> None:
        self._stream, self._at, self._position = stream, at, 0

    def readinto(self, view: memoryview) -> None:
        self._stream.readinto(view)
        if self._position <= self._at < self._position + len(view):
            view[self._at - self._position] ^= 1
        self._position += len(view)


@pytest.fixture
def damaged(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> Damaged:
    """The reference's source with damage in its second file; syncs are left out."""
    file = sorted(LocalSource(reference.source).sizes)[1]
    source = Damaged(reference.source, file, _unsampled(reference.source, file))
    monkeypatch.setattr(engine, "open_source", lambda src, revision, on_wait: source)
    monkeypatch.setattr(pipeline, "COMMIT_BYTES", COMMIT_BYTES)
    for sync in SYNCS:
        monkeypatch.setattr(os, sync, lambda descriptor: None)
    return source


@pytest.mark.parametrize("hold", [None, 0])
def test_a_file_that_is_damaged_on_its_way(
    damaged: Damaged,
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hold: int | None,
) -> None:
    """By its published hash, or by a second look at a tensor; what was made of it is dropped."""
    if hold is not None:
        share = Budget.share

        def without_hold(*args: Any, **kwargs: Any) -> Budget:
            return dataclasses.replace(share(*args, **kwargs), hold_bytes=0)

        monkeypatch.setattr(Budget, "share", without_hold)
    out = tmp_path / "out"
    damaged.patience = 0.5
    with pytest.raises(ChangedSourceError, match="run the same command again") as caught:
        engine.convert(reference.source, out, workers=2)
    assert hold == 0 or "the repository says" in str(caught.value)
    assert not (out / MARKER).exists()
    damaged.damage, damaged.patience = False, 0.0
    summary = engine.convert(reference.source, out, workers=2)
    assert summary.resumed_units > 0  # what other files gave is kept
    assert (summary.root, _tree(out)) == (reference.root, reference.tree)


def test_killed_before_damage_was_dropped(
    damaged: Damaged, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash was wrong, and the journal does not know yet: the next run finds out by itself."""
    out = tmp_path / "out"

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    damaged.patience = 0.5
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StoreWriter, "forget", killed)
        engine.convert(reference.source, out, workers=2)
    damaged.damage, damaged.patience = False, 0.0
    with pytest.raises(ChangedSourceError, match="not what an earlier run has read"):
        engine.convert(reference.source, out, workers=2)
    summary = engine.convert(reference.source, out, workers=2)
    assert (summary.root, _tree(out)) == (reference.root, reference.tree)
