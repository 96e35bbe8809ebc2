"""Where a conversion's time goes: stages are exclusive, and watching leaves nothing behind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
from click.testing import CliRunner

from benchmarks.__main__ import benchmarks
from benchmarks.stages import STAGES, watch
from dsv4.convert.engine import convert


def test_stages_are_exclusive_and_leave_nothing_behind(tiny_source: Path, tmp_path: Path) -> None:
    fsync = os.fsync
    with watch() as seconds:
        assert os.fsync is not fsync
        convert(tiny_source, tmp_path / "out", "native", 1)
    assert os.fsync is fsync
    assert seconds["read"].wall > 0 and seconds["sync"].calls > 10
    assert sum(s.cpu for s in seconds.values()) < 3 * sum(s.wall for s in seconds.values())


def test_the_command_shows_every_stage_and_removes_the_store(
    tiny_source: Path, tmp_path: Path
) -> None:
    arguments = ["stages", str(tiny_source), "--dir", str(tmp_path), "--workers", "1"]
    shown = CliRunner().invoke(benchmarks, arguments)
    assert shown.exit_code == 0, shown.output
    assert all(stage in shown.output for stage in STAGES)
    found = json.loads(CliRunner().invoke(benchmarks, [*arguments, "--json"]).stdout)
    busy = {stage for stage, spent in found.items() if spent["cpu"] > 0 and spent["calls"] > 0}
    assert {"read", "hash source", "cast and layout", "write", "sync"} <= busy
    assert list(tmp_path.iterdir()) == []


def test_every_command_says_what_it_does() -> None:
    for name, command in benchmarks.commands.items():
        assert isinstance(command, click.Command)
        shown = CliRunner().invoke(benchmarks, [name, "--help"])
        assert shown.exit_code == 0 and (command.help or "").split("\n")[0][:40] in shown.output


def test_a_wrong_number_of_rows_is_refused() -> None:
    failed = CliRunner().invoke(benchmarks, ["kernels", "--rows", "1,2048"])
    assert failed.exit_code == 2
    assert "2048 in '1,2048', expected at least 1 and at most 8" in failed.output
