"""The same units on a dask cluster: two workers on loopback, one of them killed half-way."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import dsv4
from dsv4.convert import cluster
from dsv4.formats.errors import ChangedSourceError, ClusterError, ConfigError
from dsv4.formats.store.specs import JOURNAL, MARKER
from dsv4.synthetic.tiny import TINY, write_tiny

pytest.importorskip("distributed")

MANY_FILES = dataclasses.replace(TINY, num_hidden_layers=8, compress_ratios=(0, 0, 4, 128) * 2)
PYTHON = [sys.executable, "-W", "ignore"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cluster") / "checkpoint"
    write_tiny(out, MANY_FILES)
    return out


@contextlib.contextmanager
def process(*arguments: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as stream:
        running = subprocess.Popen(
            [*PYTHON, *arguments], stdout=stream, stderr=subprocess.STDOUT, env=ENVIRONMENT
        )
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            running.send_signal(signal.SIGCONT)
        running.kill()
        running.wait(timeout=20)


def wait_for(what: str, log: Path, seconds: float = 60) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if match := re.search(what, log.read_text(errors="replace")):
            return match[0]
        time.sleep(0.05)
    raise AssertionError(f"{what} did not appear: {log.read_text(errors='replace')[-2000:]}")


@contextlib.contextmanager
def scheduler(tmp_path: Path) -> Iterator[str]:
    log = tmp_path / "scheduler.log"
    options = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--no-show")
    with process("-m", "distributed.cli.dask_scheduler", *options, log=log):
        yield wait_for(r"tcp://127\.0\.0\.1:\d+", log)


@contextlib.contextmanager
def worker(tmp_path: Path, address: str, name: str) -> Iterator[subprocess.Popen[bytes]]:
    log = tmp_path / f"{name}.log"
    options = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--name", name)
    place = ("--local-directory", str(tmp_path / "scratch"))
    with process("-m", "distributed.cli.dask_worker", address, *options, *place, log=log) as it:
        wait_for("Registered to|Starting established connection", log)
        yield it


def journal_lines(out: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (out / JOURNAL).read_bytes().count(b"\n")
    return 0


def test_two_workers_one_killed_give_the_same_root(checkpoint: Path, tmp_path: Path) -> None:
    expected = dsv4.convert(checkpoint, tmp_path / "here").root
    out, log = tmp_path / "there", tmp_path / "convert.log"
    with (
        scheduler(tmp_path) as address,
        worker(tmp_path, address, "first"),
        worker(tmp_path, address, "second") as second,
    ):
        command = ["-m", "dsv4", "convert", "--hf", str(checkpoint), "--out", str(out)]
        with process(*command, "--scheduler", address, "--json", log=log) as driver:
            end = time.monotonic() + 60
            while journal_lines(out) < 2 and time.monotonic() < end:
                time.sleep(0.005)
            second.send_signal(signal.SIGSTOP)  # whatever it was doing, it stays half done
            assert not (out / MARKER).exists()
            time.sleep(0.3)
            second.kill()
            assert driver.wait(timeout=120) == 0, log.read_text()
    assert json.loads(log.read_text().partition("\n{\n")[2].join("{}")[:-1])["root"] == expected
    assert dsv4.validate(out, source=checkpoint).ok


def test_what_goes_wrong_on_a_worker_is_said_here(checkpoint: Path, tmp_path: Path) -> None:
    with scheduler(tmp_path) as address, worker(tmp_path, address, "only"):
        damaged = tmp_path / "damaged"
        write_tiny(damaged, dataclasses.replace(TINY, num_hidden_layers=2, compress_ratios=(0, 4)))
        shard = next(damaged.glob("*00002*.safetensors"))
        raw = bytearray(shard.read_bytes())
        entry = _scale_of_an_expert(damaged)
        raw[entry] = 255  # E8M0's NaN
        shard.write_bytes(raw)
        with pytest.raises(dsv4.Dsv4Error, match=r"experts\.\d+\.w[123]\.weight: the E8M0 scale"):
            dsv4.convert(damaged, tmp_path / "packed", scheduler=address)


def _scale_of_an_expert(directory: Path) -> int:
    from dsv4.convert.sources.local import LocalSource

    entries = LocalSource(directory).entries
    return next(e.begin for n, e in entries.items() if n.startswith("layers.0") and "w1.scale" in n)


def test_no_scheduler_is_said_at_once(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "SECONDS_TO_CONNECT", 1)
    with pytest.raises(ClusterError, match="no dask scheduler answers at tcp://127"):
        dsv4.convert(checkpoint, tmp_path / "out", scheduler="tcp://127.0.0.1:9")


def test_without_dask_nothing_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r"--scheduler needs dask: pip install 'dsv4\[cluster\]'"):
        dsv4.convert(checkpoint, tmp_path / "out", scheduler="tcp://127.0.0.1:9")
    assert not (tmp_path / "out").exists()


def test_errors_survive_the_way_back() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(ChangedSourceError("a.safetensors", "it changed")))
    assert (str(error), error.file) == ("it changed", "a.safetensors")
