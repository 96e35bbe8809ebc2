"""`dsv4 bench`: the commands that measure."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsv4.commands.console import err, print_json, show
from dsv4.commands.options import (
    Device,
    ExpertsPlace,
    Size,
    models_option,
    numbers,
    operations_option,
    shape_options,
    workers_option,
)
from dsv4.formats.model.recipes import DEFAULT_RECIPE, RECIPE_NAMES
from dsv4.formats.model.releases import DRAFTING, MODELS

if TYPE_CHECKING:
    from dsv4.formats.model.config import ModelConfig


@click.group()
def bench() -> None:
    """Measure what dsv4 does on this machine.

    Each line is a figure, its bound, the fraction of it, and whether the result was right.
    """


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
    from dsv4.commands.bench_tables import throughput_table

    models = ("flash", "pro") if model == "both" else (model,)
    found = [throughput(name, directory, **sizes) for name in models]
    if as_json:
        print_json({"models": [dataclasses.asdict(one) for one in found]})
        return
    show(*(throughput_table(one) for one in found))


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
    from dsv4.commands.bench_tables import passes_table

    made = contextlib.nullcontext(store) if store else real_store(model, directory, experts)
    with made as path:
        passes = full_pass(path, turns)
    if as_json:
        print_json({"passes": [dataclasses.asdict(one) for one in passes]})
    else:
        show(passes_table(passes))
    if not all(one.correct for one in passes):
        raise SystemExit(1)


@bench.command("kernels")
@operations_option
@models_option
@click.option("--rows", default="1,2,4,8,2048", show_default=True, help="Tokens at once.")
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
    counts = numbers(rows)
    import torch

    from dsv4.bench.kernels import measure, measure_machine, open_library
    from dsv4.commands.bench_tables import kernel_line, kernels_table
    from dsv4.kernels.ops import cases, checks

    device = torch.device("cuda")
    library = open_library(device, location, "dsv4 bench kernels")
    machine = measure_machine(device)
    chosen = [
        case
        for model in models
        for case in (
            checks(DRAFTING[model], model, operations)
            if unusual
            else cases(DRAFTING[model], model, counts, operations)
        )
        if shape in case.shape
    ]
    lines = []
    for line in measure(chosen, library, machine, device, timed=not unusual):
        lines.append(line)
        err.print(kernel_line(line))
    if as_json:
        print_json(
            {
                "machine": dataclasses.asdict(machine),
                "lines": [dataclasses.asdict(line) for line in lines],
            }
        )
    else:
        show(kernels_table(lines, machine))
    if any(line.faults for line in lines):
        raise SystemExit(1)


@bench.command("decode")
@click.argument("store", required=False, type=click.Path(path_type=Path, exists=True))
@click.option(
    "--experts",
    type=ExpertsPlace(),
    multiple=True,
    metavar="auto|SIZE",
    help="Of STORE, on the GPU; may be given several times.  [default: auto]",
)
@click.option("--skew", is_flag=True, help="Experts of STORE as popular as a release's are.")
@click.option("--tokens", type=click.IntRange(min=1), default=512, help="Of STORE: tokens to draw.")
@click.option("--model", type=click.Choice(tuple(MODELS)), default="flash", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--context", type=click.IntRange(min=1), default=8192, show_default=True)
@click.option("--rows", default="1,2,4,8", show_default=True, help="Tokens at once.")
@click.option(
    "--draft", is_flag=True, help="Proposals of DSpark's layers and whole rounds instead."
)
@click.option(
    "--pruned",
    type=click.IntRange(min=1),
    metavar="N",
    help="So many experts a layer, in the backbone and in draft layers.  [default: the model's]",
)
@click.option("--no-check", is_flag=True, help="Skip the comparison with the reference.")
@click.option("--kernels", "location", type=click.Path(path_type=Path), help="Their folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def bench_decode(
    store: Path | None,
    experts: tuple[Any, ...],
    skew: bool,
    tokens: int,
    model: str,
    layers: int,
    context: int,
    rows: str,
    draft: bool,
    pruned: int | None,
    no_check: bool,
    location: Path | None,
    as_json: bool,
) -> None:
    """A step of the first layers of a real model, random weights: correctness, time, bound.

    Of STORE: all of it, with experts in two places.
    """
    of_store = ("experts", "skew", "tokens")
    of_layers = ("model", "layers", "context", "rows", "draft", "pruned", "no_check", "location")
    _refuse_idle_options(of_layers if store is not None else of_store, _when(store))
    if store is not None:
        _streaming(store, experts or ("auto",), skew, tokens, as_json)
        return
    config = (DRAFTING if draft else MODELS)[model]
    if pruned is not None:
        config = dataclasses.replace(config, n_routed_experts=pruned)
    if draft:
        _refuse_idle_options(("rows",), "with --draft")
        _drafting(config, model, layers, context, not no_check, location, as_json)
        return
    from dsv4.kernels.ops.gemv.contract import MAX_ROWS

    counts = numbers(rows, most=MAX_ROWS)
    import torch

    from dsv4.bench.decode import decode, few_layers
    from dsv4.bench.kernels import open_library
    from dsv4.commands.bench_tables import decode_table

    device = torch.device("cuda")
    library = open_library(device, location, "dsv4 bench decode")
    report = decode(
        few_layers(config, layers),
        model,
        library,
        device,
        context=context,
        rows=counts,
        check=not no_check,
    )
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        show(decode_table(report))
    if not report.right:
        raise SystemExit(1)


def _when(store: Path | None) -> str:
    return "with STORE" if store is not None else "without STORE"


def _drafting(
    config: ModelConfig,
    model: str,
    layers: int,
    context: int,
    check: bool,
    location: Path | None,
    as_json: bool,
) -> None:
    import torch

    from dsv4.bench.decode import few_layers
    from dsv4.bench.draft import draft
    from dsv4.bench.kernels import open_library
    from dsv4.commands.bench_tables import draft_table

    device = torch.device("cuda")
    library = open_library(device, location, "dsv4 bench decode --draft")
    report = draft(few_layers(config, layers), model, library, device, context=context, check=check)
    if as_json:
        print_json(dataclasses.asdict(report) | {"right": report.right})
    else:
        show(draft_table(report))
    if not report.right:
        raise SystemExit(1)


def _refuse_idle_options(names: Sequence[str], when: str) -> None:
    """Raise UsageError for an option that was given and would change nothing."""
    context = click.get_current_context()
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in names and source is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{option.opts[0]} does nothing {when}; leave it out")


def _streaming(
    store: Path, placements: tuple[Any, ...], skew: bool, tokens: int, as_json: bool
) -> None:
    from dsv4.bench.streaming import measure
    from dsv4.commands.bench_tables import streaming_table

    found = measure(
        store, placements, skew=skew, tokens=tokens, say=lambda text: err.print(text, markup=False)
    )
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        show(streaming_table(found))
    if not found.right:
        raise SystemExit(1)


@bench.command("prompt")
@click.option("--model", type=click.Choice(tuple(MODELS)), default="flash", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--tokens", type=click.IntRange(min=1), default=8192, show_default=True)
@click.option("--chunks", default="2048,1024,512,256,0", show_default=True, help="0: steps of 8.")
@click.option("--kernels", "location", type=click.Path(path_type=Path), help="Their folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def bench_prompt(
    model: str, layers: int, tokens: int, chunks: str, location: Path | None, as_json: bool
) -> None:
    """Reading a prompt, on the first layers of a real model, random weights."""
    import torch

    from dsv4.bench.decode import few_layers
    from dsv4.bench.kernels import open_library
    from dsv4.bench.prompt import measure
    from dsv4.commands.bench_tables import prompt_table

    device = torch.device("cuda")
    library = open_library(device, location, "dsv4 bench prompt")
    config, sizes = few_layers(MODELS[model], layers), numbers(chunks, least=0)
    report = measure(config, model, library, device, tokens=tokens, chunks=sizes)
    if as_json:
        print_json(
            dataclasses.asdict(report.machine)
            | {"model": model, "layers": layers}
            | {"lines": [(o.chunk, o.tokens, o.seconds, o.right) for o in report.lines]}
        )
    else:
        show(prompt_table(report))
    if not all(one.right for one in report.lines):
        raise SystemExit(1)


@bench.command("store")
@click.argument("directory", type=click.Path(path_type=Path))
@shape_options
@click.option("--recipe", type=click.Choice(RECIPE_NAMES), default=DEFAULT_RECIPE)
@click.option("--draft", is_flag=True, help="With the release's draft layer.")
@click.option("--dspark", is_flag=True, help="With DSpark's draft layers instead.")
@click.option(
    "--distinct",
    type=click.IntRange(min=1),
    metavar="N",
    help="Only N layers have files of their own on the disk; the others are links to them.",
)
@workers_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def bench_store(
    directory: Path,
    recipe: str,
    draft: bool,
    dspark: bool,
    distinct: int | None,
    workers: int | None,
    as_json: bool,
    **shape: Any,
) -> None:
    """Make a packed store of real shapes and meaningless numbers in DIRECTORY, without a source.

    In memory, if DIRECTORY is: /dev/shm/NAME. It is valid, but nothing promises that it survives
    a power loss.
    """
    from dsv4.commands.bench_tables import made_table
    from dsv4.formats.model.inventory import DraftKind
    from dsv4.synthetic.store import make_store, shaped

    if draft and dspark:
        raise click.UsageError("--draft and --dspark are two kinds of draft layers; choose one")
    kind = DraftKind.DSPARK if dspark else DraftKind.MTP if draft else DraftKind.NONE
    made = make_store(
        directory,
        shaped(**shape, dspark=dspark),
        recipe=recipe,
        draft=kind,
        workers=workers,
        distinct=distinct,
    )
    if as_json:
        print_json(dataclasses.asdict(made) | {"path": str(made.path)})
    else:
        show(made_table(made))


@bench.command("serve")
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--clients", default="1,4,8,16", show_default=True, help="Jobs at a time.")
@click.option(
    "--prompt",
    "prompt_tokens",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Tokens of a prompt.",
)
@click.option(
    "--answer",
    "answer_tokens",
    type=click.IntRange(min=2),
    default=256,
    show_default=True,
    help="Tokens of an answer.",
)
@click.option("--slots", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--device", type=Device(), default="cuda", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def bench_serve(
    store: Path,
    clients: str,
    prompt_tokens: int,
    answer_tokens: int,
    slots: int,
    device: str,
    as_json: bool,
) -> None:
    """The engine behind `dsv4 serve` under the load of several clients."""
    import dsv4
    from dsv4.bench.serve import measure, room_for, with_bare_steps
    from dsv4.commands.bench_tables import serve_table
    from dsv4.serve.engine_choice import Wanted, make_engine

    packed = dsv4.open(store)
    room = room_for(prompt_tokens, answer_tokens)
    # Its prompts are meaningless: no counts, and no drafts from what they happen to repeat.
    wanted = Wanted(device, slots, room, queue=1024, count=False, draft="off")
    engine = make_engine(packed, wanted, lambda phase: None)
    try:
        lines, again = measure(
            engine,
            packed.config.vocab_size,
            clients=numbers(clients),
            prompt_tokens=prompt_tokens,
            answer_tokens=answer_tokens,
        )
    finally:
        engine.close(finish=False)
    lines = with_bare_steps(lines, engine.backend)
    if as_json:
        found = [dataclasses.asdict(one) for one in lines]
        print_json({"lines": found, "again": dataclasses.asdict(again)})
    else:
        show(serve_table(packed.name, slots, lines, again))
    if not (again.right and all(one.right for one in lines)):
        raise SystemExit(1)


@bench.command("load")
@click.argument("store", required=False, type=click.Path(path_type=Path, exists=True))
@shape_options
@click.option(
    "--device", type=Device(), default="cuda", show_default=True, help="cuda, cuda:1, or cpu."
)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--readers", type=click.IntRange(min=0), default=0, help="Threads; 0: one a core, at most 12."
)
@click.option("--slot", type=Size(), default="6MiB", show_default=True, help="Of the ring, each.")
@click.option(
    "--direct/--no-direct", default=True, help="O_DIRECT for what is not in the page cache."
)
@click.option("--cold/--no-cold", default=True, help="Also from the disk.")
@click.option("--peers/--no-peers", default=True, help="Also safetensors and fastsafetensors.")
@click.option("--dir", "directory", type=click.Path(path_type=Path, exists=True), default=".")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def bench_load(
    store: Path | None,
    device: str,
    rounds: int,
    readers: int,
    slot: int,
    direct: bool,
    cold: bool,
    peers: bool,
    directory: Path,
    as_json: bool,
    **shape: Any,
) -> None:
    """STORE, or one of real shapes, onto a device: beside its bounds and beside other loaders."""
    import torch

    from dsv4.bench.load import measure, require_device
    from dsv4.commands.bench_tables import loading_tables
    from dsv4.runtime.load import Settings
    from dsv4.synthetic.store import make_store, shaped

    require_device(torch.device(device))
    with tempfile.TemporaryDirectory(prefix="dsv4-bench-", dir=directory) as scratch:
        if store is None:
            store = make_store(Path(scratch, "store"), shaped(**shape)).path
        found = measure(
            store,
            Path(scratch),
            torch.device(device),
            settings=Settings(readers=readers, slot_nbytes=slot, direct=direct),
            rounds=rounds,
            cold=cold,
            peers=peers,
            say=lambda text: err.print(text),
        )
    if as_json:
        print_json(dataclasses.asdict(found))
    else:
        for table in loading_tables(found):
            show(table)
    if not all(line.correct for line in found.lines):
        raise SystemExit(1)
