"""`dsv4 bench parity`: a command that proves."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import click

from dsv4.commands.console import err, print_json, show
from dsv4.commands.options import words_option
from dsv4.formats.model.releases import MODELS

PARTS = ("logits", "long", "text", "sessions", "soak")


@click.command("parity")
@click.option("--model", type=click.Choice(tuple(MODELS)), default="flash", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--tokens", type=click.IntRange(min=1), default=4200, show_default=True)
@click.option("--context", type=click.IntRange(min=256), default=65536, show_default=True)
@click.option("--compared", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--text", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--soak", type=click.IntRange(min=0), default=0, help="Generations; 0: none.")
@words_option("--parts", "parts", PARTS, "Which comparisons.")
@click.option("--kernels", "location", type=click.Path(path_type=Path), help="Their folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def bench_parity(
    model: str,
    layers: int,
    parts: tuple[str, ...],
    location: Path | None,
    as_json: bool,
    **sizes: int,
) -> None:
    """The GPU's kernels against the reference on the first layers of a real model, random weights.

    --tokens are read by both; --context by the kernels, whose caches the reference takes over for
    the --compared tokens across its end; --text is the length of a greedy answer. Exit 1 when
    something is wrong.
    """
    import torch

    from benchmarks.parity import Sizes, parity
    from dsv4.bench.decode import few_layers
    from dsv4.bench.kernels import open_library
    from dsv4.commands.bench_tables import parity_table

    device = torch.device("cuda")
    library = open_library(device, location, "parity")
    config = few_layers(MODELS[model], layers)
    proofs, begin = [], time.perf_counter()
    for proof in parity(config, library, device, parts, Sizes(**sizes)):
        proofs.append(proof)
        verdict = "right" if proof.right else "WRONG"
        seconds = time.perf_counter() - begin
        err.print(
            f"[{seconds:.0f} s] {proof.what}: {proof.found} ({proof.allowed}), {verdict}",
        )
        for detail in proof.details:
            err.print(f"  {detail}")
    name = torch.cuda.get_device_name(device)
    if as_json:
        print_json({"device": name, "proofs": [dataclasses.asdict(one) for one in proofs]})
    else:
        show(parity_table(proofs, f"{model}, {layers} layers, {name}"))
    if not all(one.right for one in proofs):
        raise SystemExit(1)
