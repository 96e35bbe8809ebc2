"""Stores that the loader's tests read; those that damage one copy it first."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dsv4.formats.store.reader import PackedStore
from tests.formats.store import packing


@pytest.fixture(scope="session")
def sample_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One array of every kind. Not to be written to."""
    out = tmp_path_factory.mktemp("sample") / "packed"
    packing.write(out)
    return out


@pytest.fixture
def sample(sample_path: Path) -> PackedStore:
    """It, opened."""
    return PackedStore.open(sample_path)


@pytest.fixture
def mutable(sample_path: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(sample_path, tmp_path / "packed"))
