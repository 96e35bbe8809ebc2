"""The chat loop: lines and commands in, answers out. What a terminal is, `Screen` says.

A turn is one line, or several: a line that ends in a backslash goes on in the next one, and a block
stands between marks of three quotation marks. A line that begins with a slash is a command and
never reaches the model; a pasted text of several lines is not one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, get_args

from dsv4.formats.errors import Dsv4Error
from dsv4.runtime.text.chat import Chat, ConversationFull, Effort
from dsv4.runtime.text.generate import Timings
from dsv4.runtime.text.pieces import Part

HELP = """\
/reset        forget the conversation (also /clear)
/system TEXT  the system prompt from here on; without TEXT, none
/think on     the model reasons before it answers; /think off ends that
/effort high  how long it reasons: low, high or max
/help         show this (also /?)
/exit         leave (also /quit, /bye, Ctrl-D)
Ctrl-C        end the answer
\"\"\"           begins and ends a message of several lines; so does a backslash at a line's end
"""
LEAVE = ("/exit", "/quit", "/bye", "exit", "quit")
BLOCK = '"""'
EFFORTS: tuple[Effort, ...] = get_args(Effort)


class Screen(Protocol):
    """What the loop talks through."""

    def read(self, more: bool) -> str:
        """A line without its newline; more: it continues a turn.

        A paste of several lines may come as one. Raises EOFError at the end of the input and
        KeyboardInterrupt on Ctrl-C.
        """

    def show(self, part: Part) -> None:
        """A piece of the answer, as it comes."""

    def end(self, timings: Timings | None) -> None:
        """The answer is over; None: it was interrupted or refused."""

    def note(self, sentence: str) -> None:
        """A sentence, or lines, that are not an answer."""


def interactive(chat: Chat, screen: Screen) -> None:
    """Talk until `/exit` or the end of the input. Ctrl-C ends an answer, never the loop."""
    loop = _Loop(chat, screen)
    while True:
        try:
            message = _message(screen)
            if message.strip() in LEAVE:
                return
            if message.startswith("/") and "\n" not in message:
                loop.command(message.strip())
            elif message.strip():
                loop.answer(message)
        except EOFError:
            return
        except KeyboardInterrupt:
            screen.note("/exit or Ctrl-D leaves")


def _message(screen: Screen) -> str:
    """One turn: a line, lines joined by backslashes, or a block."""
    line = screen.read(more=False)
    if line.lstrip().startswith(BLOCK):
        return _block(screen, line.lstrip().removeprefix(BLOCK))
    lines = []
    while line.endswith("\\"):
        lines.append(line[:-1])
        line = screen.read(more=True)
    return "\n".join([*lines, line])


def _block(screen: Screen, line: str) -> str:
    lines = []
    while not line.rstrip().endswith(BLOCK):
        lines.append(line)
        line = screen.read(more=True)
    lines.append(line.rstrip().removesuffix(BLOCK))
    return "\n".join(lines).strip("\n")


class _Loop:
    def __init__(self, chat: Chat, screen: Screen) -> None:
        self._chat, self._screen = chat, screen

    def command(self, line: str) -> None:
        """Do what a line that begins with a slash says."""
        name, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], str]] = {
            "/help": lambda rest: HELP.rstrip(),
            "/?": lambda rest: HELP.rstrip(),
            "/reset": self._reset,
            "/clear": self._reset,
            "/system": self._system,
            "/think": self._think,
            "/effort": self._effort,
        }
        if name in commands:
            self._screen.note(commands[name](rest.strip()))
        else:
            self._screen.note(f"{name} is not a command; /help lists them")

    def answer(self, message: str) -> None:
        """Say `message` and show what comes back."""
        chat, screen = self._chat, self._screen
        timings: Timings | None = None
        note = ""
        try:
            with contextlib.closing(chat.parts(message)) as parts:
                for part in parts:
                    screen.show(part)
            timings = chat.timings
            if chat.finish == "length":
                note = f"cut after {timings.generated_tokens} tokens; {self._longer()}"
        except KeyboardInterrupt:
            note = "(interrupted)"
        except ConversationFull as full:
            note = (
                f"the conversation has {full.tokens} tokens and {full.capacity} fit; /reset starts "
                "a new one, and `dsv4 run --max-seq-len N` holds a longer one"
            )
        except Dsv4Error as error:
            note = str(error)
        screen.end(timings)
        if note:
            screen.note(note)

    def _longer(self) -> str:
        if self._chat.full:
            return "the conversation is full: /reset, or start with a larger --max-seq-len"
        return "--max-new-tokens N allows more"

    def _reset(self, rest: str) -> str:
        self._chat.reset()
        return "the conversation is forgotten"

    def _system(self, rest: str) -> str:
        self._change(system=rest or None)
        return "the system prompt is set" if rest else "there is no system prompt now"

    def _think(self, rest: str) -> str:
        if rest in ("on", "off"):
            self._change(thinking=rest == "on")
        elif rest:
            return f"/think {rest}: expected on or off"
        return f"thinking is {'on' if self._chat.template.thinking else 'off'}"

    def _effort(self, rest: str) -> str:
        if rest in EFFORTS:
            self._change(effort=rest)
        elif rest:
            return f"/effort {rest}: expected {', '.join(EFFORTS)}"
        thinking = "" if self._chat.template.thinking else "; it counts once thinking is on"
        return f"effort is {self._chat.template.effort}{thinking}"

    def _change(self, **what: Any) -> None:
        self._chat.template = dataclasses.replace(self._chat.template, **what)
