"""`dsv4 fit`: what of a model fits on a GPU, and how fast it is there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsv4.commands.console import print_json, show, waiting
from dsv4.commands.exit_codes import EXIT_FAILED
from dsv4.commands.options import (
    Size,
    experts_option,
    keep_option,
    recipe_option,
    revision_option,
)
from dsv4.convert.sources.open import check_name
from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.plain_text import counted, size
from dsv4.formats.store_place import JOURNAL, MARKER, NODE_DOCUMENT

if TYPE_CHECKING:
    from dsv4.convert.plan import Plan
    from dsv4.convert.sources.base import Source
    from dsv4.formats.store.matrix_views import Nodes
    from dsv4.runtime.fit import Fit
    from dsv4.runtime.load.placement import Counts
    from dsv4.runtime.machines import Gpu

GPUS = ("h100", "h200", "h100-nvl", "h20", "b200")


@click.command()
@click.argument("place", metavar="DIR|SRC")
@click.option(
    "--gpu", "name", metavar="NAME", help=f"{', '.join(GPUS)}.  [default: this machine's]"
)
@click.option("--gpus", type=click.IntRange(1, 64), default=1, show_default=True, help="How many.")
@click.option("--gpu-memory", type=Size(), help="Memory of one, in place of the named one's.")
@click.option("--host-memory", type=Size(), help="For experts that no GPU holds, of the machine.")
@click.option("--context", type=click.IntRange(min=1), help="Tokens of a sequence; default: 8192.")
@experts_option
@click.option(
    "--routes",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Counts of experts to place by; default: those that runs kept of a store.",
)
@recipe_option
@keep_option
@revision_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def fit(
    place: str,
    name: str | None,
    gpus: int,
    gpu_memory: int | None,
    host_memory: int | None,
    context: int | None,
    experts: Any,
    routes: Path | None,
    recipe: str,
    keep: tuple[str, ...],
    revision: str | None,
    as_json: bool,
) -> None:
    """Say what fits on a GPU, what stays there, and how fast it runs.

    Of a packed store, or of a checkpoint as --recipe would pack it, of which only headers are read.
    On this machine's GPU, or on one that is described. Exit code 1 if it does not fit.
    """
    opened = is_store(place)
    if not opened:
        check_name(place, revision)  # a wrong name is refused before torch is imported
    from dsv4.runtime import fit as fitting
    from dsv4.runtime.load.plan import ALONE, Share

    gpu, free, host = _machine(name, gpu_memory, host_memory)
    nodes = _store(place) if opened else _planned(place, revision, recipe, keep)
    share = ALONE if gpus == 1 else Share(0, gpus, "expert", "tensor")
    needs = fitting.needs_of(nodes, context, share)
    counts = _counts(nodes, routes)
    found = fitting.fit(needs, gpu, free=free, gpus=gpus, host=host, experts=experts, counts=counts)
    remedies = [] if found.fits else list(fitting.remedies(nodes, found))
    if as_json:
        print_json(found.to_dict() | {"name": place, "remedies": remedies})
    else:
        show(*_lines(place, found, remedies))
    if not found.fits:
        sys.exit(EXIT_FAILED)


def is_store(place: str) -> bool:
    """Whether a packed store lies there, finished or not."""
    return any((Path(place) / name).exists() for name in (MARKER, NODE_DOCUMENT, JOURNAL))


def _store(place: str) -> Nodes:
    from dsv4.formats.store.reader import PackedStore

    return PackedStore.open(place)


def _counts(nodes: Nodes, routes: Path | None) -> Counts | None:
    """What `dsv4 run` would place by. Raises RuntimeRefusal for a file that does not hold it."""
    from dsv4.formats.store.reader import PackedStore
    from dsv4.runtime.load.routes import default_file, read_routes

    root = str(nodes.manifest["root"]) if isinstance(nodes, PackedStore) else None
    if routes is None and root is None:
        return None
    if routes is not None and not routes.exists():
        raise RuntimeRefusal(f"{routes} cannot be read: there is no such file")
    shape = nodes.config.num_hidden_layers, nodes.config.n_routed_experts
    return read_routes(routes or default_file(root or ""), root, shape).counts


def _planned(place: str, revision: str | None, recipe: str, keep: tuple[str, ...]) -> Nodes:
    """Of the store that a checkpoint would become."""
    from dsv4.convert.metadata import planned_nodes

    _, plan = planned_store(place, revision, recipe, keep, on_wait=waiting())
    return planned_nodes(plan, place)


def planned_store(
    place: str,
    revision: str | None,
    recipe: str,
    keep: tuple[str, ...],
    *,
    on_wait: Callable[[str], None] | None,
) -> tuple[Source, Plan]:
    """A checkpoint, from its headers, and what packing it would make. Raises as `make_plan`."""
    from dsv4.convert.keep import refuse_idle_keep
    from dsv4.convert.plan import make_plan
    from dsv4.convert.sources.open import open_source
    from dsv4.formats.model.recipes import make_recipe

    source = open_source(place, revision, on_wait=on_wait)
    plan = make_plan(source, make_recipe(recipe, keep))
    refuse_idle_keep(plan)
    return source, plan


def _machine(name: str | None, memory: int | None, host: int | None) -> tuple[Gpu, int, int | None]:
    """-> (the GPU, its free bytes, free bytes of host memory if known)."""
    import torch

    from dsv4.runtime import machines
    from dsv4.runtime.load.arena import free_memory

    if name is not None or memory is not None:
        gpu = machines.unknown(memory or 0) if name is None else machines.find(name)
        gpu = gpu if memory is None else gpu.of(memory)
        return gpu, gpu.free, host
    if not torch.cuda.is_available():
        raise RuntimeRefusal(
            "this machine has no GPU that torch sees; describe one: --gpu h200, or --gpu-memory "
            "80GB"
        )
    device = torch.device("cuda")
    free, _ = free_memory(device)
    gpu = machines.like(torch.cuda.get_device_name(device), free + machines.CONTEXT)
    return gpu, free, free_memory(torch.device("cpu"))[0] if host is None else host


def _lines(place: str, found: Fit, remedies: list[str]) -> list[str]:
    """The answer for people."""
    needs, gpu, sizes = found.needs, found.gpu, found.needs.experts
    each = "" if found.gpus == 1 else " each"
    core = ", ".join(f"{kind} {size(n)}" for kind, n in needs.core.items() if n)
    rows = [
        ("on", f"{counted(found.gpus, gpu.name, f'{gpu.name}s')}, {size(found.free)}{each} free"),
        ("core", f"{size(sum(needs.core.values()))}: {core}"),
        (
            "experts",
            f"{size(sizes.nbytes)}: {len(sizes.records)} layers x {sizes.experts} x "
            f"{size(sizes.record_nbytes)}",
        ),
        ("weights", f"{size(needs.arena + sizes.nbytes)} together"),
        ("caches", f"{size(needs.session.caches)}: {needs.context:,} tokens"),
        ("scratch", f"{size(needs.session.scratch)}, angles {size(needs.session.tables)}"),
        ("needed", f"{size(needs.whole)} with every expert resident, kept free included"),
    ]
    if needs.draft:
        why = found.without_drafts
        loaded = "loaded too" if why is None else f"left out: {why}"
        rows.append(("draft", f"{size(needs.draft)}: {loaded}"))
    if found.resident:
        spare = f", {found.spare:,} spare records" if found.spare else ""
        rows.append(("resident", f"{found.resident:,} of {sizes.total:,} experts{spare}"))
    if found.elsewhere:
        known = " (not checked)" if found.host is None else f" of {size(found.host)}"
        rows.append(("host memory", f"{size(found.pinned)}{known} for {found.elsewhere:,} experts"))
    rows += [("speed" if n == 0 else "", line) for n, line in enumerate(found.arithmetic())]
    yes = "yes"
    if found.elsewhere and found.host is None:
        yes = "the GPU: yes; --host-memory SIZE checks the host's memory too"
    rows.append(("fits", yes if found.fits else f"no: {'; '.join(found.reasons)}"))
    rows += [("would fit" if n == 0 else "", line) for n, line in enumerate(remedies)]
    width = max(len(key) for key, _ in rows)
    return [f"fit of {place}", *(f"{key:<{width}}  {text}" for key, text in rows)]
