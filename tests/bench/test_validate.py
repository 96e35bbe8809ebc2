"""The validate bench: all its passes are there, and a damaged store makes the pass wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

from click.testing import CliRunner

from dsv4.bench.validate import full_pass
from dsv4.cli import cli

LANES = (
    "plain read",
    "plain read, half the threads",
    "full pass",
    "full pass, XXH3 alone",
)


def test_passes_cold_and_hot(standard_store: Path) -> None:
    passes = full_pass(standard_store, turns=2)
    assert [(one.cold, one.name) for one in passes] == [
        (c, n) for c in (True, False) for n in LANES
    ]
    assert all(one.correct for one in passes)
    assert all(len(one.rates) == 2 and min(one.rates) > 0 for one in passes)
    for cold in (True, False):
        first, second = [one.of_read for one in passes if one.cold is cold][:2]
        assert max(first, second) >= 0.5
        assert max(first, second) <= 1


def test_a_damaged_store_is_called_wrong(standard_store: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(standard_store, tmp_path / "store"))
    with (store / "head/codes/c/0/0").open("r+b") as file:
        file.write(b"\xff\x00\xff")
    done = CliRunner().invoke(cli, ["bench", "validate", str(store), "--turns", "1"])
    assert done.exit_code == 1
    assert done.output.count("WRONG") == 4
    assert done.output.count("right") == 4
