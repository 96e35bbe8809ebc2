"""`python -m benchmarks`: peers beside dsv4, proofs on a GPU, and what rounding costs."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from dsv4 import interrupts
from dsv4.commands.console import err, escape_what_cannot_be_written, print_json, show, write_report
from dsv4.commands.exit_codes import endings
from dsv4.commands.options import Target, models_option, numbers, words_option, workers_option
from dsv4.formats.model.recipes import DEFAULT_RECIPE, RECIPE_NAMES
from dsv4.formats.model.releases import MODELS

PARITY_PARTS = ("logits", "long", "text", "sessions", "soak")

model_option = click.option(
    "--model", type=click.Choice(tuple(MODELS)), default="flash", show_default=True
)
layers_option = click.option("--layers", type=click.IntRange(min=1), default=5, show_default=True)
kernels_option = click.option(
    "--kernels", "location", type=click.Path(path_type=Path), help="Their folder."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def benchmarks() -> None:
    """What the project measures beside `dsv4 bench`; needs the `test` extra."""


@benchmarks.command("quantize")
@click.option("--elements", type=click.IntRange(min=1 << 16), default=1 << 23, show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@json_option
def run_quantize(elements: int, seeds: int, threads: int, as_json: bool) -> None:
    """Rounding to NVFP4 beside its peers: relative MSE, then speed."""
    from benchmarks.quantize import quality, speed
    from benchmarks.tables import quality_table, speed_table

    qualities = quality(elements, seeds)
    speeds = speed(elements, threads)
    if as_json:
        print_json({"quality": _documents(qualities), "speed": _documents(speeds)})
    else:
        show(quality_table(qualities, seeds), speed_table(speeds, threads))


@benchmarks.command("quality")
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--tokens", type=click.IntRange(min=512), default=8192, show_default=True)
@click.option("--text", type=click.Path(path_type=Path), help="Held-out text; DIR/heldout.txt.")
@click.option("--plot", type=Target(), metavar="FILE", help="Write an SVG here.")
@json_option
def run_quality(
    directory: Path, tokens: int, text: Path | None, plot: Path | None, as_json: bool
) -> None:
    """What each recipe costs the trained checkpoint DIRECTORY, on text it has not seen."""
    from benchmarks.quality import quality
    from benchmarks.quality_table import cost_plot, cost_table

    found = quality(directory, text, tokens, progress=lambda name: err.print(f"measuring {name}"))
    if plot is not None:
        write_report(plot, cost_plot(found))
    if as_json:
        print_json({"native_holds": found.native_holds, **dataclasses.asdict(found)})
    else:
        show(cost_table(found))
    if not found.native_holds:
        err.print("native differs from the source by more than 1e-4 of perplexity")
        raise SystemExit(1)


@benchmarks.command("drafts")
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--prompts", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--tokens", type=click.IntRange(min=2), default=128, show_default=True)
@click.option("--recipe", type=click.Choice(RECIPE_NAMES), default=DEFAULT_RECIPE)
@json_option
def run_drafts(directory: Path, prompts: int, tokens: int, recipe: str, as_json: bool) -> None:
    """How many drafts of the trained checkpoint DIRECTORY are accepted, on text it has not seen."""
    import dsv4
    from benchmarks.drafts import acceptance, acceptance_table, confidence_table
    from dsv4.runtime.model import Model

    with tempfile.TemporaryDirectory(prefix="dsv4-drafts-") as place:
        dsv4.convert(directory, Path(place) / "packed", recipe=recipe)
        model = dsv4.load(Path(place) / "packed", device="cpu")
        assert isinstance(model, Model)  # which it is on a CPU
        found = acceptance(model, directory, prompts, tokens, progress=err.print)
    if as_json:
        print_json({"temperatures": [dataclasses.asdict(one) for one in found]})
    else:
        show(acceptance_table(found), confidence_table(found))
    if not all(one.same_text for one in found):
        err.print("an answer differs from the one without drafts")
        raise SystemExit(1)


@benchmarks.command("stages")
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--recipe", type=click.Choice(RECIPE_NAMES), default=DEFAULT_RECIPE)
@click.option("--dir", "directory", type=click.Path(path_type=Path, exists=True), default=".")
@workers_option
@json_option
def run_stages(
    source: Path, recipe: str, directory: Path, workers: int | None, as_json: bool
) -> None:
    """Where the time goes when the checkpoint SOURCE is packed, stage by stage.

    The store is written below --dir and removed again.
    """
    from benchmarks.stages import watch
    from benchmarks.tables import stages_table
    from dsv4.convert.engine import convert

    place = tempfile.TemporaryDirectory(prefix="dsv4-bench-", dir=directory)
    with place as scratch, watch() as stages:
        convert(source, Path(scratch, "packed"), recipe, workers)
    if as_json:
        print_json({stage: dataclasses.asdict(spent) for stage, spent in stages.items()})
    else:
        show(stages_table(stages, recipe))


@benchmarks.command("kernels")
@models_option
@click.option("--rows", default="1,2,4,8", show_default=True, help="Tokens at once.")
@click.option("--shape", default="", help="Only shapes whose name contains this.")
@kernels_option
@json_option
def run_kernels(
    models: tuple[str, ...], rows: str, shape: str, location: Path | None, as_json: bool
) -> None:
    """Kernels of torch, Triton and humming-kernels beside ours, on the same values."""
    from dsv4.kernels.ops.gemv.contract import MAX_ROWS

    few = numbers(rows, most=MAX_ROWS)
    import torch

    from benchmarks.kernel_peers import compare
    from benchmarks.tables import peer_line, peers_table
    from dsv4.bench.kernels import measure_machine, open_library

    device = torch.device("cuda")
    library = open_library(device, location, "python -m benchmarks kernels")
    machine, lines = measure_machine(device), []
    for model in models:
        for line in compare(MODELS[model], model, few, library, machine, device, shapes=shape):
            lines.append(line)
            err.print(peer_line(line))
    if as_json:
        print_json({"machine": dataclasses.asdict(machine), "lines": _documents(lines)})
    else:
        show(peers_table(lines, machine))
    if not all(line.right for line in lines if line.peer == "dsv4"):
        raise SystemExit(1)


@benchmarks.command("transformers")
@model_option
@layers_option
@click.option("--context", type=click.IntRange(min=1), default=8192, show_default=True)
@kernels_option
@json_option
def run_transformers(
    model: str, layers: int, context: int, location: Path | None, as_json: bool
) -> None:
    """A step of transformers' model in BF16 beside ours: first layers, the same random weights."""
    import torch

    from benchmarks.tables import rivals_table
    from benchmarks.transformers_peer import beside_ours
    from dsv4.bench.decode import few_layers
    from dsv4.bench.kernels import open_library
    from dsv4.commands.bench_tables import decode_table

    device = torch.device("cuda")
    library = open_library(device, location, "python -m benchmarks transformers")
    report, rivals = beside_ours(
        few_layers(MODELS[model], layers), model, library, device, context=context
    )
    if as_json:
        print_json(dataclasses.asdict(report) | {"rivals": dataclasses.asdict(rivals)})
    else:
        show(decode_table(report), rivals_table(rivals, report.steps))
    if not (report.right and rivals.right):
        raise SystemExit(1)


