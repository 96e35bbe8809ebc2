"""Where output goes: data to stdout, progress and warnings to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import click
from rich.console import Console

PIPE_WIDTH = 160

# Piped output keeps names and hashes on one line.
out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def notice(sentence: str) -> None:
    """One line on stderr about something that was left out, ignored, or is worth knowing."""
    err.print(f"note: {sentence}", markup=False)


def waiting(*, as_json: bool = False) -> Callable[[str], None]:
    """-> what to tell when a network is waited for: a line on stderr, or an event for programs."""
    if not as_json:
        return lambda sentence: err.print(f"waiting: {sentence}", markup=False)

    def event(sentence: str) -> None:
        err.file.write(json.dumps({"event": "waiting", "message": sentence}) + "\n")
        err.file.flush()

    return event


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(document, indent=2, ensure_ascii=False))
