"""`dsv4 push` and `dsv4 pull` as programs: killed, interrupted, and what they print."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import dsv4
from tests.convert.hub.loopback import FOREVER, TOKEN, Answer, stalls
from tests.formats.store.packing import tree
from tests.sharing.hub import REPO, SharingHub

CODES = "layers/1/ffn/experts/w13/codes/c/0/0/0"
TIMEOUT = 120
PROMPTLY = 2.0 if (os.cpu_count() or 1) > 4 else 8.0  # of two cores, others may have both
OFTEN = """
import os, sys
from dsv4.sharing import push, transfer
transfer.COMMIT_BYTES, push.COMMIT_FILES = 1, 40
os.fsync = os.fdatasync = lambda descriptor: None
from dsv4 import __main__
__main__.main()
"""

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(hub: SharingHub, tmp_path: Path) -> Start:
    """Starts the command line in a process of its own, with small commits."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "DO_NOT_TRACK": "1",
    }

    def run(*arguments: str | Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", OFTEN, *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe)

    return run


def finished(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    out, errors = process.communicate(timeout=TIMEOUT)
    assert b"Traceback" not in errors, errors
    return process.returncode, out.decode(), errors.decode()


def kills(found: list[subprocess.Popen[bytes]]) -> Callable[[Answer], object]:
    return lambda answer: found[0].kill()


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def interrupted(process: subprocess.Popen[bytes]) -> str:
    """Ctrl-C; -> what it said on stderr."""
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, _, errors = finished(process)
    assert time.monotonic() - begin < PROMPTLY
    assert code == 130 and errors.endswith("dsv4: interrupted\n")
    return errors


def test_push_and_pull_print_one_document(
    hub: SharingHub, shared_store: Path, start: Start, tmp_path: Path
) -> None:
    code, out, errors = finished(start("push", shared_store, REPO, "--json"))
    assert code == 0, errors
    pushed = json.loads(out)
    assert [json.loads(line)["event"] for line in errors.splitlines()][-1] == "progress"
    root = dsv4.open(shared_store).store.manifest["root"]
    pin = ("--root", root[:20])
    code, out, errors = finished(start("pull", REPO, tmp_path / "out", *pin, "--json"))
    assert code == 0, errors
    pulled = json.loads(out)
    assert pushed["root"] == pulled["root"] == root and pulled["root_pinned"]
    last = json.loads(errors.splitlines()[-1])
    assert last["done_bytes"] == last["total_bytes"]
    assert tree(tmp_path / "out") == tree(shared_store)
    code, out, errors = finished(start("pull", REPO, tmp_path / "out"))
    assert code == 0 and root in out and "not compared" in out


def test_a_pull_that_is_killed_goes_on(
    published: SharingHub, shared_store: Path, start: Start, tmp_path: Path
) -> None:
    running: list[subprocess.Popen[bytes]] = []
    published.faults.plant(kills(running), skip=80)
    running.append(start("pull", REPO, tmp_path / "out"))
    assert running[0].wait(TIMEOUT) == -signal.SIGKILL
    running[0].communicate()
    code, out, errors = finished(start("pull", REPO, tmp_path / "out", "--json"))
    assert code == 0, errors
    done = json.loads(out)
    assert 0 < done["fetched_bytes"] < done["bytes"]
    assert tree(tmp_path / "out") == tree(shared_store)


def test_a_push_that_is_killed_goes_on(
    hub: SharingHub, shared_store: Path, start: Start, tmp_path: Path
) -> None:
    running: list[subprocess.Popen[bytes]] = []
    hub.faults.plant(kills(running), file="upload", skip=60)
    running.append(start("push", shared_store, REPO))
    assert running[0].wait(TIMEOUT) == -signal.SIGKILL
    running[0].communicate()
    code, _, errors = finished(start("pull", REPO, tmp_path / "out"))
    assert code == 2 and "is not a packed store" in errors
    code, out, errors = finished(start("push", shared_store, REPO, "--json"))
    assert code == 0, errors
    done = json.loads(out)
    assert 0 < done["uploaded_bytes"] < done["bytes"]
    assert {k: hub.head[k] for k in tree(shared_store)} == tree(shared_store)


def test_ctrl_c_ends_a_pull_whose_reader_hangs(
    published: SharingHub, shared_store: Path, start: Start, tmp_path: Path
) -> None:
    published.faults.plant(stalls(100, 15.0), file=CODES, times=FOREVER)
    process = start("pull", REPO, tmp_path / "out")
    wait_for(lambda: bool(published.ranges(CODES)))
    said = interrupted(process)
    assert "nothing finished is lost; run the same command again to continue" in said
    published.faults._planted.clear()
    code, _, errors = finished(start("pull", REPO, tmp_path / "out"))
    assert code == 0, errors
    assert tree(tmp_path / "out") == tree(shared_store)


def test_ctrl_c_ends_a_push_whose_upload_hangs(
    hub: SharingHub, shared_store: Path, start: Start
) -> None:
    hub.faults.plant(stalls(None, 15.0), file="upload", times=FOREVER)
    process = start("push", shared_store, REPO)
    wait_for(lambda: any(request.file == "upload" for request in hub.requests))
    assert "run the same command again to continue" in interrupted(process)


def test_exit_codes_say_what_would_help(
    published: SharingHub, start: Start, tmp_path: Path
) -> None:
    code, _, errors = finished(start("pull", REPO, tmp_path / "out", "--root", "0" * 64))
    assert code == 2 and "nothing was fetched" in errors
    code, _, errors = finished(start("pull", "./here", tmp_path / "out"))
    assert code == 2 and errors.startswith("dsv4: ")
    code, _, errors = finished(start("push", tmp_path, REPO))
    assert code == 2 and "is not a packed checkpoint" in errors
    code, _, errors = finished(start("push", tmp_path, REPO, "--private"))
    assert code == 2 and "--private is for a repository that --create makes" in errors
