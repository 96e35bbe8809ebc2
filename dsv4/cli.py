"""The command line: parses, calls one function, renders with rich. No logic lives here.

Data goes to stdout, progress and warnings to stderr; exit codes are in `endings`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

import dsv4
from dsv4 import interrupts
from dsv4.bench_cli import bench
from dsv4.console import err, notice, out, print_json
from dsv4.endings import EXIT_FAILED, endings
from dsv4.kernels_cli import kernels
from dsv4.options import (
    accept_option,
    keep_option,
    memory_option,
    recipe_option,
    revision_option,
    validate_options,
    workers_option,
)
from dsv4.parity_cli import bench_parity
from dsv4.run_cli import run


def main() -> None:
    """The command line as a program. `__main__` is where the process begins."""
    interrupts.install()
    with endings():
        # Without standalone mode click returns the code of an Exit instead of leaving with it.
        sys.exit(cli.main(standalone_mode=False) or 0)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(dsv4.__version__, prog_name="dsv4")
def cli() -> None:
    """Pack DeepSeek-V4 once, run it in seconds.

    \b
    dsv4 convert --hf CHECKPOINT --out ./packed   pack (no GPU needed)
    dsv4 validate ./packed --source CHECKPOINT    prove it, tensor by tensor
    dsv4 run ./packed                             talk
    """


@cli.command()
@click.argument("source", metavar="SRC")
@recipe_option
@keep_option
@revision_option
@workers_option
@memory_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def plan(
    source: str,
    recipe: str,
    keep: tuple[str, ...],
    revision: str | None,
    workers: int | None,
    memory: int,
    as_json: bool,
) -> None:
    """Say what converting SRC would read, write and round: from headers and block scales."""
    from dsv4.convert.exactness import inexact_notices
    from dsv4.convert.forecast import budget_for, forecast
    from dsv4.convert.keep import refuse_idle_keep
    from dsv4.convert.open_source import open_source
    from dsv4.convert.recipes import make_recipe
    from dsv4.convert.scale_look import look_at_scales
    from dsv4.convert.travelling import make_whole_plan
    from dsv4.render import plan_table

    opened = open_source(source, revision)
    planned = make_whole_plan(opened, make_recipe(recipe, keep))
    refuse_idle_keep(planned)
    expected = forecast(planned, opened, budget_for(planned, opened, memory, workers))
    look = look_at_scales(planned, opened)
    notices = [*planned.notices, *inexact_notices(look.inexact, recipe=planned.recipe)]
    document = planned.to_dict() | expected.to_dict() | look.to_dict(planned)
    document["notices"] = notices
    for sentence in notices:
        notice(sentence)
    if as_json:
        print_json(document)
    else:
        out.print(plan_table(source, document))


@cli.command()
@click.option("--hf", "source", required=True, metavar="SRC", help="Hub id or local directory.")
@click.option("--out", "target", required=True, type=click.Path(path_type=Path), metavar="DIR")
@revision_option
@recipe_option
@keep_option
@workers_option
@memory_option
@accept_option
@click.option(
    "--scheduler", metavar="ADDRESS", help="A dask.distributed cluster that sees the same paths."
)
@click.option("--json", "as_json", is_flag=True, help="Events on stderr, one document on stdout.")
def convert(
    source: str,
    target: Path,
    revision: str | None,
    recipe: str,
    keep: tuple[str, ...],
    workers: int | None,
    memory: int,
    accept_rounding: bool,
    scheduler: str | None,
    as_json: bool,
) -> None:
    """Convert a checkpoint into a packed store. Resumes an unfinished conversion in DIR."""
    from dsv4.convert import engine
    from dsv4.progress import conversion_progress
    from dsv4.render import summary_table

    try:
        with conversion_progress(err, as_json=as_json) as progress:
            summary = engine.convert(
                source,
                target,
                recipe,
                workers,
                progress,
                keep=keep,
                revision=revision,
                memory=memory,
                scheduler=scheduler,
                accept_rounding=accept_rounding,
                notice=notice,
            )
    except KeyboardInterrupt:
        err.print("dsv4: nothing finished is lost; run the same command again to continue")
        raise
    if as_json:
        print_json(summary.to_dict())
    else:
        out.print(summary_table(summary))


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@validate_options
def validate(
    directory: Path,
    source: str | None,
    json_file: Path | None,
    html_file: Path | None,
    **how: Any,
) -> None:
    """Check a packed store; with --source, prove every tensor. Exit 0 only if all holds."""
    from dsv4.render import report_tables
    from dsv4.validate import engine

    report = engine.validate(directory, source=source, **how)
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    if html_file is not None:
        from dsv4.validate.html import write_html

        write_html(report, html_file)
    for table in report_tables(report):
        out.print(table)
    if not report.ok:
        raise click.exceptions.Exit(EXIT_FAILED)


@cli.command("repair")
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option(
    "--source",
    metavar="SRC",
    help="What DIR was made from; default: the hub's repository and commit that it names.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def repair(directory: Path, source: str | None, as_json: bool) -> None:
    """Rewrite exactly the damaged chunks of a packed store. Exit 0 only if it is whole then."""
    from dsv4.render import repair_tables
    from dsv4.validate import repair as repairing

    report = repairing.repair(directory, source)
    if as_json:
        print_json(report.to_dict())
    else:
        for table in repair_tables(report):
            out.print(table)
    if not report.ok:
        raise click.exceptions.Exit(EXIT_FAILED)


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.argument("tensor", required=False)
@click.option("--diff", "other", type=click.Path(path_type=Path), metavar="OTHER")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def inspect(directory: Path, tensor: str | None, other: Path | None, as_json: bool) -> None:
    """Show the tree of a packed store, all about one TENSOR, or what differs from OTHER.

    With --diff, exit 0 if nothing differs and 1 if something does; no weight is read.
    """
    from dsv4.inspection import inspection

    document, table, same = inspection(directory, tensor, other)
    if as_json:
        print_json(document)
    else:
        out.print(table)
    if not same:
        raise click.exceptions.Exit(EXIT_FAILED)


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--flavour",
    type=click.Choice(("official", "base", "modelopt", "compressed-tensors", "bf16")),
    default="official",
    show_default=True,
    help="Whose on-disk format: the same model in every dialect that convert reads.",
)
def tiny(directory: Path, seed: int, flavour: str) -> None:
    """Write a small random checkpoint: the real architecture in the real on-disk format."""
    from dsv4.convert.tiny import write_tiny

    write_tiny(directory, seed=seed, flavour=flavour)
    size = sum(path.stat().st_size for path in directory.iterdir())
    out.print(f"{directory}: {len(list(directory.iterdir()))} files, {size / 1e6:.1f} MB")


bench.add_command(bench_parity)
cli.add_command(run)
cli.add_command(bench)
cli.add_command(kernels)
