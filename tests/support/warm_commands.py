"""`dsv4` as a program, started from a warm process: three seconds of imports are paid once.

A server process imports torch and the command line, and forks a child for every command. The child
is a process of its own with streams, arguments, folder and signals as a shell would give it, and
enters where `python -m dsv4` does. What depends on the interpreter's start (encodings of streams,
PYTHONPATH, Ctrl-C during an import) needs a real start instead.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run(
    *arguments: str | Path,
    stdin: bytes = b"",
    environment: Mapping[str, str] | None = None,
    seconds: float = 240,
) -> subprocess.CompletedProcess[bytes]:
    """Run `dsv4 arguments`. environment: what it has besides this process's own.

    Raises subprocess.TimeoutExpired after so many seconds.
    """
    return _server().run([str(one) for one in arguments], stdin, environment or {}, seconds)


@functools.cache
def _server() -> _Server:
    server = _Server()
    atexit.register(server.close)
    return server


class _Server:
    def __init__(self) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="dsv4-commands-")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm_commands", self._scratch.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def run(
        self, arguments: list[str], stdin: bytes, environment: Mapping[str, str], seconds: float
    ) -> subprocess.CompletedProcess[bytes]:
        scratch = Path(self._scratch.name)
        (scratch / "0").write_bytes(stdin)
        request = {
            "arguments": arguments,
            "environment": {**os.environ, **environment},
            "folder": str(Path.cwd()),
            "seconds": seconds,
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        code = json.loads(self._process.stdout.readline())
        if code is None:
            raise subprocess.TimeoutExpired(arguments, seconds)
        out, errors = ((scratch / name).read_bytes() for name in "12")
        return subprocess.CompletedProcess(arguments, code, out, errors)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._scratch.cleanup()


def serve(scratch: Path) -> None:
    """Answer requests, a line each, with the exit code of a child; null for one that hung."""
    import dsv4.cli
    import dsv4.commands.tables
    import dsv4.convert.engine
    import dsv4.runtime.model
    import dsv4.runtime.text.repl
    import dsv4.validate.engine  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            _child(request, scratch)
        print(json.dumps(_exit_code(child, request["seconds"])), flush=True)


def _exit_code(child: int, seconds: float) -> int | None:
    ended = os.pidfd_open(child)
    try:
        if not select.select([ended], [], [], seconds)[0]:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
    finally:
        os.close(ended)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _child(request: dict[str, Any], scratch: Path) -> None:
    code = 1
    try:
        _redirect(scratch)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.argv = ["dsv4", *request["arguments"]]
        runpy.run_module("dsv4", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _redirect(scratch: Path) -> None:
    """Streams of the child: stdin from a file, the others into files."""
    for descriptor in (0, 1, 2):
        flags = os.O_RDONLY if descriptor == 0 else os.O_CREAT | os.O_TRUNC | os.O_WRONLY
        file = os.open(scratch / str(descriptor), flags)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
