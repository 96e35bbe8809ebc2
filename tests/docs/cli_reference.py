"""docs/cli.md, made from the help texts: `python -m tests.docs.cli_reference` writes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from dsv4.cli import cli

TARGET = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
WIDTH = 96
HEAD = """# Commands

What `dsv4 COMMAND --help` prints. `python -m tests.docs.cli_reference` makes this page from it,
and a test holds it to that. Data goes to stdout, progress and warnings to stderr.
"""


def helps(command: click.Command, name: str, parent: click.Context | None) -> Iterator[str]:
    """A section for `command` and for each command in it."""
    settings = {**command.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    with click.Context(command, info_name=name, parent=parent, **settings) as context:
        lines = (line.rstrip() for line in command.get_help(context).splitlines())
        yield f"## `{context.command_path}`\n\n```\n" + "\n".join(lines) + "\n```\n"
        if isinstance(command, click.Group):
            for below in command.list_commands(context):
                found = command.get_command(context, below)
                if found is not None and not found.hidden:
                    yield from helps(found, below, context)


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *helps(cli, "dsv4", None)])


if __name__ == "__main__":
    TARGET.write_text(page())
