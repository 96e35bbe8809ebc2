"""Conversions that go wrong on purpose: the real command line, killed or refused by its disk.

A server process imports everything once and forks a child for every command; the child counts what
it asks of the operating system and, at a chosen call, dies or gets an error instead. Nothing here
loses power, so a child may be told to skip its syncs, which are most of a small conversion's time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CALLS = (
    "pwrite",
    "write",
    "preadv",
    "fdatasync",
    "fsync",
    "replace",
    "unlink",
    "mkdir",
    "posix_fallocate",
    "ftruncate",
)
SYNCS = ("fdatasync", "fsync")
READ_BACK = "read_back"  # preadv of what was written, as opposed to the source
ANY = "any"
KILL, KILL_AFTER, INTERRUPT, TERMINATE = "kill", "kill after", "interrupt", "terminate"
COMMIT_BYTES = 1 << 16  # commits, completions and resumptions come often


@dataclasses.dataclass(frozen=True)
class Fault:
    """At the `nth` call (from 1) of `call`, do this: kill, or fail with an errno.

    lasting: and at every later one.
    """

    call: str
    nth: int
    do: str | int
    lasting: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended; code: as in subprocess. calls: how many there were, if it lived."""

    code: int
    stdout: str
    stderr: str
    calls: dict[str, int]

    @property
    def killed(self) -> bool:
        """Whether it died by SIGKILL."""
        return self.code == -signal.SIGKILL


class Subject:
    """The command line, one process a command, forked from a warm one."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.convert.faults", str(scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()

    def run(
        self,
        *args: str | Path,
        fault: Fault | None = None,
        seconds: float | None = None,
        sync: bool = False,
    ) -> Outcome:
        """Run `dsv4 args`. seconds: kill it after so many. sync: whether syncs are real."""
        request = {
            "args": [str(arg) for arg in args],
            "fault": None if fault is None else dataclasses.asdict(fault),
            "seconds": seconds,
            "sync": sync,
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        code = int(self._server.stdout.readline())
        calls = self._scratch / "calls"
        return Outcome(
            code,
            (self._scratch / "1").read_text(),
            (self._scratch / "2").read_text(),
            json.loads(calls.read_text()) if calls.exists() else {},
        )


class _Counted:
    """Replaces the functions of `os` by ones that count, and that fail when the time has come."""

    def __init__(self, fault: Fault | None, sync: bool) -> None:
        self._fault = fault
        self._lock = threading.Lock()
        self.calls: Counter[str] = Counter()
        for name in CALLS:
            original: Callable[..., Any] = getattr(os, name)
            real = original if sync or name not in SYNCS else _nothing
            setattr(os, name, functools.partial(self._call, name, real))

    def _call(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if name == "preadv" and _is_partial(args[0]):
            name = READ_BACK
        do = self._due(name)
        if do is None:
            return original(*args, **kwargs)
        if do == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        if isinstance(do, int):
            raise OSError(do, os.strerror(do))
        result = original(*args, **kwargs)
        signals = {INTERRUPT: signal.SIGINT, TERMINATE: signal.SIGTERM}
        os.kill(os.getpid(), signals.get(do, signal.SIGKILL))
        return result

    def _due(self, name: str) -> str | int | None:
        """What to do instead of this call, or after it."""
        with self._lock:
            self.calls[name] += 1
            self.calls[ANY] += 1
            if self._fault is None or self._fault.call not in (name, ANY):
                return None
            count = self.calls[self._fault.call]
            due = count == self._fault.nth or (self._fault.lasting and count > self._fault.nth)
            return self._fault.do if due else None


def _is_partial(descriptor: int) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").readlink().suffix == ".partial"


def _nothing(*args: Any) -> None:
    """A sync that is left out."""


def serve(scratch: Path) -> None:
    """Answer requests, a line each, with the exit code of a child."""
    import dsv4.cli
    import dsv4.commands.tables
    import dsv4.convert.engine
    import dsv4.validate.engine
    from dsv4.convert import estimate, pipeline

    pipeline.COMMIT_BYTES = COMMIT_BYTES
    estimate.METADATA_BYTES_PER_FILE = 0  # so that a disk can be full in spite of the forecast
    for line in sys.stdin:
        request = json.loads(line)
        with contextlib.suppress(FileNotFoundError):
            (scratch / "calls").unlink()
        child = os.fork()
        if not child:
            _child(request, scratch, dsv4.cli.main)
        if (seconds := request["seconds"]) is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)


def _child(request: dict[str, Any], scratch: Path, main: Callable[[], None]) -> None:
    for descriptor in (1, 2):
        file = os.open(scratch / str(descriptor), os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(file, descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["dsv4", *request["args"]]
    fault = None if request["fault"] is None else Fault(**request["fault"])
    counted = _Counted(fault, request["sync"])
    code = 99
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 98
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        (scratch / "calls").write_text(json.dumps(counted.calls))
        os._exit(code)


def scatter(source: Path, target: Path, files: int) -> None:
    """The same checkpoint cut into `files` elsewhere: an expert's tensors lie in several."""
    from safetensors.torch import load_file, save_file

    tensors: dict[str, Any] = {}
    for shard in sorted(source.glob("*.safetensors")):
        tensors |= load_file(shard)
    target.mkdir()
    for path in _others(source):
        (target / path.name).write_bytes(path.read_bytes())
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        own = names[number::files]
        save_file({name: tensors[name] for name in own}, target / file)
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


def _others(source: Path) -> Iterator[Path]:
    for path in source.iterdir():
        if "safetensors" not in path.name:
            yield path


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
