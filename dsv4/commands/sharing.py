"""`dsv4 push` and `dsv4 pull`: a packed store on a hub, and from it."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from dsv4.commands.console import err, notice, print_json, show, waiting
from dsv4.commands.exit_codes import EXIT_INTERRUPTED
from dsv4.commands.options import OutDirectory, revision_option, store_argument
from dsv4.commands.progress import checking_progress, transfer_progress
from dsv4.commands.tables import facts_table
from dsv4.convert.sources.open import hub_name
from dsv4.formats.plain_text import counted, size
from dsv4.formats.store_place import PARTS

if TYPE_CHECKING:
    from dsv4.sharing.pull import Pulled
    from dsv4.sharing.push import Pushed

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Events on stderr, one document on stdout."
)
repo_argument = click.argument("repo", metavar="ORG/NAME")


@click.command()
@store_argument
@repo_argument
@click.option("--revision", metavar="BRANCH", help="Where to push.  [default: main]")
@click.option("--create", is_flag=True, help="Make the repository or the branch if need be.")
@click.option("--private", is_flag=True, help="With --create: for those only who are invited.")
@click.option("--replace", is_flag=True, help="Also if another store is there.")
@click.option("--replace-card", is_flag=True, help="Also if the README.md there is not dsv4's.")
@json_option
def push(directory: Path, repo: str, as_json: bool, **how: Any) -> None:
    """Publish a packed store on the hub; can be continued.

    Every byte of DIR is compared with its checksums first, and a damaged store is refused. Files
    that are there already are not sent again. A model card says what the store was made from, what
    was lost, and its root.
    """
    if how["private"] and not how["create"]:
        raise click.UsageError("--private is for a repository that --create makes")
    repo, _ = hub_name(repo)
    from dsv4.sharing.push import Push

    try:
        work = Push(directory, repo, notice=notice, on_wait=waiting(as_json=as_json), **how)
        with checking_progress(err, as_json=as_json) as progress:
            work.prove(progress)
        with transfer_progress(err, as_json=as_json) as moved:
            pushed = work.upload(moved)
    except KeyboardInterrupt:
        err.print("dsv4: run the same command again to continue\ndsv4: interrupted")
        sys.stderr.flush()
        os._exit(EXIT_INTERRUPTED)  # an upload's threads would be waited for, to their end
    if as_json:
        print_json(pushed.to_dict())
    else:
        show(_pushed_table(directory, pushed))


def _pushed_table(directory: Path, pushed: Pushed) -> Table:
    branch = pushed.branch
    on, at = (f", branch {branch}", f" --revision {shlex.quote(branch)}") if branch else ("", "")
    return facts_table(
        f"pushed {directory}",
        {
            "to": f"{pushed.repo}{on}, now at commit {pushed.commit}",
            "sent": f"{size(pushed.uploaded)} of {size(pushed.nbytes)} in "
            f"{counted(pushed.files, 'file')}",
            "card": pushed.card,
            "root": pushed.root,
            "next": f"dsv4 pull {pushed.repo} DIR{at} --root {pushed.root}",
        },
    )


@click.command()
@repo_argument
@click.argument("directory", type=OutDirectory(), metavar="DIR")
@click.option(
    "--root",
    metavar="HEX",
    help="The root that the store must have, from whoever made it: 64 hex digits, or at least the "
    "first 16.",
)
@revision_option
@click.option(
    "--without",
    "leave_out",
    type=click.Choice(tuple(PARTS)),
    multiple=True,
    help="A part that is not wanted; `run` does without draft layers. The same command without "
    "this option fetches it later.",
)
@click.option(
    "--streams",
    type=click.IntRange(min=1, max=64),
    default=8,
    show_default=True,
    help="Files read at once.",
)
@json_option
def pull(
    repo: str,
    directory: Path,
    root: str | None,
    revision: str | None,
    leave_out: tuple[str, ...],
    streams: int,
    as_json: bool,
) -> None:
    """Fetch a packed store from the hub; can be continued.

    Every chunk is compared with the manifest as it arrives, the manifest with its root, and the
    root with --root, before anything of it is in DIR under its name.
    """
    repo, revision = hub_name(repo, revision)
    from dsv4.sharing import pull as pulling

    try:
        with transfer_progress(err, as_json=as_json) as progress:
            pulled = pulling.pull(
                repo,
                directory,
                revision=revision,
                root=root,
                leave_out=leave_out,
                streams=streams,
                progress=progress,
                notice=notice,
                on_wait=waiting(as_json=as_json),
            )
    except KeyboardInterrupt:
        err.print("dsv4: nothing finished is lost; run the same command again to continue")
        raise
    if as_json:
        print_json(pulled.to_dict())
    else:
        show(_pulled_table(pulled))


def _pulled_table(pulled: Pulled) -> Table:
    return facts_table(
        f"pulled {pulled.out}",
        {
            "from": f"{pulled.repo} at commit {pulled.commit}",
            "fetched": f"{size(pulled.fetched)} of {size(pulled.nbytes)} in "
            f"{counted(pulled.files, 'file')}"
            f"{'; what was there already was not read' if pulled.unread else ''}",
            "left out": ", ".join(pulled.absent) or "nothing",
            "root": f"{pulled.root}, {'as --root says' if pulled.pinned else 'not compared'}",
        },
    )
