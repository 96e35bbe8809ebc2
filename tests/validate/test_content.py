"""The full pass: every byte once, on any number of threads, and each kind of impossible value."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import dsv4
from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.store.manifest import FileRecord
from dsv4.formats.store.reader import PackedStore
from dsv4.validate.checks.content import PIECE_BYTES, scan_files
from dsv4.validate.checks.value_ranges import Judge, judges
from dsv4.validate.report import Report
from dsv4.validate.watch import Watch
from tests.formats.store import flash

QUICK = 4.0  # times what a bare look at every file takes; about 1.5 was measured


@pytest.fixture
def store(standard_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(standard_store, tmp_path / "store"))


def _facts(report: Report) -> dict[str, object]:
    return {k: v for k, v in report.to_dict().items() if k != "seconds"}


def test_threads_change_nothing(store: Path) -> None:
    for key in ("head/codes/c/0/0", "norm/weight/c/0", "embed/weight/c/0/0"):
        raw = bytearray((store / key).read_bytes())
        raw[7] ^= 1
        (store / key).write_bytes(raw)
    one, four = (dsv4.validate(store, workers=n) for n in (1, 4))
    assert _facts(one) == _facts(four)
    assert len(one.findings) == 3


def test_every_byte_is_read_once(standard_store: Path) -> None:
    report = dsv4.validate(standard_store)
    files = PackedStore.open(standard_store).files_under(None)
    assert report.bytes_read == sum(file.nbytes for file in files)
    assert report.checks["file hashes"] == len(files)
    assert report.checksums == "blake3"


def _forge(store: PackedStore, key: str) -> None:
    """A manifest that names another BLAKE3 for a file; its XXH3 digests stay true."""
    record = store.records[key]
    forged = FileRecord(record.nbytes, "0" * 64, record.chunk_nbytes, record.xxh3)
    store.records = {**store.records, key: forged}


def test_only_blake3_is_proof_and_the_report_says_which_was_computed(standard_store: Path) -> None:
    packed = dsv4.open(standard_store)
    _forge(packed.store, "head/codes/c/0/0")
    full = dsv4.validate(packed)
    assert ("hashes", "head/codes/c/0/0") in {(f.check, f.where) for f in full.findings}
    fast = dsv4.validate(packed, checksums="xxh3")
    assert "hashes" not in {finding.check for finding in fast.findings}
    assert fast.checksums == fast.to_dict()["checksums"] == "xxh3"
    assert "file hashes" not in fast.checks


VALUES = {
    "NaN among FP8 codes": ("layers/3/attn/wq_b/codes", "u1", 0xFF, "its codes hold E4M3 NaN"),
    "NaN among E8M0 scales": ("layers/3/attn/wq_b/scales", "u1", 0xFF, "scales hold E8M0 NaN"),
    "NaN among block scales": ("head/scales", "u1", 0x7F, "its block scales hold NaN"),
    "negative block scale": ("head/scales", "u1", 0x81, "block scales hold a negative value"),
    "minus zero": ("head/scales", "u1", 0x80, "block scales hold a negative value"),
    "no global scale": ("head/global_scale", "<f4", 0.0, "global scales are not finite and"),
    "infinite global scale": ("head/global_scale", "<f4", np.inf, "are not finite and positive"),
    "negative global scale": ("head/global_scale", "<f4", -1.0, "are not finite and positive"),
    "NaN in a norm": ("norm/weight", "<u2", 0x7FC0, "holds NaN or infinity"),
    "infinity in a norm": ("norm/weight", "<u2", 0xFF80, "holds NaN or infinity"),
    "NaN in a bias": ("layers/2/ffn/gate/bias", "<f4", np.nan, "holds NaN or infinity"),
    "no such expert": ("layers/0/ffn/gate/tid2eid", "<i8", 8, "names an expert that does not"),
    "negative expert": ("layers/0/ffn/gate/tid2eid", "<i8", -1, "names an expert that does not"),
}


@pytest.mark.parametrize("case", VALUES)
def test_impossible_values_are_named(store: Path, case: str) -> None:
    """The last element of the array: rules see every piece to its end."""
    path, dtype, value, what = VALUES[case]
    packed = dsv4.open(store)
    file = packed.store.array(path).files[-1]
    raw = np.fromfile(store / file.key, np.uint8)
    payload = raw[: file.payload_nbytes].view(dtype)
    judged = judges(packed)[file.key]
    assert judged.broken_by(raw[: file.payload_nbytes]) == set()
    payload[-1] = value
    raw.tofile(store / file.key)
    (found,) = scan_files(
        packed.store, [file], {file.key: judged}, workers=1, proof=True, watch=Watch()
    )
    assert found.problems
    (broken,) = found.broken
    assert what in broken


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, 2 * PIECE_BYTES + 5])
def test_files_of_any_length_are_read_to_their_end(tmp_path: Path, size: int) -> None:
    from dsv4.validate.checks.content import _pieces

    raw = np.random.default_rng(size).integers(256, size=size, dtype=np.uint8)
    raw.tofile(tmp_path / "file")
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        assert b"".join(piece.tobytes() for piece in _pieces(descriptor, size)) == raw.tobytes()
    finally:
        os.close(descriptor)


def test_a_link_is_not_followed_and_a_lost_file_is_a_finding(store: Path) -> None:
    packed = dsv4.open(store)
    norm = packed.store.files_under("norm/weight")
    (store / "norm").rename(store.parent / "norm")
    (store / "norm").symlink_to(store.parent / "norm")
    (found,) = scan_files(packed.store, norm, {}, workers=1, proof=True, watch=Watch())
    assert "symbolic link" in found.problems[0][1]
    head = packed.store.files_under("head/codes")
    (store / head[0].key).unlink()
    (found,) = scan_files(
        packed.store, head, {head[0].key: Judge("head")}, workers=1, proof=True, watch=Watch()
    )
    assert "cannot be read" in found.problems[0][1]


@pytest.fixture(scope="module")
def sparse_flash() -> Iterator[Path]:
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(os, "fsync", lambda descriptor: None)  # 7000 of them prove nothing here
        flash.write_sparse(Path(scratch) / "packed", flash.plan())
        yield Path(scratch) / "packed"


def _bare_look(store: Path) -> float:
    """CPU seconds for the size of every file of `store`, and the parsing of its JSON."""
    begin = time.process_time()
    for path in store.rglob("*"):
        assert path.lstat().st_size >= 0
        if path.suffix == ".json":
            assert json.loads(path.read_bytes())
    return time.process_time() - begin


def test_quick_costs_little_more_than_a_look_at_every_file_of_flash(sparse_flash: Path) -> None:
    seconds, bare = [], []
    for _ in range(5):
        begin = time.process_time()
        report = dsv4.validate(sparse_flash, quick=True)
        seconds.append(time.process_time() - begin)
        assert report.ok, report.findings[:3]
        bare.append(_bare_look(sparse_flash))
    assert report.checks["files present at their size"] > 3000
    assert report.checks["tensors of the model's inventory"] > 30000
    assert PackedCheckpoint.open(sparse_flash).config.num_hidden_layers == 43
    assert min(seconds) < QUICK * min(bare)
