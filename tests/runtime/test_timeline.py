"""The timeline of a start counts from the process's first moment."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv4.runtime import startup_clock

YOUNG = """
import json, time
time.sleep(0.3)
from dsv4.runtime.startup_clock import Timeline
line = Timeline()
line.mark("sleep")
time.sleep(0.2)
line.mark("nap")
line.mark("sleep")
print(json.dumps([line.phases, line.line()]))
"""


def test_phases_count_from_the_process_s_start() -> None:
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", YOUNG], capture_output=True, text=True, timeout=60, check=True
    )
    whole = time.perf_counter() - begin
    phases, text = json.loads(done.stdout)
    assert list(phases) == ["sleep", "nap"]
    assert 0.29 < phases["sleep"] < phases["nap"] - 0.19 < whole  # the clock ticks in hundredths
    assert text.startswith("start   sleep ") and text.endswith(" s after the process's start")


def test_a_system_that_does_not_say_when_counts_from_now(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(startup_clock, "_STATUS", tmp_path / "absent")
    assert startup_clock.process_age() == 0.0
