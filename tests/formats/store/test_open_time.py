"""Opening the store of a real model costs one document and one stat a file."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv4.convert.plan import Plan
from dsv4.formats.store.reader import PackedStore
from tests.formats.store import flash

LIMIT = 1.0  # times the parsing of that document and a listing of all files; a third was measured
TRIES = 10


@pytest.fixture(scope="module")
def plan() -> Plan:
    return flash.plan()


@pytest.fixture(scope="module")
def store(plan: Plan) -> Iterator[Path]:
    # Sparse files cost no memory, and 8000 small ones are made and removed at once in it.
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(os, "fsync", lambda descriptor: None)  # 7000 of them prove nothing here
        flash.write_sparse(Path(scratch) / "packed", plan)
        yield Path(scratch) / "packed"


def _bare(store: Path) -> float:
    """CPU seconds for the document and the sizes alone."""
    begin = time.process_time()
    assert json.loads((store / "zarr.json").read_bytes())
    assert all(path.lstat() for path in store.rglob("*") if path.name != "zarr.json")
    return time.process_time() - begin


def test_v4_flash_opens_at_once(store: Path, plan: Plan) -> None:
    seconds, bare = [], []
    for _ in range(TRIES):
        begin = time.process_time()
        opened = PackedStore.open(store)
        seconds.append(time.process_time() - begin)
        bare.append(_bare(store))
    assert min(seconds) < LIMIT * min(bare)
    assert len(opened.hierarchy.arrays) > 2000
