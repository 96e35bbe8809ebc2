"""`dsv4 bench`: the commands that measure."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import click

from dsv4.console import err, out, print_json
from dsv4.formats.releases import MODELS
from dsv4.options import models_option, operations_option


@click.group()
def bench() -> None:
    """Measure: each line a figure, its bound, the fraction of it, and correctness."""


@bench.command("quantize")
@click.option("--elements", type=click.IntRange(min=1 << 16), default=1 << 23, show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def bench_quantize(elements: int, seeds: int, threads: int, as_json: bool) -> None:
    """Rounding to NVFP4 beside its peers: relative MSE, then speed."""
    from dsv4.bench.quantize import quality, speed
    from dsv4.render import quality_table, speed_table

    qualities = quality(elements, seeds)
    speeds = speed(elements, threads)
    if as_json:
        print_json(
            {
                "quality": [dataclasses.asdict(line) for line in qualities],
                "speed": [dataclasses.asdict(line) for line in speeds],
            }
        )
        return
    out.print(quality_table(qualities, seeds))
    out.print(speed_table(speeds, threads))


@bench.command("convert")
@click.option("--model", type=click.Choice(("flash", "pro", "both")), default="flash")
@click.option("--experts", type=click.IntRange(min=0), default=32, help="0: all of the layer's.")
@click.option("--layers", type=click.IntRange(min=1), default=1)
@click.option("--workers", type=click.IntRange(min=1), default=2)
@click.option("--rounds", type=click.IntRange(min=1), default=3)
@click.option("--dir", "directory", type=click.Path(path_type=Path, exists=True), default=".")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def bench_convert(model: str, directory: Path, as_json: bool, **sizes: int) -> None:
    """Conversion of real layer shapes beside a plain copy and beside today's path."""
    from dsv4.bench.convert import throughput
    from dsv4.render import throughput_tables

    models = ("flash", "pro") if model == "both" else (model,)
    found = [throughput(name, directory, **sizes) for name in models]
    if as_json:
        print_json({"models": [dataclasses.asdict(one) for one in found]})
        return
    for table in (table for one in found for table in throughput_tables(one)):
        out.print(table)


@bench.command("validate")
@click.argument("store", required=False, type=click.Path(path_type=Path, exists=True))
@click.option("--model", type=click.Choice(tuple(MODELS)), default="flash", show_default=True)
@click.option("--experts", type=click.IntRange(min=0), default=0, help="0: all of the layer's.")
@click.option("--turns", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--dir", "directory", type=click.Path(path_type=Path, exists=True), default=".")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def bench_validate(
    store: Path | None, model: str, experts: int, turns: int, directory: Path, as_json: bool
) -> None:
    """The full pass over STORE, or over one layer of real shape, beside a plain read."""
    from dsv4.bench.validate import full_pass, real_store
    from dsv4.render import passes_table

    made = contextlib.nullcontext(store) if store else real_store(model, directory, experts)
    with made as path:
        passes = full_pass(path, turns)
    if as_json:
        print_json({"passes": [dataclasses.asdict(one) for one in passes]})
    else:
        out.print(passes_table(passes))
    if not all(one.correct for one in passes):
        raise SystemExit(1)


@bench.command("kernels")
@operations_option
@models_option
@click.option("--rows", default="1,2,4,8", show_default=True, help="Tokens at once.")
@click.option("--shape", default="", help="Only shapes whose name contains this.")
@click.option("--checks", "unusual", is_flag=True, help="Unusual inputs; checked, not timed.")
@click.option("--kernels", "location", type=click.Path(path_type=Path), help="Their folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def bench_kernels(
    operations: tuple[str, ...],
    models: tuple[str, ...],
    rows: str,
    shape: str,
    unusual: bool,
    location: Path | None,
    as_json: bool,
) -> None:
    """Every GPU kernel on real shapes: correctness, time, fraction of this GPU's bound."""
    import torch

    from dsv4.bench.kernels import measure, measure_machine, open_library
    from dsv4.kernels.operations import cases, checks
    from dsv4.render import kernel_line, kernels_table

    try:
        counts = [int(count) for count in rows.split(",")]
    except ValueError:
        raise click.BadParameter(f"{rows!r}, expected numbers such as 1,8") from None
    device = torch.device("cuda")
    library = open_library(device, location)
    machine = measure_machine(device)
    chosen = [
        case
        for model in models
        for case in (
            checks(MODELS[model], model, operations)
            if unusual
            else cases(MODELS[model], model, counts, operations)
        )
        if shape in case.shape
    ]
    lines = []
    for line in measure(chosen, library, machine, device, timed=not unusual):
        lines.append(line)
        err.print(kernel_line(line), markup=False)
    if as_json:
        print_json(
            {
                "machine": dataclasses.asdict(machine),
                "lines": [dataclasses.asdict(line) for line in lines],
            }
        )
    else:
        out.print(kernels_table(lines, machine))
    if any(line.faults for line in lines):
        raise SystemExit(1)


@bench.command("quality")
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--tokens", type=click.IntRange(min=512), default=8192, show_default=True)
@click.option("--text", type=click.Path(path_type=Path), help="Held-out text; DIR/heldout.txt.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write an SVG here.")
def bench_quality(
    directory: Path, tokens: int, text: Path | None, as_json: bool, plot: Path | None
) -> None:
    """What each recipe costs the trained checkpoint DIRECTORY, on text it has not seen."""
    from dsv4.bench.quality import quality
    from dsv4.bench.quality_table import cost_plot, cost_table

    found = quality(directory, text, tokens, progress=lambda name: err.print(f"measuring {name}"))
    if plot is not None:
        plot.write_text(cost_plot(found), encoding="utf-8")
    if as_json:
        print_json({"native_holds": found.native_holds, **dataclasses.asdict(found)})
    else:
        out.print(cost_table(found))
    if not found.native_holds:
        err.print("native differs from the source by more than 1e-4 of perplexity")
        raise SystemExit(1)
