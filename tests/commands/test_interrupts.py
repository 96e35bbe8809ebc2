"""Ctrl-C ends `dsv4 run` with 130 at whatever moment it comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dsv4

TIMEOUT = 240
PROMPTLY = 30.0  # seconds; two on an idle machine
ANSWER = ("--prompt", "a", "--max-new-tokens", "4000", "--temperature", "0", "--device", "cpu")
INTERRUPTS_ITSELF = "import signal; signal.raise_signal(signal.SIGINT)\n"
# Ctrl-C after a given time of the process's own, whatever else the machine does.
TIMED = """
import signal, sys
from dsv4 import __main__
signal.signal(signal.SIGVTALRM, lambda number, frame: signal.raise_signal(signal.SIGINT))
signal.setitimer(signal.ITIMER_VIRTUAL, float(sys.argv.pop(1)))
__main__.main()
"""
DESTRUCTOR = """
from dsv4 import interrupts
interrupts.install()
import signal
class Late:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        for _ in range(10):
            pass
Late()
print("went on")
"""


def _path(place: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{place}{os.pathsep}{Path(dsv4.__file__).parent.parent}"}


@pytest.mark.parametrize("module", ["numpy", "torch", "tokenizers", "deepseek_recipe", "click"])
def test_ctrl_c_during_an_import_is_not_lost(
    standard_store: Path, tmp_path: Path, module: str
) -> None:
    """torch drops whatever importing numpy raises; and others may."""
    (tmp_path / f"{module}.py").write_text(INTERRUPTS_ITSELF)
    done = subprocess.run(
        [sys.executable, "-m", "dsv4", "run", str(standard_store), *ANSWER],
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
        env=_path(tmp_path),
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"dsv4: interrupted\n")


@pytest.mark.parametrize(
    "seconds", [0.02, 0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.8, 1.2, 2, 3]
)
def test_ctrl_c_counts_at_every_instant(standard_store: Path, seconds: float) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TIMED, str(seconds), "run", str(standard_store), *ANSWER],
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith(b"dsv4: interrupted\n") and b"Traceback" not in done.stderr


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(standard_store: Path) -> None:
    command = [sys.executable, "-m", "dsv4", "run", str(standard_store), *ANSWER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.read(1)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT)
    assert time.monotonic() - begin < PROMPTLY
    assert process.returncode == 130 and errors.endswith(b"dsv4: interrupted\n")
    assert b"tokens/s" in errors


def test_ctrl_c_in_a_destructor_is_not_lost() -> None:
    done = subprocess.run(
        [sys.executable, "-c", DESTRUCTOR], capture_output=True, timeout=TIMEOUT, check=False
    )
    assert (done.returncode, done.stdout) == (130, b"")


def test_a_background_job_that_ignores_ctrl_c_keeps_ignoring_it() -> None:
    """A shell starts `command &` of a script so."""
    script = "from dsv4 import interrupts; interrupts.install(); import signal; "
    script += "signal.raise_signal(signal.SIGINT); print('alive')"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert (done.returncode, done.stdout) == (0, b"alive\n")