@benchmarks.command("parity")
@model_option
@layers_option
@click.option("--tokens", type=click.IntRange(min=1), default=4200, show_default=True)
@click.option("--context", type=click.IntRange(min=256), default=65536, show_default=True)
@click.option("--compared", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--text", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--soak", type=click.IntRange(min=0), default=0, help="Generations; 0: none.")
@words_option("--parts", "parts", PARITY_PARTS, "Which comparisons.")
@kernels_option
@json_option
def run_parity(
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
    from benchmarks.tables import parity_table
    from dsv4.bench.decode import few_layers
    from dsv4.bench.kernels import open_library

    device = torch.device("cuda")
    library = open_library(device, location, "python -m benchmarks parity")
    config = few_layers(MODELS[model], layers)
    proofs, begin = [], time.perf_counter()
    for proof in parity(config, library, device, parts, Sizes(**sizes)):
        proofs.append(proof)
        verdict = "right" if proof.right else "WRONG"
        seconds = time.perf_counter() - begin
        err.print(f"[{seconds:.0f} s] {proof.what}: {proof.found} ({proof.allowed}), {verdict}")
        for detail in proof.details:
            err.print(f"  {detail}")
    name = torch.cuda.get_device_name(device)
    if as_json:
        print_json({"device": name, "proofs": _documents(proofs)})
    else:
        show(parity_table(proofs, f"{model}, {layers} layers, {name}"))
    if not all(one.right for one in proofs):
        raise SystemExit(1)


def _documents(lines: Any) -> list[dict[str, Any]]:
    return [dataclasses.asdict(line) for line in lines]


def main() -> None:
    """Parses, calls one function, prints; ends as `dsv4` does."""
    interrupts.install()
    escape_what_cannot_be_written()
    with endings():
        benchmarks.main(prog_name="python -m benchmarks", standalone_mode=False)


if __name__ == "__main__":
    main()
