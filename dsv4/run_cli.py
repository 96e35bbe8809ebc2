"""`dsv4 run`: text from a packed store."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

import dsv4
from dsv4.console import err, print_json
from dsv4.endings import terminate
from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.store.schema import ASSET_DIRECTORY

if TYPE_CHECKING:
    from dsv4.runtime.generate import Timings
    from dsv4.runtime.gpu.model import GpuModel
    from dsv4.runtime.model import Model
    from dsv4.runtime.sampling import Sampler
    from dsv4.runtime.text import Text
    from dsv4.runtime.timeline import Timeline

DEFAULT_NEW_TOKENS = 256


@click.command()
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
    if assets:
        packed.store.verify(ASSET_DIRECTORY)  # what they say is the source's word from here on
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
