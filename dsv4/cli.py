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
from dsv4.commands.bench import bench
from dsv4.commands.console import (
    err,
    escape_what_cannot_be_written,
    notice,
    out,
    print_json,
    show,
    waiting,
    write_report,
)
from dsv4.commands.exit_codes import EXIT_FAILED, endings
from dsv4.commands.export import export
from dsv4.commands.fit import fit
from dsv4.commands.info import info
from dsv4.commands.kernels import kernels
from dsv4.commands.options import (
    STDOUT,
    OutDirectory,
    accept_option,
    keep_option,
    memory_option,
    recipe_option,
    revision_option,
    store_argument,
    validate_options,
    workers_option,
)
from dsv4.commands.run import run
from dsv4.commands.serve import serve
from dsv4.commands.sharing import pull, push
from dsv4.convert.sources.open import check_name
from dsv4.formats.plain_text import counted, size

ORDER = (
    "plan",
    "convert",
    "validate",
    "repair",
    "info",
    "inspect",
    "export",
    "fit",
    "run",
    "serve",
    "push",
    "pull",
    "tiny",
    "kernels",
    "bench",
)
EPILOG = """
\b
Exit codes: 0 done; 1 a check failed; 2 bad usage or input; 3 out of space or
memory; 4 the network failed, worth another try; 130 interrupted; 143 terminated.
What was interrupted continues when the same command is given again.

\b
Environment:
  HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE   as huggingface_hub reads them
  HTTPS_PROXY, ALL_PROXY, NO_PROXY, SSL_CERT_FILE  the way to the hub
  DSV4_KERNELS      the one folder to look for kernels in; else the user's cache
                    folder, then installed wheels
  OMP_NUM_THREADS   threads of a computation on the CPU
  NO_COLOR          no colours

\b
Completion of commands and options in bash:
  eval "$(_DSV4_COMPLETE=bash_source dsv4)"
"""


def main() -> None:
    """The command line as a program. `__main__` is where the process begins."""
    interrupts.install()
    escape_what_cannot_be_written()
    with endings():
        # Without standalone mode click returns the code of an Exit instead of leaving with it.
        sys.exit(cli.main(standalone_mode=False) or 0)


class Commands(click.Group):
    """The commands in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Those of `ORDER` first, `help` last."""
        return sorted(self.commands, key=lambda name: (*ORDER, name, "help").index(name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; an unknown command also learns where the known ones are."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            text = f"{error.format_message()} `dsv4 --help` lists the commands."
            raise click.UsageError(text, ctx) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EPILOG)
@click.version_option(dsv4.__version__, "-V", "--version", prog_name="dsv4")
def cli() -> None:
    """Pack DeepSeek-V4 once, run it in seconds.

    \b
    dsv4 plan CHECKPOINT                          what packing will take
    dsv4 convert --hf CHECKPOINT --out ./packed   pack (no GPU needed)
    dsv4 validate ./packed --source CHECKPOINT    prove it, tensor by tensor
    dsv4 run ./packed                             talk
    dsv4 serve ./packed                           answer OpenAI's and Anthropic's clients

    CHECKPOINT is a directory, or a hub id such as deepseek-ai/DeepSeek-V4-Flash.
    """


@cli.command("help")
@click.argument("words", nargs=-1, metavar="[COMMAND]...")
@click.pass_context
def show_help(ctx: click.Context, words: tuple[str, ...]) -> None:
    """Show the help of a command."""
    command: click.Command = cli
    context = ctx.find_root()
    for word in words:
        found = command.get_command(context, word) if isinstance(command, click.Group) else None
        if found is None:
            raise click.UsageError(f"No such command {word!r}. `dsv4 --help` lists the commands.")
        command, context = found, click.Context(found, info_name=word, parent=context)
    click.echo(command.get_help(context))


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
    """Say what packing SRC would read, write and round.

    And what it would not carry exactly. From headers, and from block scales where that is
    cheap: of a hub id, nothing but a few megabytes is read.
    """
    check_name(source, revision)  # a wrong name is refused before torch is imported
    from dsv4.commands.tables import plan_table
    from dsv4.convert.estimate import budget_for, forecast
    from dsv4.convert.exactness import inexact_notices
    from dsv4.convert.keep import refuse_idle_keep
    from dsv4.convert.scale_look import look_at_scales
    from dsv4.convert.sources.open import open_source
    from dsv4.convert.travelling import make_whole_plan
    from dsv4.formats.model.recipes import make_recipe
    from dsv4.kernels.limits import few, refusals

    opened = open_source(source, revision, on_wait=waiting())
    planned = make_whole_plan(opened, make_recipe(recipe, keep))
    refuse_idle_keep(planned)
    expected = forecast(planned, opened, budget_for(planned, opened, memory, workers))
    look = look_at_scales(planned, opened)
    notices = [*planned.notices, *inexact_notices(look.inexact, recipe=planned.recipe)]
    document = {"commit": opened.commit} | planned.to_dict() | expected.to_dict()
    document |= look.to_dict(planned) | {"notices": notices}
    document["gpu_refusals"] = refused = list(refusals(planned.config))
    for sentence in notices:
        notice(sentence)
    if refused:
        notice(f"no GPU runs this model, only the CPU: {few(refused)}")
    if as_json:
        print_json(document)
    else:
        show(plan_table(source, document))


@cli.command()
@click.option(
    "--hf",
    "source",
    required=True,
    metavar="SRC",
    help="A hub id such as deepseek-ai/DeepSeek-V4-Flash, or a directory.",
)
@click.option(
    "--out",
    "target",
    required=True,
    type=OutDirectory(),
    metavar="DIR",
    help="Where the packed store is written; an unfinished one is continued.",
)
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
    """Pack a checkpoint; continues what was interrupted.

    What is in DIR unfinished, from the same source by the same recipe, is continued.
    """
    check_name(source, revision)  # a wrong name is refused before torch is imported
    from dsv4.commands.progress import conversion_progress
    from dsv4.commands.tables import summary_table
    from dsv4.convert import engine

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
                on_wait=waiting(as_json=as_json),
            )
    except KeyboardInterrupt:
        err.print("dsv4: nothing finished is lost; run the same command again to continue")
        raise
    if as_json:
        print_json(summary.to_dict())
    else:
        show(summary_table(summary))


