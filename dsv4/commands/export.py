"""`dsv4 export`: back to a checkpoint that other servers load."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from dsv4.commands.console import err, notice, print_json, show
from dsv4.commands.options import OutDirectory, Size, store_argument
from dsv4.formats.plain_text import counted, size


@click.command()
@store_argument
@click.option(
    "--out",
    "target",
    required=True,
    type=OutDirectory(),
    metavar="DIR2",
    help="Where the checkpoint is written; an unfinished one is continued.",
)
@click.option(
    "--experts",
    type=click.Choice(("nvfp4", "source")),
    default="nvfp4",
    show_default=True,
    help="Routed experts that came from MXFP4: as NVFP4, or back to MXFP4.",
)
@click.option(
    "--bf16",
    multiple=True,
    metavar="GLOB",
    help="Write matching NVFP4 matrices as BF16, which holds their values, such as "
    "'*.ffn.gate.weight' or head.weight. May be given several times.",
)
@click.option(
    "--shard-size",
    type=Size(),
    default="4GiB",
    show_default=True,
    help="Of a safetensors file, about.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Files written at once.  [default: one a core, at most 4]",
)
@click.option("--json", "as_json", is_flag=True, help="Events on stderr, one document on stdout.")
def export(
    directory: Path,
    target: Path,
    experts: Literal["nvfp4", "source"],
    bf16: tuple[str, ...],
    shard_size: int,
    workers: int | None,
    as_json: bool,
) -> None:
    """Write a packed store as a checkpoint for other servers.

    Tensors have the hub's names, NVFP4 ones ModelOpt's form; whatever kept its own encoding comes
    back byte for byte, with tokenizer and licences. Recipe native gives what NVIDIA publishes:
    NVFP4 in the routed experts alone. Scales of activations (input_scale) are 1.0, since a store
    holds none.
    """
    from dsv4.commands.progress import conversion_progress
    from dsv4.commands.tables import facts_table
    from dsv4.export import engine

    try:
        with conversion_progress(err, as_json=as_json) as progress:
            summary = engine.export(
                directory,
                target,
                experts=experts,
                bf16=bf16,
                shard_bytes=shard_size,
                workers=workers,
                progress=progress,
                notice=notice,
            )
    except KeyboardInterrupt:
        err.print("dsv4: nothing finished is lost; run the same command again to continue")
        raise
    if as_json:
        print_json(summary.to_dict())
        return
    files = counted(len(summary.files), "file")
    resumed = summary.resumed_files
    rows: dict[str, object] = {
        "checkpoint": str(summary.out),
        "tensors": f"{summary.plan.tensors:,}",
        "written": f"{size(summary.plan.nbytes)} in {files}"
        + (f", {resumed} of them before" if resumed else ""),
        "from the store of root": summary.root,
    }
    show(facts_table(f"export of {directory}", rows))
