"""Nobody waits in silence: what is waited for is said, to a caller's hook and on stderr."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsv4.convert.sources.http import BrokenError, Patience
from dsv4.formats.errors import NetworkError
from tests.convert.hub.conftest import Open, Waits
from tests.convert.hub.loopback import FOREVER, NOWHERE, Loopback, says

SHARD = "model-00002-of-00004.safetensors"


def test_each_wait_is_said_before_it(waits: Waits) -> None:
    said: list[tuple[str, float]] = []
    patience = Patience(sleep=waits, on_wait=lambda *told: said.append(told))
    waits.meanwhile = lambda: said.append(("slept", waits.seconds[-1]))

    def attempt() -> None:
        raise BrokenError("the answer was 503", 4.0 if len(waits.seconds) == 2 else None)

    with pytest.raises(NetworkError, match=r"\(6 failures in a row\)"):
        patience.persist("a/b", attempt)
    sentences, sleeps = said[::2], said[1::2]
    assert [seconds for _, seconds in sentences] == waits.seconds == [s for _, s in sleeps]
    assert {what for what, _ in sleeps} == {"slept"}
    for number, (sentence, seconds) in enumerate(sentences, 2):
        expected = f"a/b: the answer was 503; try {number} of 6 in {max(seconds, 1):.0f} s"
        assert sentence == expected
    assert sentences[2][1] == 4


def test_opening_and_reading_are_told_of(hub: Loopback, opened: Open, patience: Patience) -> None:
    said: list[str] = []
    brief = dataclasses.replace(patience, first_wait=0.001)
    hub.faults.plant(says(503), host="api", times=2)
    source = opened(patience=brief, on_wait=said.append)
    assert len(said) >= 1
    assert said[0].startswith(f"{hub.repo}: the answer of 127.0.0.1:")
    later: list[str] = []
    source.on_wait = later.append  # as a bar that is shown from now on
    hub.faults.plant(says(503), file=SHARD)
    source.read_into(SHARD, 0, memoryview(bytearray(10)), "x")
    assert len(later) == 1
    assert later[0].startswith(f"{hub.repo}/{SHARD}: the answer of ")
    source.on_wait = None
    hub.faults.plant(says(503), file=SHARD)
    source.read_into(SHARD, 0, memoryview(bytearray(10)), "x")


def test_threads_that_wait_at_once_say_so_once(
    hub: Loopback, opened: Open, patience: Patience
) -> None:
    said: list[str] = []
    source = opened(patience=dataclasses.replace(patience, first_wait=60.0), on_wait=said.append)
    hub.faults.plant(says(503), file=SHARD, times=8)
    begin = threading.Barrier(8)

    def read(_: int) -> None:
        begin.wait()
        source.read_into(SHARD, 0, memoryview(bytearray(10)), "x")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    assert len(said) == 1


# As processes of their own

PROGRAM = """
from dsv4.convert.sources.http import Patience
Patience._wait = lambda *_: 0.001
from dsv4.cli import main
main()
"""


def _dsv4(tmp_path: Path, endpoint: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "DO_NOT_TRACK": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_command_without_a_network_says_so_and_ends_with_4(tmp_path: Path) -> None:
    done = _dsv4(tmp_path, NOWHERE, "convert", "--hf", "some-org/some-model", "--out", "x")
    assert done.returncode == 4, done.stderr
    *waiting, last = done.stderr.splitlines()
    assert len(waiting) == 5
    for number, line in enumerate(waiting, 2):
        assert line.startswith("waiting: some-org/some-model: no connection to 127.0.0.1:9: ")
        assert line.endswith(f"; try {number} of 6 in 1 s")
    assert last.startswith("dsv4: some-org/some-model cannot be read: no connection to 127.0.0.1:9")
    assert (done.stdout, (tmp_path / "x").exists()) == ("", False)


def test_an_outage_in_the_middle_ends_with_4(hub: Loopback, tmp_path: Path) -> None:
    hub.faults.plant(says(503), file=SHARD, skip=1, times=FOREVER)
    done = _dsv4(tmp_path, hub.endpoint, "convert", "--hf", hub.repo, "--out", "x", "--json")
    assert done.returncode == 4, done.stderr
    *lines, last = done.stderr.splitlines()
    assert last.startswith(f"dsv4: {hub.repo}/{SHARD} cannot be read: the answer of 127.0.0.1:")
    events = [json.loads(line) for line in lines if not line.startswith("note: ")]
    waiting = [event["message"] for event in events if event["event"] == "waiting"]
    assert len(waiting) == 5
    assert all(SHARD in message for message in waiting)


def test_what_the_user_can_mend_ends_with_2(hub: Loopback, tmp_path: Path) -> None:
    hub.faults.plant(says(403), host="api")
    done = _dsv4(tmp_path, hub.endpoint, "plan", hub.repo)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
