"""Where output goes: data to stdout, progress and warnings to stderr.

`out`, `err`, and the functions here are the only ways to a terminal. Neither console reads markup
or emoji codes: a path, a tensor's name or an error is shown as it is, square brackets included.
Colour is given as a style, never inside a text.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console, RenderableType

from dsv4.formats.errors import OutOfSpaceError, StoreError
from dsv4.formats.plain_text import printable

if TYPE_CHECKING:
    from dsv4.formats.checkpoint import PackedCheckpoint

PIPE_WIDTH = 160

# Piped output keeps names and hashes on one line.
out = Console(
    highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else PIPE_WIDTH
)
err = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def escape_what_cannot_be_written() -> None:
    """Characters that the terminal's encoding lacks are written as escapes, never an error."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")


def show(*parts: RenderableType, console: Console = out) -> None:
    """Texts and tables, one below the other, without blanks at the ends of their lines."""
    for part in parts:
        with console.capture() as captured:
            console.print(part, soft_wrap=False)
        for line in captured.get().rstrip("\n").split("\n"):
            console.file.write(line.rstrip() + "\n")
    console.file.flush()


def write_report(path: Path, text: str) -> None:
    """Write a file of results. Raises OutOfSpaceError when the disk is full, or StoreError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (OutOfSpaceError if full else StoreError)(
            f"{path} cannot be written: {error.strerror}; what it would say was found all the same"
        ) from error


def notice(sentence: str) -> None:
    """One line on stderr about something that was left out, ignored, or is worth knowing."""
    err.print(f"note: {printable(sentence)}")


def say_absent(packed: PackedCheckpoint) -> None:
    """What a pull left out of the store, and the command that fetches it."""
    if (absent := packed.store.absent) is not None:
        notice(absent.sentence(packed.store.root))


def waiting(*, as_json: bool = False) -> Callable[[str], None]:
    """-> what to tell when a network is waited for: a line on stderr, or an event for programs."""
    if not as_json:
        return lambda sentence: err.print(f"waiting: {printable(sentence)}")

    def event(sentence: str) -> None:
        err.file.write(json.dumps({"event": "waiting", "message": sentence}) + "\n")
        err.file.flush()

    return event


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout, in ASCII where stdout is not in UTF-8."""
    unicode = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    click.echo(json.dumps(document, indent=2, ensure_ascii=not unicode))
