"""Kills, full disks, damage and refusals: the same files in the end, or a sentence and a code."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dsv4
from dsv4.export.engine import JOURNAL
from dsv4.formats.errors import ConfigError, ConflictError, OutOfSpaceError, StoreError
from dsv4.formats.model.releases import MODELS
from dsv4.formats.store.specs import MARKER
from dsv4.formats.store.writer import StoreWriter
from dsv4.synthetic.real_shapes import fresh_layers, write_checkpoint
from tests.convert.faults import ANY, KILL, KILL_AFTER, Fault, Outcome, Subject

CONFIG = "config.json"
SHARD = "2M"
KILLS = 15


@dataclasses.dataclass(frozen=True)
class Reference:
    """An export that nothing disturbed."""

    store: Path
    tree: dict[str, bytes]
    calls: dict[str, int]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    with Subject(tmp_path_factory.mktemp("subject")) as subject:
        yield subject


def export(
    subject: Subject, store: Path, out: Path, *more: str, fault: Fault | None = None
) -> Outcome:
    done = subject.run("export", store, "--out", out, "--shard-size", SHARD, *more, fault=fault)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def tree(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir() if p.name not in (JOURNAL, ".lock")}


@pytest.fixture(scope="module")
def reference(
    subject: Subject, standard_store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    out = tmp_path_factory.mktemp("reference") / "out"
    done = export(subject, standard_store, out)
    assert done.code == 0, done.stderr
    assert sum(name.endswith(".safetensors") for name in tree(out)) > 3
    return Reference(standard_store, tree(out), done.calls)


def test_killed_anywhere_it_goes_on(subject: Subject, reference: Reference, tmp_path: Path) -> None:
    rng = random.Random(24)
    kills = 0
    for number in range(KILLS):
        out = tmp_path / str(number)
        call = rng.choice(("write", "replace", "fsync", "unlink", ANY))
        nth = rng.randint(1, reference.calls[call])
        fault = Fault(call, nth, rng.choice((KILL, KILL_AFTER)))
        done = export(subject, reference.store, out, fault=fault)
        kills += done.killed
        if (out / CONFIG).exists() and not (out / JOURNAL).exists():
            assert tree(out) == reference.tree
            continue
        if not (out / CONFIG).exists():
            with pytest.raises(dsv4.Dsv4Error):
                dsv4.convert(out, tmp_path / "never")
        done = export(subject, reference.store, out, "--workers", str(rng.choice((1, 3))))
        assert done.code == 0, done.stderr
        assert tree(out) == reference.tree
    assert kills > KILLS // 2


def test_what_was_finished_is_not_written_again(
    subject: Subject, reference: Reference, tmp_path: Path
) -> None:
    fault = Fault("replace", 3, KILL)
    assert export(subject, reference.store, tmp_path / "out", "--workers", "1", fault=fault).killed
    there = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.safetensors")}
    assert len(there) == 2
    done = export(subject, reference.store, tmp_path / "out", "--json")
    assert done.code == 0 and json.loads(done.stdout)["resumed_files"] == 2
    assert all(path.stat().st_mtime_ns == when for path, when in there.items())


def test_a_finished_file_that_was_altered_is_written_again(
    subject: Subject, reference: Reference, tmp_path: Path
) -> None:
    fault = Fault("replace", 3, KILL)
    assert export(subject, reference.store, tmp_path / "out", "--workers", "1", fault=fault).killed
    victim = min((tmp_path / "out").glob("*.safetensors"))
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)
    done = export(subject, reference.store, tmp_path / "out", "--json")
    assert done.code == 0 and json.loads(done.stdout)["resumed_files"] == 1
    assert tree(tmp_path / "out") == reference.tree


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_ends_with_code_3_and_goes_on(
    subject: Subject, reference: Reference, tmp_path: Path, call: str
) -> None:
    fault = Fault(call, reference.calls[call] // 2, errno.ENOSPC, lasting=True)
    done = export(subject, reference.store, tmp_path / "out", fault=fault)
    assert done.code == 3 and "free some space and run the same command again" in done.stderr
    assert export(subject, reference.store, tmp_path / "out").code == 0
    assert tree(tmp_path / "out") == reference.tree


def test_what_cannot_begin_leaves_nothing(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = os.statvfs_result((4096, 4096, *[0] * 8))
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        with pytest.raises(OutOfSpaceError, match="are still to be written"):
            dsv4.export(reference.store, tmp_path / name)
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_damage_is_named_and_nothing_is_taken_for_a_checkpoint(
    subject: Subject, reference: Reference, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(reference.store, store)
    for number, victim in enumerate(
        ["layers/3/ffn/experts/w13/codes", "layers/0/attn/wq_a/scales", "embed/weight"]
    ):
        file = next(
            path
            for path in (store / victim).rglob("*")
            if path.suffix != ".json" and path.is_file()
        )
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 3] ^= 0x10
        whole = file.read_bytes()
        file.write_bytes(raw)
        done = export(subject, store, tmp_path / str(number))
        assert done.code == 2, done.stderr
        assert (
            victim in done.stderr.replace("\n", "") and "does not match its checksum" in done.stderr
        )
        assert not (tmp_path / str(number) / CONFIG).exists()
        file.write_bytes(whole)
        assert export(subject, store, tmp_path / str(number)).code == 0
    (store / MARKER).unlink()
    with pytest.raises(StoreError, match=MARKER):
        dsv4.export(store, tmp_path / "out")


def test_refusals(reference: Reference, tmp_path: Path) -> None:
    store = reference.store
    for out in (store, store / "inside", store.parent):
        with pytest.raises(ConfigError, match="overlap"):
            dsv4.export(store, out)
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(ConflictError, match="it is not empty \\(letter\\)"):
        dsv4.export(store, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter"]
    with pytest.raises(ConfigError, match=r"--bf16 \*\.attn\.\* matches no tensor that is NVFP4"):
        dsv4.export(store, tmp_path / "out", bf16=("*.attn.*",))


def test_a_finished_export_is_called_one(
    subject: Subject, reference: Reference, tmp_path: Path
) -> None:
    for code, sentence in ((0, ""), (2, "holds a checkpoint already, as a finished export")):
        done = export(subject, reference.store, tmp_path / "out")
        assert done.code == code and sentence in done.stderr.replace("\n", " ")
    assert tree(tmp_path / "out") == reference.tree


def test_another_export_is_not_continued(
    subject: Subject, reference: Reference, tmp_path: Path
) -> None:
    fault = Fault("replace", 2, KILL)
    assert export(subject, reference.store, tmp_path / "out", fault=fault).killed
    begun = "--experts nvfp4, now it is source; --shard-size 2097152, now it is 4294967296; repeat"
    with pytest.raises(ConflictError, match=f"an unfinished export, begun with {begun} that one"):
        dsv4.export(reference.store, tmp_path / "out", experts="source")
    with pytest.raises(ConflictError, match=r"--bf16 nothing, now it is head\.weight"):
        dsv4.export(reference.store, tmp_path / "out", bf16=("head.weight",), shard_bytes=2 << 20)
    with pytest.raises(ConfigError, match="--shard-size is 0 bytes, expected at least 1"):
        dsv4.export(reference.store, tmp_path / "out", shard_bytes=0)
    with pytest.raises(ConflictError, match="holds no conversion"):
        StoreWriter(tmp_path / "out", {})


MEASURED = """
import sys
from dsv4.bench.lanes import peak_rss
from dsv4.export.engine import export
before = peak_rss()
export(sys.argv[1], sys.argv[2], workers=1)
print(peak_rss() - before)
"""


@pytest.mark.long
@pytest.mark.parametrize("model", ["flash", "pro"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, model: str) -> None:
    """Real widths; an embedding eight times as tall, more experts: the same peak.

    A tile is 8 MiB of float32 and an expert of Pro 33 MiB of codes, which are unpacked once.
    """
    peaks, sizes = [], []
    for vocabulary, experts in ((2048, 6), (16384, 8)):
        source, packed = tmp_path / "source", tmp_path / f"packed-{experts}"
        write_checkpoint(source, fresh_layers(MODELS[model], 1, experts, vocabulary))
        dsv4.convert(source, packed, recipe="native")
        shutil.rmtree(source)
        out = tmp_path / f"out-{experts}"
        command = [sys.executable, "-c", MEASURED, str(packed), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
        sizes.append(sum(path.stat().st_size for path in out.iterdir()))
        shutil.rmtree(packed)
        shutil.rmtree(out)
    print(
        [f"{nbytes >> 20} MiB of {total >> 20}" for nbytes, total in zip(peaks, sizes, strict=True)]
    )
    assert max(peaks) < 256 << 20
    assert sizes[1] > sizes[0] + (200 << 20)
    assert peaks[1] < peaks[0] + (32 << 20)
