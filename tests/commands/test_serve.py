"""`dsv4 serve` as a process: what it says, whom it lets in, how it ends."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner

from dsv4.cli import cli

ASK = {"messages": [{"role": "user", "content": "hi"}], "reasoning_effort": "none"}


class Process:
    """One `dsv4 serve`; url: once it answers."""

    def __init__(self, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "dsv4", "serve", *arguments, "--port", "0"]
        self.process = subprocess.Popen(
            [*map(str, command), "--device", "cpu"],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, pattern: str) -> str:
        """The first group of a line."""
        for _ in range(1200):
            for line in list(self.lines):
                if found := re.fullmatch(pattern, line):
                    return found[1]
            assert self.process.poll() is None, self.lines
            time.sleep(0.05)
        pytest.fail(f"no line {pattern}: {self.lines}")

    @property
    def url(self) -> str:
        """Where it answers."""
        return self.wait_for(r"listening on (http://127\.0\.0\.1:\d+)")

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Its exit code."""
        self.process.send_signal(number)
        code = self.process.wait(60)
        self._reader.join(10)
        return code


@contextlib.contextmanager
def serving(*arguments: str | Path) -> Iterator[Process]:
    started = Process(*arguments)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.wait()
        started._reader.join(10)
        assert started.process.stdout and started.process.stderr
        assert started.process.stdout.read() == ""  # nothing but data goes to stdout
        started.process.stdout.close()
        started.process.stderr.close()


def test_a_store_is_served_and_sigterm_finishes_what_runs(standard_store: Path) -> None:
    with serving(standard_store, "--served-name", "a", "--served-name", "b") as started:
        loading = started.wait_for(r"loading .*; (http\S+)/ready shows how far it is")
        url = started.url
        assert loading == url
        models = httpx2.get(f"{url}/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["a", "b"]
        body = ASK | {"model": "b", "seed": 3, "max_tokens": 12, "ignore_eos": True}
        whole, again = (_ask(url, body) for _ in range(2))
        assert whole["choices"][0]["message"] == again["choices"][0]["message"]
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body | stream) as answer:
            lines = answer.iter_lines()
            next(lines)
            started.process.send_signal(signal.SIGTERM)
            data = [line[6:] for line in lines if line.startswith("data: ")]
        assert data[-1] == "[DONE]"
        assert json.loads(data[-2])["usage"]["completion_tokens"] == 12
        assert started.process.wait(60) == 0
        records = [json.loads(line) for line in started.lines if line.startswith("{")]
        assert {record["status"] for record in records if "status" in record} == {200}
        notes = [record["note"] for record in records if record.get("event") == "prefix"]
        assert "nothing like it is remembered" in notes[0] and len(notes) == 3


def _ask(url: str, body: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    return answer


def test_sigterm_while_nothing_runs_and_ctrl_c(standard_store: Path) -> None:
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        with serving(standard_store, "--quiet") as started:
            assert httpx2.get(f"{started.url}/ready").status_code == 200
            assert started.end(number) == code
            assert not any(line.startswith("{") for line in started.lines)


def test_what_does_not_end_in_time_is_told_so(standard_store: Path) -> None:
    with serving(standard_store, "--grace", "0.1", "--max-seq-len", "16000") as started:
        body = ASK | {"stream": True, "max_tokens": 15000, "ignore_eos": True}
        with httpx2.stream(
            "POST", f"{started.url}/v1/chat/completions", json=body, timeout=60
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            started.process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
        assert "the server is ending" in last
        assert started.process.wait(60) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--host", "0.0.0.0"), "give one, or --no-auth"),
        (("--api-key", " "), "the key is empty"),
        (("--port", "70000"), "70000 is not in the range"),
        (("--host", "203.0.113.7", "--no-auth"), "cannot be listened on"),
        (("--host", "a..b", "--no-auth"), "cannot be listened on"),
    ],
)
def test_what_is_refused_before_anything_is_loaded(
    standard_store: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dsv4", "serve", str(standard_store), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr


def test_a_key_may_come_from_the_environment(standard_store: Path) -> None:
    done = CliRunner().invoke(
        cli, ["serve", str(standard_store), "--host", "203.0.113.7"], env={"DSV4_API_KEY": "k"}
    )
    assert "cannot be listened on" in str(done.exception)  # past the question for a key
