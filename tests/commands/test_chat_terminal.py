"""The chat at a terminal, which is a pseudo-terminal here."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv4.commands.chat_terminal import Writer
from dsv4.runtime.text.pieces import Part

TIMEOUT = 120.0
UP, CTRL_C, CTRL_D = b"\x1b[A", b"\x03", b"\x04"
PASTE, PASTED = b"\x1b[200~", b"\x1b[201~"
READER = """
import json
from dsv4.commands.chat_terminal import open_screen
screen = open_screen(quiet=False)
print("ready", screen.editing, flush=True)
while True:
    try:
        print(json.dumps(screen.read(more=False)), flush=True)
    except EOFError:
        break
    except KeyboardInterrupt:
        print(json.dumps("^C"), flush=True)
"""
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>])")


class Typist:
    """A process whose stdin and stderr are a terminal, and whose stdout is read."""

    def __init__(self, *command: str, colour: bool = True) -> None:
        self._mine, theirs = pty.openpty()
        environment = os.environ | {"TERM": "xterm-256color"}
        environment.pop("NO_COLOR", None)
        if not colour:
            environment["NO_COLOR"] = "1"
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        assert self.process.stdout is not None
        self._out = self.process.stdout.fileno()
        self.raw = {self._mine: b"", self._out: b""}

    def type(self, keys: bytes) -> None:
        """Press keys; a paste is one of many, which nobody waits for."""
        while keys:
            keys = keys[os.write(self._mine, keys[:512]) :]
            self._listen(0.0)

    @property
    def screen(self) -> str:
        """What the terminal was sent, escape sequences left out."""
        return _ESCAPES.sub("", self.raw[self._mine].decode(errors="replace"))

    def forget(self) -> None:
        """What was on the screen so far."""
        self._listen(0.0)
        self.raw[self._mine] = b""

    @property
    def stdout(self) -> str:
        return self.raw[self._out].decode()

    def until(self, text: str, *, on_stdout: bool = False, behind: str = "") -> None:
        """Wait until `text` was written, behind what is on the screen already."""
        end = time.monotonic() + TIMEOUT
        while text not in (self.stdout if on_stdout else self.screen.rpartition(behind or "\0")[2]):
            assert time.monotonic() < end, (text, self.screen, self.stdout)
            if not self._listen(0.2) and self.process.poll() is not None:
                self._listen(0.2)
                assert text in (self.stdout if on_stdout else self.screen), self.screen
                return

    def press_ctrl_d(self) -> None:
        """Until it is seen: pressed between two prompts, it is nobody's."""
        end = time.monotonic() + TIMEOUT
        while self.process.poll() is None:
            assert time.monotonic() < end, self.screen
            self.type(CTRL_D)
            self._listen(0.5)

    def left(self) -> int:
        """The exit code."""
        end = time.monotonic() + TIMEOUT
        while self.process.poll() is None:
            assert time.monotonic() < end, self.screen
            self._listen(0.2)
        self._listen(0.2)
        return self.process.returncode

    def close(self) -> None:
        """Whatever happened, nothing is left."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        os.close(self._mine)

    def _listen(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._mine, self._out], [], [], seconds)
        heard = False
        for one in ready:
            with contextlib.suppress(OSError):  # the terminal's other end is closed
                if piece := os.read(one, 65536):
                    self.raw[one] += piece
                    heard = True
        return heard


@pytest.fixture
def reader() -> Iterator[Typist]:
    """A process that prints what it reads as JSON."""
    typist = Typist("-c", READER)
    try:
        typist.until("ready True", on_stdout=True)
        typist.until("> ")
        yield typist
    finally:
        typist.close()


def _lines(typist: Typist) -> list[str]:
    return [json.loads(line) for line in typist.stdout.splitlines()[1:]]


def test_lines_are_edited_and_remembered(reader: Typist) -> None:
    reader.type(b"helo\x1b[Dl\r")  # left, one letter
    reader.until('"hello"', on_stdout=True)
    reader.type(UP + b" again\r")
    reader.until("again", on_stdout=True)
    reader.type("你好, Grüße\x7f!\r".encode())
    reader.until("!", on_stdout=True)
    assert _lines(reader) == ["hello", "hello again", "你好, Grüß!"]


@pytest.mark.parametrize("marked", [False, True], ids=["typed", "pasted"])
def test_a_long_line_arrives_whole(reader: Typist, marked: bool) -> None:
    """A terminal's own line editor drops all behind the 4,095th byte."""
    text = "".join(f"{n:06d} " for n in range(1072))[:7500]
    keys = text.encode()
    reader.type(PASTE + keys + PASTED if marked else keys)
    reader.type(b"\r")
    reader.until('"', on_stdout=True)
    assert _lines(reader) == [text]


