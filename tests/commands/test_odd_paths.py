"""Every command on a store whose path is not text: bytes that no UTF-8 has, brackets, a newline."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.formats.store.golden import unpack

ODD = b"m\xe8 [v4] [/b]\n'q' $x %s {0}"
CODES = b"/packed/head/codes/c/0/0"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("odd")
    place = os.fsencode(folder) + b"/" + ODD
    Path(os.fsdecode(place)).mkdir(parents=True)
    (unpack(folder) / "source").rename(os.fsdecode(place + b"/source"))
    return place


def _dsv4(*arguments: bytes | str) -> None:
    command = [sys.executable, "-m", "dsv4", *arguments]
    done = subprocess.run(command, capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, (arguments, done.stdout[-500:], done.stderr[-500:])
    assert b"Traceback" not in done.stderr


def test_every_command_works_there(place: bytes) -> None:
    source, packed = place + b"/source", place + b"/packed"
    _dsv4("plan", source)
    _dsv4("convert", "--hf", source, "--out", packed)
    report, page = place + b"/r.json", place + b"/r.html"
    _dsv4("validate", packed, "--source", source, "--json", report, "--html", page)
    assert Path(os.fsdecode(page)).stat().st_size > 1000
    _dsv4("inspect", packed)
    _dsv4("inspect", packed, "norm.weight")
    _dsv4("inspect", packed, "--diff", packed)
    _dsv4("run", packed, "--prompt", "hi", "--max-new-tokens", "1", "--device", "cpu")
    _dsv4("repair", packed)
    codes = Path(os.fsdecode(place + CODES))
    whole = codes.read_bytes()
    codes.write_bytes(b"\0" * len(whole))
    _dsv4("repair", packed, "--source", source)
    assert codes.read_bytes() == whole
