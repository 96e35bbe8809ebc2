"""`dsv4 info`: what a store or a checkpoint is, as a person asks: model, sizes, what it needs."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsv4.commands.console import err, print_json, say_absent, show, waiting
from dsv4.commands.fit import is_store, planned_store
from dsv4.commands.options import keep_option, recipe_option, revision_option
from dsv4.commands.tables import facts_table, recipe_text, rounded_text
from dsv4.convert.sources.open import check_name
from dsv4.formats.errors import Dsv4Error
from dsv4.formats.plain_text import counted, size
from dsv4.formats.store_place import PARTS

if TYPE_CHECKING:
    from dsv4.formats.checkpoint import PackedCheckpoint
    from dsv4.formats.store.matrix_views import Nodes


@click.command()
@click.argument("place", metavar="DIR|SRC")
@recipe_option
@keep_option
@revision_option
@click.option("--context", type=click.IntRange(min=1), help="Tokens of a sequence; default: 8192.")
@click.option(
    "--values",
    is_flag=True,
    help="Of a store: read every weight and print the root of values, which stores of equal "
    "numbers share, whatever they were packed from.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def info(
    place: str,
    recipe: str,
    keep: tuple[str, ...],
    revision: str | None,
    context: int | None,
    values: bool,
    as_json: bool,
) -> None:
    """Say what DIR is: model, recipe, size, and what it takes.

    Of a packed store from its metadata; of a checkpoint, a directory or a hub id, from headers
    alone, as --recipe would pack it.
    """
    opened = is_store(place)
    if not opened:
        check_name(place, revision)  # a wrong name is refused before torch is imported
        if values:
            raise click.UsageError(f"--values is of a packed store, which {place} is not")
    document = (
        store_facts(Path(place), context, values=values, as_json=as_json)
        if opened
        else source_facts(place, revision, recipe, keep, context)
    )
    if as_json:
        print_json(document)
    else:
        show(facts_table(place, dict(_rows(document))))


def store_facts(
    place: Path, context: int | None, *, values: bool = False, as_json: bool = False
) -> dict[str, Any]:
    """What `--json` prints of a packed store. values: with its root of values.

    Raises StoreError.
    """
    from dsv4.formats.checkpoint import PackedCheckpoint
    from dsv4.formats.store.manifest import origin_of

    packed = PackedCheckpoint.open(place)
    say_absent(packed)
    manifest = packed.store.manifest
    files = packed.store.files_under(None)
    root = _values_root(packed, as_json) if values else None
    origin = origin_of(manifest)
    return {
        "place": str(place),
        "kind": "packed store",
        "name": origin.get("repo") or place.resolve().name,
        **_model_facts(packed.store),
        "recipe": manifest["recipe"],
        **_losses(packed.store),
        "disk_bytes": sum(file.nbytes for file in files),
        "files": len(files),
        **_needs(packed.store, context),
        "origin": origin,
        "tool": manifest["tool"],
        "format_version": manifest["format_version"],
        "root": manifest["root"],
        "absent": [] if packed.store.absent is None else list(packed.store.absent.parts),
        **({} if root is None else {"values_root": root}),
    }


def source_facts(
    place: str, revision: str | None, recipe: str, keep: tuple[str, ...], context: int | None
) -> dict[str, Any]:
    """What `--json` prints of a checkpoint. Raises SourceError and ConfigError."""
    from dsv4.convert.metadata import planned_nodes

    source, plan = planned_store(place, revision, recipe, keep, on_wait=waiting())
    facts = plan.to_dict()
    nodes = planned_nodes(plan, place)
    return {
        "place": place,
        "kind": "checkpoint",
        "name": source.origin.get("repo") or Path(place).resolve().name,
        **_model_facts(nodes),
        "encodings": facts["encodings"],
        "recipe": facts["recipe"],
        "rounded_tensors": facts["rounded_tensors"],
        "disk_bytes": sum(source.sizes.values()),
        "files": len(source.sizes),
        "packed_bytes": plan.output_bytes,
        **_needs(nodes, context),
        "origin": dict(source.origin),
    }


def _model_facts(nodes: Nodes) -> dict[str, Any]:
    """Shape and numbers of parameters; active: those that one token meets, without embedding."""
    from dsv4.formats.model.inventory import Kind, detect_draft, parameters

    config, contents = nodes.config, nodes.contents
    templates = [name for stack in contents.stacks.values() for name in stack.names]
    draft, stages = detect_draft([*contents.plain, *contents.matrices, *templates])
    total = active = drafted = 0
    share = config.num_experts_per_tok / config.n_routed_experts
    for one in parameters(config, draft, stages):
        if one.kind is Kind.TABLE:
            continue
        count = math.prod(one.shape)
        if one.name.startswith("mtp."):
            drafted += count
            continue
        total += count
        if one.name != "embed.weight":
            active += round(count * share) if one.kind is Kind.EXPERT else count
    return {
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "experts": config.n_routed_experts,
        "experts_per_token": config.num_experts_per_tok,
        "vocabulary": config.vocab_size,
        "parameters": total,
        "active_parameters": active,
        "draft": {"kind": str(draft), "layers": stages, "parameters": drafted},
        "context_tokens": config.max_position_embeddings,
    }


def _losses(nodes: Nodes) -> dict[str, Any]:
    """Tensors that do not equal the source, and the worst relative squared error of them."""
    from dsv4.formats.store.losses import inexact_tensors

    inexact = dict(inexact_tensors(nodes))
    worst = max(inexact, key=inexact.__getitem__, default=None)
    return {
        "rounded_tensors": list(inexact),
        "worst": None if worst is None else {"name": worst, "rel_mse": inexact[worst]},
    }


def _needs(nodes: Nodes, context: int | None) -> dict[str, Any]:
    """`gpu`: bytes that a session on one GPU needs and who has them; else `gpu_refusal`."""
    from dsv4.runtime.fit import needs_of
    from dsv4.runtime.machines import KNOWN

    try:
        needs = needs_of(nodes, context)
    except Dsv4Error as error:
        return {"gpu": None, "gpu_refusal": str(error)}
    return {
        "gpu": {
            "needed_bytes": needs.whole,
            "weights_bytes": needs.arena + needs.experts.nbytes,
            "experts_bytes": needs.experts.nbytes,
            "least_bytes": needs.beside,
            "context": needs.context,
            "hold_all": [gpu.name for gpu in KNOWN if gpu.free >= needs.whole],
            "hold_some": [gpu.name for gpu in KNOWN if needs.beside < gpu.free < needs.whole],
        }
    }


def _values_root(packed: PackedCheckpoint, as_json: bool) -> str:
    from dsv4.commands.progress import checking_progress
    from dsv4.validate.values_root import values_root

    with checking_progress(err, as_json=as_json) as progress:
        return values_root(packed, progress=progress)


def _rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """What a person reads, in the order of asking."""
    yield "what", facts["kind"]
    yield (
        "model",
        f"{facts['name']}: DeepSeek-V4, {counted(facts['layers'], 'layer')}, width "
        f"{facts['hidden_size']:,}, {facts['experts']:,} experts of which a token takes "
        f"{facts['experts_per_token']}",
    )
    active = f"{_number(facts['active_parameters'])} active a token"
    yield "parameters", f"{_number(facts['parameters'])}, {active}"
    draft = facts["draft"]
    if draft["layers"]:
        yield (
            "draft",
            f"{counted(draft['layers'], 'layer')} ({draft['kind']}), "
            f"{_number(draft['parameters'])} parameters more",
        )
    if facts.get("absent"):
        yield "left out", ", ".join(PARTS[part] for part in facts["absent"])
    yield "context", f"{facts['context_tokens']:,} tokens at most"
    if "encodings" in facts:
        found = ((kind, count) for kind, count in facts["encodings"].items() if count)
        yield "tensors", ", ".join(f"{count:,} {kind}" for kind, count in found)
    yield "recipe", recipe_text(facts["recipe"])
    yield "losses", _loss_text(facts)
    yield "on disk", f"{size(facts['disk_bytes'])} in {counted(facts['files'], 'file')}"
    if "packed_bytes" in facts:
        yield "packed", f"{size(facts['packed_bytes'])} would be written"
    yield from _gpu_rows(facts)
    yield "from", " ".join(map(str, facts["origin"].values()))
    for key, name in (("tool", "made by"), ("root", "root"), ("values_root", "root of values")):
        if key in facts:
            yield name, facts[key]
    place = shlex.quote(facts["place"])
    if "root" in facts:
        yield "next", f"dsv4 run {place}"
    else:
        yield "next", f"dsv4 convert --hf {place} --out ./packed"


def _gpu_rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    gpu = facts["gpu"]
    if gpu is None:
        yield "on a GPU", f"no: {facts['gpu_refusal']}"
        return
    yield (
        "on a GPU",
        f"{size(gpu['needed_bytes'])} with every expert there and {gpu['context']:,} tokens; "
        f"weights {size(gpu['weights_bytes'])}",
    )
    if gpu["hold_all"]:
        yield "runs on", f"one {', '.join(gpu['hold_all'])}"
    if gpu["hold_some"]:
        yield (
            "" if gpu["hold_all"] else "runs on",
            f"one {', '.join(gpu['hold_some'])} with experts in host memory "
            f"(`dsv4 fit {shlex.quote(facts['place'])}` says how many)",
        )


def _loss_text(facts: Mapping[str, Any]) -> str:
    rounded = facts["rounded_tensors"]
    if "worst" not in facts:
        return f"{rounded_text(rounded)} would be rounded; the rest would be carried exactly"
    if not rounded:
        return "none: every value equals the source's"
    worst = facts["worst"]
    return (
        f"rounded: {rounded_text(rounded)}; worst relative squared error {worst['rel_mse']:.2e} "
        f"({worst['name']}); the rest equals the source"
    )


def _number(count: int) -> str:
    """A number of parameters: 12.3 M, 284 B."""
    for unit, step in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= step:
            return f"{count / step:.3g} {unit}"
    return str(count)
