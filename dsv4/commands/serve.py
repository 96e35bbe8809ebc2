"""`dsv4 serve`: a packed store behind HTTP."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import dsv4
from dsv4.commands.console import err, notice, say_absent
from dsv4.commands.options import Size, draft_option, experts_option, routes_option
from dsv4.formats.store_place import refuse_no_store

if TYPE_CHECKING:
    from dsv4.serve.server import Access

EFFORTS = ("none", "low", "high", "max")


@click.command()
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes a free one.",
)
@click.option(
    "--api-key",
    "keys",
    multiple=True,
    envvar="DSV4_API_KEY",
    metavar="KEY",
    help="Let in who has it; may be given several times.  [env: DSV4_API_KEY]",
)
@click.option("--no-auth", is_flag=True, help="Listen beyond this machine without a key.")
@click.option(
    "--served-name",
    "names",
    multiple=True,
    metavar="NAME",
    help="What requests call the model; may be given several times.  [default: DIR's name]",
)
@click.option(
    "--device",
    type=click.Choice(("auto", "cpu", "cuda")),
    default="auto",
    show_default=True,
    help="auto: the GPU where it can be used, else the CPU.",
)
@click.option(
    "--slots",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="N",
    help="Sequences at a time.",
)
@click.option(
    "--max-seq-len",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens of a sequence, prompt and answer; default: 32768, or the model's if less.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Bound on every answer; default: the room that its prompt leaves.",
)
@click.option(
    "--queue",
    type=click.IntRange(min=0),
    metavar="N",
    help="Requests that may wait; default: four a slot.",
)
@click.option(
    "--max-pause",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    metavar="MS",
    help="How long an answer may stand still while another prompt is read; longer where the "
    "smallest chunk takes longer, as with experts in host memory.",
)
@click.option(
    "--prefix-memory",
    type=Size(),
    default="4GiB",
    show_default=True,
    metavar="SIZE",
    help="Host memory for beginnings of prompts that may come again; 0 for none.",
)
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep beginnings of prompts here too, beyond the process.  [default: nowhere]",
)
@click.option(
    "--cache-size",
    type=Size(),
    default="32GiB",
    show_default=True,
    metavar="SIZE",
    help="Most bytes in --cache-dir; what was unused for longest goes.",
)
@click.option(
    "--reproducible",
    is_flag=True,
    help="Same bytes for a prompt whether or not its beginning was remembered; earlier answers are "
    "read again as prompt, which is slower.",
)
@experts_option
@routes_option
@draft_option
@click.option(
    "--effort",
    type=click.Choice(EFFORTS),
    default="high",
    show_default=True,
    help="How long a request reasons that does not say.",
)
@click.option(
    "--request-timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Bound on the time of an answer; default: none.",
)
@click.option(
    "--max-body",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    metavar="MIB",
    help="Largest body of a request.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="What SIGTERM leaves running answers.",
)
@click.option(
    "--allowed-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    help="A name besides localhost that browsers may call this machine by.",
)
@click.option("--open-metrics", is_flag=True, help="Show /metrics without a key.")
@click.option("--no-page", is_flag=True, help="No page at /.")
@click.option("--quiet", is_flag=True, help="No line for each request.")
def serve(directory: Path, **options: Any) -> None:
    """Answer OpenAI's and Anthropic's clients from a packed store.

    /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages, /v1/models; /health, /ready
    and /metrics; a page to talk to at /. SIGTERM finishes what runs and exits 0.
    """
    access = _access(options)
    refuse_no_store(directory)
    from dsv4.runtime.cuda_driver import wake
    from dsv4.runtime.threads import choose_threads, wait_asleep

    wait_asleep(os.environ)
    if options["device"] != "cpu":
        wake()
    from dsv4.runtime.place import choose_place
    from dsv4.serve.engine_choice import Wanted, make_engine
    from dsv4.serve.host import Host, address_of, bind, log_to_stderr
    from dsv4.serve.jobs import Engine
    from dsv4.serve.model import open_model
    from dsv4.serve.server import MIB, Limits, Server

    packed = dsv4.open(directory)
    say_absent(packed)
    model = open_model(packed, options["names"], effort=options["effort"])
    place = choose_place(options["device"], packed.store)
    for sentence in (*model.notices, *filter(None, [place.notice])):
        notice(sentence)
    if place.device == "cpu":
        choose_threads(packed.store)
    limits = Limits(
        options["max_body"] * MIB, options["request_timeout"], options["max_new_tokens"]
    )
    wanted = Wanted(
        place.device,
        options["slots"],
        options["max_seq_len"],
        options["queue"],
        options["max_pause"] / 1000,
        options["prefix_memory"],
        options["cache_dir"],
        options["cache_size"],
        options["reproducible"],
        options["experts"],
        options["routes"],
        draft=options["draft"],
    )
    server = Server(model, limits=limits, access=access, page=not options["no_page"])
    bound = bind(options["host"], options["port"])
    _say(f"loading {packed.name}; {address_of(bound)}/ready shows how far it is")
    if not options["quiet"]:
        log_to_stderr()

    def load() -> Engine:
        def mark(phase: str) -> None:
            server.phase = phase

        return make_engine(packed, wanted, mark)

    Host(server, bound, load, _say, grace=options["grace"]).run()


def _say(sentence: str) -> None:
    err.print(sentence)


def _access(options: dict[str, Any]) -> Access:
    """Who may ask. Raises click.UsageError for a server that would be open to a network."""
    keys: tuple[str, ...] = tuple(options["keys"])
    if any(not key.strip() for key in keys):
        raise click.BadParameter("the key is empty", param_hint="'--api-key'")
    local = _is_local(options["host"])
    if not local and not keys and not options["no_auth"]:
        raise click.UsageError(
            f"--host {options['host']} is reached from other machines and there is no --api-key; "
            "give one, or --no-auth to let everybody in"
        )
    from dsv4.serve.server import Access

    names = frozenset(name.lower() for name in options["hosts"])
    guarded = local and not keys
    hosts = frozenset({"localhost", "127.0.0.1", "::1", options["host"].lower()}) | names
    return Access(
        tuple(key.strip() for key in keys), hosts if guarded else None, options["open_metrics"]
    )


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