def test_a_paste_of_several_lines_is_one_turn(reader: Typist) -> None:
    reader.type(PASTE + b"def f():\r\n    return 1\n\n\ttail" + PASTED + b"\r")
    reader.until("tail", on_stdout=True)
    assert _lines(reader) == ["def f():\n    return 1\n\n\ttail"]


def test_ctrl_c_drops_the_line_and_ctrl_d_ends_with_a_newline(reader: Typist) -> None:
    reader.type(b"never sent")
    reader.until("never sent")
    reader.forget()
    reader.type(CTRL_C)
    reader.until('"^C"', on_stdout=True)
    reader.until("> ")
    reader.press_ctrl_d()
    assert reader.left() == 0
    assert _lines(reader) == ["^C"]
    assert reader.screen.endswith("\n")


def test_a_chat_at_a_terminal(standard_store: Path) -> None:
    bounds = ("--temperature", "0", "--max-new-tokens", "6", "--device", "cpu")
    chat = Typist("-m", "dsv4", "run", str(standard_store), *bounds)
    try:
        chat.until("loading")  # before torch is there
        chat.until("/help lists the commands")
        assert standard_store.name in chat.screen.partition("/help")[0]
        chat.until("> ")
        chat.type(b"/rest\r")
        chat.until("/rest is not a command; /help lists them")
        chat.forget()
        chat.type(b"Hi\r")
        chat.until("tokens/s")
        chat.until("allows more")
        chat.until("> ", behind="allows more")
        assert chat.stdout.endswith("\n") and "\x1b" not in chat.stdout
        assert b"\x1b[2m6 tokens, " in chat.raw[chat._mine]
        chat.forget()
        chat.type(CTRL_C)
        chat.until("/exit or Ctrl-D leaves")
        chat.until("> ")
        chat.press_ctrl_d()
        assert chat.left() == 0
        assert chat.screen.endswith("\n")
    finally:
        chat.close()


def _attributes(typist: Typist) -> set[bytes]:
    return set(re.findall(rb"\x1b\[([0-9;]*)m", typist.raw[typist._mine]))


def test_no_colour_where_none_is_wanted() -> None:
    quiet = Typist("-c", READER, colour=False)
    try:
        quiet.until(">")
        quiet.type(b"a")
        quiet.until("a")
        shown = _attributes(quiet)
        quiet.forget()
        quiet.type(b"\r")
        quiet.until('"a"', on_stdout=True)
        quiet.until(">")
        quiet.press_ctrl_d()
        assert quiet.left() == 0
        assert shown | _attributes(quiet) <= {b"", b"0"}, "plain, and nothing else"
    finally:
        quiet.close()


def test_ctrl_c_while_weights_load_leaves_the_cursor_visible(
    standard_store: Path, tmp_path: Path
) -> None:
    chat = Typist("-m", "dsv4", "run", str(standard_store))
    try:
        chat.until("loading")
        chat.process.send_signal(signal.SIGINT)
        assert chat.left() == 130
        assert "dsv4: interrupted" in chat.screen
        shown = chat.raw[chat._mine]
        assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l")
    finally:
        chat.close()


def test_reasoning_stands_apart_from_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    writer = Writer()
    for text, reasoning in (("so ", True), ("so", True), ("42", False)):
        writer.show(Part(text, reasoning))
    writer.end()
    assert capsys.readouterr() == ("42\n", "<think>\nso so\n</think>\n")
    writer.show(Part("never finished", reasoning=True))
    writer.end()
    assert capsys.readouterr() == ("", "<think>\nnever finished\n</think>\n")