@cli.command()
@store_argument
@validate_options
def validate(
    directory: Path,
    source: str | None,
    json_file: Path | None,
    html_file: Path | None,
    **how: Any,
) -> None:
    """Check a packed store; with --source, prove it.

    Exit 0 only if every check holds. Without --source: structure, sizes, checksums, value ranges.
    With it: every tensor compared with the source, and what rounding cost.
    """
    if source is not None:
        check_name(source)  # a wrong name is refused before torch is imported
    from dsv4.commands.progress import checking_progress
    from dsv4.commands.tables import report_tables
    from dsv4.validate import engine

    with checking_progress(err, as_json=json_file == STDOUT) as progress:
        report = engine.validate(
            directory, source=source, progress=progress, on_wait=waiting(), **how
        )
    for sentence in report.notices:
        notice(sentence)
    # The verdict first: it is not lost when a file cannot be written.
    show(*report_tables(report), console=err if json_file == STDOUT else out)
    if json_file == STDOUT:
        print_json(report.to_dict())
    elif json_file is not None:
        write_report(json_file, json.dumps(report.to_dict(), indent=2) + "\n")
    if html_file is not None:
        from dsv4.validate.page.html import render_html

        write_report(html_file, render_html(report))
    if not report.ok:
        raise click.exceptions.Exit(EXIT_FAILED)


@cli.command("repair")
@store_argument
@click.option(
    "--source",
    metavar="SRC",
    help="What DIR was made from.  [default: the hub's repository and commit that DIR names]",
)
@click.option("--dry-run", is_flag=True, help="Say what would be rewritten; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def repair(directory: Path, source: str | None, dry_run: bool, as_json: bool) -> None:
    """Rewrite exactly what is damaged in a packed store.

    Only the damaged chunks are made again, from the source. Exit 0 only if DIR is whole then;
    with --dry-run, 1 if anything is damaged.
    """
    if source is not None:
        check_name(source)  # a wrong name is refused before torch is imported
    from dsv4.commands.progress import checking_progress
    from dsv4.commands.tables import repair_tables
    from dsv4.validate import repair as repairing

    with checking_progress(err, as_json=as_json) as progress:
        report = repairing.repair(
            directory, source, dry_run=dry_run, progress=progress, on_wait=waiting()
        )
    if report.absent is not None:
        notice(report.absent)
    if as_json:
        print_json(report.to_dict())
    else:
        show(*repair_tables(report))
    if not report.ok:
        raise click.exceptions.Exit(EXIT_FAILED)


@cli.command()
@store_argument
@click.argument("tensor", required=False)
@click.option(
    "--diff",
    "other",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="OTHER",
    help="Another packed store to compare with.",
)
@click.option("--list", "every", is_flag=True, help="List every tensor, as the glob '*' does.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def inspect(
    directory: Path, tensor: str | None, other: Path | None, every: bool, as_json: bool
) -> None:
    """Show what is in a packed store, or one TENSOR.

    TENSOR is a name, or a glob such as 'layers.2.*' that lists the tensors it matches, in the hub's
    names or transformers'. Of one tensor: where its bytes came from, what became of them, its first
    block. With --diff: what differs from OTHER, exit 0 if nothing does and 1 if something does; no
    weight is read.
    """
    from dsv4.commands.inspection import inspection

    if every and tensor is not None:
        raise click.UsageError("TENSOR and --list exclude each other")
    if every and other is not None:
        raise click.UsageError("--list and --diff exclude each other")
    if tensor == "":
        raise click.UsageError("the name of TENSOR is empty; leave it out to see the whole store")
    document, table, same = inspection(directory, "*" if every else tensor, other)
    if as_json:
        print_json(document)
    else:
        show(table)
    if not same:
        raise click.exceptions.Exit(EXIT_FAILED)


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random weights.")
@click.option(
    "--flavour",
    type=click.Choice(("official", "base", "modelopt", "compressed-tensors", "bf16")),
    default="official",
    show_default=True,
    help="Whose on-disk format: the same model in every dialect that convert reads.",
)
def tiny(directory: Path, seed: int, flavour: str) -> None:
    """Write a small random checkpoint to try things out.

    It has the real architecture in the real on-disk format: `convert`, `validate` and `run` treat
    it as they treat a release, in seconds. What it says is noise.
    """
    from dsv4.synthetic.tiny import write_tiny

    write_tiny(directory, seed=seed, flavour=flavour)
    files = list(directory.iterdir())
    total = size(sum(path.stat().st_size for path in files))
    show(f"{directory}: {counted(len(files), 'file')}, {total}")


cli.add_command(info)
cli.add_command(export)
cli.add_command(fit)
cli.add_command(run)
cli.add_command(serve)
cli.add_command(push)
cli.add_command(pull)
cli.add_command(bench)
cli.add_command(kernels)
