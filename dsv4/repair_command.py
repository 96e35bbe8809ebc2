"""`dsv4 repair`, which the command line takes in."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("repair")
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "--source",
    metavar="SRC",
    help="What DIR was made from; default: the hub's repository and commit that it names.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def repair_command(directory: Path, source: str | None, as_json: bool) -> None:
    """Rewrite exactly the damaged chunks of a packed store. Exit 0 only if it is whole then."""
    from dsv4.cli import EXIT_FAILED, out
    from dsv4.render import repair_tables
    from dsv4.validate.repair import repair

    report = repair(directory, source)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        for table in repair_tables(report):
            out.print(table)
    if not report.ok:
        raise click.exceptions.Exit(EXIT_FAILED)
