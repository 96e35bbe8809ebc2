"""`dsv4 run`: text from a packed store."""

from __future__ import annotations

import functools
import io
import os
import signal
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text as Plain

import dsv4
from dsv4.commands.console import err, notice, print_json, say_absent
from dsv4.commands.exit_codes import terminate
from dsv4.commands.run_options import Wish, run_options
from dsv4.formats.errors import DraftRefusal
from dsv4.formats.store_place import refuse_no_store

if TYPE_CHECKING:
    from dsv4.formats.checkpoint import PackedCheckpoint
    from dsv4.runtime.gpu.model import GpuModel
    from dsv4.runtime.model import Model
    from dsv4.runtime.session import SequenceBase
    from dsv4.runtime.startup_clock import Timeline
    from dsv4.runtime.text.drafting import Drafter
    from dsv4.runtime.text.drafting import Wish as Draft
    from dsv4.runtime.text.generate import Timings
    from dsv4.runtime.text.pieces import Part
    from dsv4.runtime.text.request import Request

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")


@click.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@run_options
def run(directory: Path, **options: Any) -> None:
    """Stream text from a packed store. Without --prompt or --tokens it is a chat."""
    wish = Wish(**options)
    refuse_no_store(directory)
    from dsv4.runtime.startup_clock import Timeline

    timeline = Timeline()
    timeline.mark("interpreter")
    signal.signal(signal.SIGTERM, terminate)
    if not wish.as_json and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # whatever the model says comes out
    with _loading(directory):
        packed, request, model = _prepared(directory, wish, timeline)
    if wish.verbose:
        for line in model.load_lines():
            err.print(line, markup=False)
    try:
        if wish.is_chat:
            _chat(packed, model, request, wish)
        else:
            _answer_once(model, request, wish, timeline)
    except KeyboardInterrupt:
        model.write_routes(wish.routes)
        raise
    model.write_routes(wish.routes)


def _loading(directory: Path) -> AbstractContextManager[object]:
    """Something that moves, where somebody looks."""
    if not err.is_terminal:
        return nullcontext()
    return err.status(Plain(f"loading {directory.name}"), spinner_style="dim")


def _prepared(
    directory: Path, wish: Wish, timeline: Timeline
) -> tuple[PackedCheckpoint, Request, Model | GpuModel]:
    """Everything that can be refused is, and then the weights are loaded."""
    from dsv4.runtime.cuda_driver import wake
    from dsv4.runtime.threads import choose_threads, wait_asleep

    wait_asleep(os.environ)
    if wish.device != "cpu":
        wake()
    from dsv4.runtime.place import choose_place
    from dsv4.runtime.text.chat import Template
    from dsv4.runtime.text.request import make_request

    timeline.mark("imports")
    packed = dsv4.open(directory)
    say_absent(packed)
    request = make_request(
        packed,
        prompt=wish.prompt if wish.raw else wish.prompt and wish.prompt.removesuffix("\n"),
        tokens=wish.tokens,
        raw=wish.raw,
        template=Template(wish.system, wish.think, wish.effort),
        stop=wish.stop,
        max_new_tokens=wish.max_new_tokens,
        max_seq_len=wish.max_seq_len,
        sampling={name: getattr(wish, name) for name in SAMPLING},
    )
    for sentence in request.notices:
        notice(sentence)
    place = choose_place(wish.device, packed.store)
    if place.notice is not None:
        notice(place.notice)
    if place.device == "cpu":
        choose_threads(packed.store)
    elif (reason := request.sampler.host_reason()) is not None:
        notice(reason)
    timeline.mark("tokenizer")
    load = functools.partial(
        dsv4.load,
        packed,
        device=place.device,
        experts=wish.experts,
        routes=wish.routes,
        max_seq_len=request.max_seq_len,
        mark=timeline.mark,
    )
    try:
        model = load(drafts=wish.draft not in ("off", 0))
    except DraftRefusal as error:
        if wish.draft != "auto":
            raise
        notice(str(error))
        model = load(drafts=False)
    timeline.mark("weights ready")
    for sentence in model.notices:
        notice(sentence)
    return packed, request, model


def _answer_once(model: Model | GpuModel, request: Request, wish: Wish, timeline: Timeline) -> None:
    from dsv4.commands.chat_terminal import Writer, say
    from dsv4.runtime.text.oneshot import answer

    ids, limit = request.ids or [], request.max_new_tokens or 1
    session = model.session(max_seq_len=request.max_seq_len)
    timeline.mark("session")
    writer = Writer()

    def write(part: Part) -> None:
        timeline.mark("first token")
        if not wish.as_json:
            writer.show(part)

    result = answer(
        session,
        ids,
        request.sampler,
        write,
        text=request.text,
        max_new_tokens=limit,
        stop_ids=request.stop_ids,
        thinking=request.template.thinking,
        stop=request.stop,
        drafter=_drafter(session, wish.draft),
    )
    if wish.as_json:
        print_json(result.to_dict() | {"start": timeline.phases})
    else:
        writer.end()
        if result.finish == "length":
            say(f"cut after {limit} tokens; {request.cut}")
        if not wish.quiet:
            say(_summary(result.timings))
    drafts = result.timings.drafts
    if wish.draft != "auto" and drafts is not None and (warning := drafts.warning()) is not None:
        notice(warning)
    if wish.verbose:
        say(timeline.line())
    if result.finish == "interrupted":
        raise KeyboardInterrupt


def _drafter(session: SequenceBase, wish: Draft) -> Drafter | None:
    from dsv4.runtime.text.drafting import drafter, remark

    if (sentence := remark(session, wish)) is not None:
        notice(sentence)
    return drafter(session, wish)


def _summary(timings: Timings) -> str:
    line = (
        f"{timings.prompt_tokens} prompt tokens, {timings.generated_tokens} generated, first after "
        f"{timings.first_token_seconds:.2f} s, then {timings.tokens_per_second:.1f} tokens/s"
    )
    drafts = "" if timings.drafts is None else timings.drafts.line()
    return f"{line}; {drafts}" if drafts else line


def _chat(packed: PackedCheckpoint, model: Model | GpuModel, request: Request, wish: Wish) -> None:
    from dsv4.commands.chat_terminal import open_screen
    from dsv4.runtime.text.chat import Chat
    from dsv4.runtime.text.repl import interactive

    session = model.session(max_seq_len=request.max_seq_len)
    chat = Chat(
        session,
        request.needed_text,
        request.sampler,
        template=request.template,
        eos_token_ids=request.stop_ids,
        max_new_tokens=request.max_new_tokens,
        stop=request.stop,
        drafter=_drafter(session, wish.draft),
    )
    screen = open_screen(quiet=wish.quiet)
    # From here on Ctrl-C ends an answer, whatever is imported for it, and not the program.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if screen.editing:
        screen.note(f"{packed.name}; /help lists the commands, Ctrl-D leaves")
    interactive(chat, screen)
