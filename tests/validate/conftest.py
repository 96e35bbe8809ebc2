"""Small stores that tests here damage, in copies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dsv4.convert.engine import convert
from dsv4.formats.model.inventory import DraftKind
from tests.conftest import MakeSource
from tests.validate.small import SMALL


@pytest.fixture(scope="session")
def small_source(make_source: MakeSource) -> Path:
    """Not to be written to."""
    return make_source(SMALL, DraftKind.NONE)


@pytest.fixture(scope="session")
def small_standard(small_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, packed by recipe `standard`. Not to be written to."""
    out = tmp_path_factory.mktemp("small") / "standard"
    convert(small_source, out)
    return out


@pytest.fixture(scope="session")
def small_native(small_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It, packed by recipe `native`. Not to be written to."""
    out = tmp_path_factory.mktemp("small") / "native"
    convert(small_source, out, recipe="native")
    return out


@pytest.fixture
def small_copy(small_standard: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(small_standard, tmp_path / "packed"))
