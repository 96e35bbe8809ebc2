"""The command line: parses, calls one function, renders with rich. No logic lives here.

Data goes to stdout, progress and warnings to stderr; exit codes are in `endings`.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import dsv4
from dsv4.bench_cli import bench
from dsv4.console import err, out, print_json
from dsv4.endings import EXIT_FAILED, endings, terminate
from dsv4.formats.errors import RuntimeRefusal
from dsv4.kernels_cli import kernels
from dsv4.options import (
    keep_option,
    memory_option,
    recipe_option,
    revision_option,
    validate_options,
    workers_option,
)
from dsv4.parity_cli import bench_parity

if TYPE_CHECKING:
    from dsv4.runtime.generate import Timings
    from dsv4.runtime.gpu.model import GpuModel
    from dsv4.runtime.model import Model
    from dsv4.runtime.sampling import Sampler
    from dsv4.runtime.text import Text
    from dsv4.runtime.timeline import Timeline


def main() -> None:
    """Entry point."""
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
    """Say what converting SRC would read, write and round, from headers alone."""
    from dsv4.convert.forecast import budget_for, forecast
    from dsv4.convert.open_source import open_source
    from dsv4.convert.plan import make_plan
    from dsv4.convert.recipes import make_recipe
    from dsv4.render import plan_table

    opened = open_source(source, revision)
    planned = make_plan(opened, make_recipe(recipe, keep))
    expected = forecast(planned, opened, budget_for(planned, opened, memory, workers))
    document = planned.to_dict() | expected.to_dict()
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


@cli.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--prompt", help="Answer TEXT and leave; without it, an interactive chat.")
@click.option("--tokens", metavar="1,2,3", help="Continue these token ids and leave.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Bound on the answer.")
@click.option("--temperature", type=float, help="0 is greedy; default: the checkpoint's.")
@click.option("--top-p", type=float, help="Nucleus; default: the checkpoint's.")
@click.option("--seed", type=int, help="Equal seeds give equal answers.")
@click.option(
    "--device",
    type=click.Choice(("auto", "cpu", "cuda")),
    default="auto",
    help="auto: the GPU where torch sees one, else the CPU.",
)
@click.option("--max-seq-len", type=click.IntRange(min=1), default=8192, show_default=True)
@click.option("--raw", is_flag=True, help="Skip the chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document at the end.")
def run(
    directory: Path,
    prompt: str | None,
    tokens: str | None,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    device: str,
    max_seq_len: int,
    raw: bool,
    as_json: bool,
) -> None:
    """Stream text from a packed store. Without --prompt or --tokens it is a chat."""
    from dsv4.runtime.driver import wake
    from dsv4.runtime.timeline import Timeline

    timeline = Timeline()
    timeline.mark("interpreter")
    if device != "cpu":
        wake()
    from dsv4.runtime.answer import encode_prompt, parse_tokens, sampling_defaults
    from dsv4.runtime.sampling import Sampler
    from dsv4.runtime.text import Text

    if prompt is not None and tokens is not None:
        raise click.UsageError("--prompt and --tokens exclude each other")
    signal.signal(signal.SIGTERM, terminate)
    timeline.mark("imports")
    packed = dsv4.open(directory)
    model = dsv4.load(packed, device=_device(device), mark=timeline.mark)
    timeline.mark("weights ready")
    for line in model.load_lines():
        err.print(line, markup=False, highlight=False)
    assets = packed.store.assets
    text = Text.from_file(assets["tokenizer.json"]) if "tokenizer.json" in assets else None
    defaults = sampling_defaults(assets.get("generation_config.json"))
    sampler = Sampler(
        defaults[0] if temperature is None else temperature,
        defaults[1] if top_p is None else top_p,
        seed,
        allowed=model.config.vocab_size if text is None else text.vocab_size,
    )
    if prompt is None and tokens is None:
        _chat(model, _required(text), sampler, max_new_tokens, max_seq_len, raw or as_json)
        return
    ids = (
        parse_tokens(tokens)
        if tokens is not None
        else encode_prompt(prompt or "", _required(text), raw=raw)
    )
    _answer_once(model, text, ids, sampler, max_new_tokens or DEFAULT_NEW_TOKENS, timeline, as_json)


def _answer_once(
    model: Model | GpuModel,
    text: Text | None,
    ids: list[int],
    sampler: Sampler,
    limit: int,
    timeline: Timeline,
    as_json: bool,
) -> None:
    from dsv4.runtime.answer import answer

    session = model.session(max_seq_len=len(ids) + limit)
    timeline.mark("session")

    def write(piece: str) -> None:
        timeline.mark("first token")
        if not as_json:
            _write(piece)

    result = answer(
        session,
        ids,
        sampler,
        text=text,
        max_new_tokens=limit,
        eos_token_ids=model.config.eos_token_ids,
        write=write,
    )
    if as_json:
        print_json(result.to_dict() | {"start": timeline.phases})
        return
    _write("\n")
    err.print(_summary(result.timings))
    err.print(timeline.line(), markup=False, highlight=False, soft_wrap=True)


def _summary(timings: Timings) -> str:
    return (
        f"{timings.prompt_tokens} prompt tokens, {timings.generated_tokens} generated, first after "
        f"{timings.first_token_seconds:.2f} s, then {timings.tokens_per_second:.1f} tokens/s"
    )


DEFAULT_NEW_TOKENS = 256


def _device(chosen: str) -> str:
    import torch

    if chosen != "auto":
        return chosen
    return "cuda" if torch.cuda.is_available() else "cpu"


def _required(text: Text | None) -> Text:
    if text is None:
        raise RuntimeRefusal(
            "the store carries no tokenizer.json; give --tokens, or convert a source that has one"
        )
    return text


def _chat(
    model: Model | GpuModel,
    text: Text,
    sampler: Sampler,
    max_new_tokens: int | None,
    max_seq_len: int,
    wrong_flags: bool,
) -> None:
    from dsv4.runtime.chat import Chat, interactive

    if wrong_flags:
        raise click.UsageError("--raw and --json need --prompt or --tokens")
    chat = Chat(
        model.session(max_seq_len=max_seq_len),
        text,
        sampler,
        eos_token_ids=model.config.eos_token_ids,
        max_new_tokens=max_new_tokens,
    )

    def read_line() -> str:
        if sys.stdin.isatty():
            return input("> ")
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line

    interactive(chat, read_line, _write, lambda note: click.echo(note, err=True, nl=False))


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


bench.add_command(bench_parity)
cli.add_command(bench)
cli.add_command(kernels)
