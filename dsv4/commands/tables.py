"""What the command line shows: rich tables over the results of the other rooms.

Made for 80 columns: numbers are never cut or folded, names are where there is no room. Texts hold
no markup: the consoles read none.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dsv4.formats.model.recipes import DEFAULT_RECIPE, SAME_EXPERTS, Role, role_of
from dsv4.formats.plain_text import counted, duration, first, size

if TYPE_CHECKING:
    from dsv4.convert.engine import Summary
    from dsv4.validate.repair_report import RepairReport
    from dsv4.validate.report import GateAgreement, Report, TensorVerdict

MAX_ROWS = 20
GOOD, BAD = "bold green", "bold red"
PLURALS = {Role.LM_HEAD: "lm heads", Role.DENSE: "dense matrices"}


def facts_table(title: str, rows: Mapping[str, object]) -> Table:
    """Names and what they are, a line each; a value may be a `Text`."""
    table = Table(title=title, show_header=False, title_justify="left", box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, value if isinstance(value, Text) else str(value))
    return table


def list_table(title: str, texts: Sequence[str], numbers: Sequence[str] = ()) -> Table:
    """An empty table: columns of text, which may fold, and of numbers, which do not."""
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    table.padding = (0, 1, 0, 0)
    for column in texts:
        table.add_column(column, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def plan_table(source: str, plan: Mapping[str, Any]) -> Table:
    """The plan of one conversion."""
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in plan["encodings"].items() if count)
    rows: dict[str, object] = {"commit": plan["commit"]} if plan["commit"] else {}
    rows |= {
        "recipe": recipe_text(plan["recipe"]),
        "tensors": f"{plan['tensors']:,} ({kinds})",
        "exact": _planned_exact(plan),
        **_block_scales(plan),
        "rounded to NVFP4": _planned_rounding(plan),
        **_gates_kept(plan),
        "left behind": _left_behind(plan),
        "reads": size(plan["source_bytes"]),
        "network": size(plan["network_bytes"]),
        "writes": f"{size(plan['output_bytes'])} in {counted(plan['files'], 'file')}",
        "": _more_or_less(plan),
        "peak RAM": f"{size(plan['peak_ram_bytes'])}, {counted(plan['workers'], 'worker')}",
        "peak disk": size(plan["peak_disk_bytes"]),
        "to run it": f"{size(plan['run_bytes'])} of memory for the weights, on one GPU or on the "
        "CPU, and more for the context",
        "next": _next_command(source, plan),
    }
    return facts_table(f"plan for {source}", rows)


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """A recipe of a manifest: standard, --keep '*.gate.weight'."""
    keep = "".join(f" --keep {shlex.quote(str(glob))}" for glob in recipe.get("keep") or ())
    return f"{recipe.get('name')}{',' if keep else ''}{keep}"


def rounded_text(names: Sequence[str]) -> str:
    """How many tensors of which kind: 44 (43 router gates, 1 lm head)."""
    found = Counter(role_of(name) for name in names)
    kinds = ", ".join(
        counted(count, str(role), PLURALS.get(role, "")) for role, count in found.items()
    )
    return f"{len(names):,} ({kinds})" if names else "none"


def _more_or_less(plan: Mapping[str, Any]) -> str:
    more = plan["output_bytes"] - plan["source_bytes"]
    if more <= 0:
        return f"{size(-more)} less than it reads"
    why = ""
    if plan["encodings"].get("mxfp4"):
        why = ": NVFP4 has a scale for every 16 weights, the source's MXFP4 for every 32"
    return f"{size(more)} more than it reads{why}"


def _next_command(source: str, plan: Mapping[str, Any]) -> str:
    words = ["dsv4", "convert", "--hf", source, "--out", "./packed"]
    if plan["recipe"]["name"] != DEFAULT_RECIPE:
        words += ["--recipe", plan["recipe"]["name"]]
    for glob in plan["recipe"]["keep"]:
        words += ["--keep", glob]
    return shlex.join(words)


def _planned_exact(plan: Mapping[str, Any]) -> str:
    scales = plan["block_scales"]
    known = scales["looked_at"] == scales["tensors"]
    return f"{plan['exact_tensors']:,}{'' if known else ' as planned, not all of them looked at'}"


def _planned_rounding(plan: Mapping[str, Any]) -> str:
    inexact = {tensor["name"] for tensor in plan["inexact_tensors"]}
    return rounded_text([name for name in plan["rounded_tensors"] if name not in inexact])


def _block_scales(plan: Mapping[str, Any]) -> dict[str, str]:
    """What was looked at to say so, of a source with MXFP4 tensors."""
    scales, inexact = plan["block_scales"], plan["inexact_tensors"]
    if not scales["tensors"]:
        return {}
    reason = f" ({scales['reason']})" if scales["reason"] else ""
    said = f"{scales['looked_at']:,} of {scales['tensors']:,} MXFP4 tensors looked at{reason}"
    if scales["looked_at"]:
        held = scales["looked_at"] - len(inexact)
        said += f", NVFP4 holds {held:,} of them exactly"
    return {"block scales": said}


def _gates_kept(plan: Mapping[str, Any]) -> dict[str, str]:
    """What `--keep` would buy for the router gates, where they are rounded."""
    gates, name = plan["router_gates"], plan["recipe"]["name"]
    if gates is None or name not in SAME_EXPERTS:
        return {}
    rounded, kept = SAME_EXPERTS[name]
    return {
        "router gates": f"{gates['rounded']} rounded; --keep '{gates['keep']}' carries them for "
        f"{size(gates['more_bytes'])} more: on the small trained model {kept:g} % instead of "
        f"{rounded:g} % of the choices of experts are then the source's"
    }


def _left_behind(plan: Mapping[str, Any]) -> str:
    """What is in the source and not in the store."""
    counts = {
        "vision tensor": plan["skipped_tensors"],
        "scale of activations": plan["ignored_input_scales"],
        "draft copy of embedding or head": len(plan["ignored_draft_copies"]),
    }
    many = ("", "scales of activations", "draft copies of embedding and head")
    found = zip(counts.items(), many, strict=True)
    return ", ".join(counted(n, one, more) for (one, n), more in found if n) or "nothing"


def summary_table(summary: Summary) -> Table:
    """What a finished conversion wrote."""
    plan, tally = summary.plan.to_dict(), summary.tally
    rows: dict[str, object] = {
        "recipe": recipe_text(plan["recipe"]),
        "tensors": f"{plan['tensors']:,}, {tally.exact:,} carried exactly",
        "left behind": _left_behind(plan),
        "written": f"{size(plan['output_bytes'])} in {counted(plan['files'], 'file')}",
        "root": summary.root,
    }
    if summary.resumed_units:
        rows["resumed"] = f"{summary.resumed_units} of {plan['units']} units were done already"
    if tally.rounded:
        losses = summary.losses
        worst = max(losses, key=lambda name: losses[name]["rel_mse"] or 0.0)
        rows["rounded"] = (
            f"{counted(len(tally.rounded), 'tensor')}, worst relative MSE "
            f"{losses[worst]['rel_mse']:.3e} ({worst})"
        )
    if tally.inexact:
        worst_of = max(tally.inexact, key=lambda tensor: tensor.max_abs_error)
        rows["not exact"] = (
            f"{counted(len(tally.inexact), 'tensor')} of those to be carried"
            f"{', accepted' if summary.accepted else ''}; worst {worst_of}"
        )
    if tally.zero:
        rows["zero throughout"] = f"{len(tally.zero)} ({first(tally.zero)})"
    rows |= _gates_kept(plan)
    return facts_table(f"packed {summary.out}", rows)


def report_tables(report: Report) -> Iterator[RenderableType]:
    """The verdict: findings first, then rounded tensors with their losses, then the counts."""
    if report.findings:
        table = list_table("findings", ("check", "where", "what"))
        for finding in report.findings[:MAX_ROWS]:
            table.add_row(finding.check, finding.where, finding.message)
        if (more := len(report.findings) - MAX_ROWS) > 0:
            table.add_row("", "", f"... and {more} more (see --json)")
        yield table
    rounded = sorted(
        (verdict for verdict in report.tensors if verdict.loss is not None and not verdict.exact),
        key=lambda verdict: (verdict.loss or {}).get("rel_mse") or 0.0,
        reverse=True,
    )
    if rounded:
        yield _losses(rounded)
    if report.gates:
        yield _gates(report.gates)
        yield f"{report.gates_meaning()}\n"
    rows: dict[str, object] = dict(report.checks)
    if report.tensors:
        exact = sum(verdict.exact for verdict in report.tensors)
        rows["tensors inverted"] = f"{len(report.tensors)}, {exact} equal to the source exactly"
    if report.inexact:
        said = "accepted at conversion" if report.accepted_rounding else "not accepted"
        worst = max(report.inexact, key=lambda tensor: tensor.max_abs_error)
        kind = counted(len(report.inexact), "tensor")
        rows["not exact"] = f"{kind} of those to be carried, {said}; worst {worst}"
    if report.zero:
        rows["zero throughout"] = f"{len(report.zero)} ({first(report.zero)})"
    if report.checksums == "xxh3":
        rows["not checked"] = "BLAKE3, and so no forgery; give --checksums blake3"
    rows["root"] = report.root or "none"
    if report.remedy:
        rows["repair"] = report.remedy
    rows["read"] = f"{size(report.bytes_read)} in {duration(report.seconds)}"
    failed = f"FAILED, {counted(len(report.findings), 'finding')}"
    accepted = len(report.inexact) if report.accepted_rounding else 0
    good = f"OK, {counted(accepted, 'tensor')} accepted as rounded" if accepted else "OK"
    rows["verdict"] = Text(good, GOOD) if report.ok else Text(failed, BAD)
    yield facts_table(f"validation of {report.path}", rows)


def repair_tables(report: RepairReport) -> Iterator[RenderableType]:
    """What was damaged and what became of it, what failed first; then the outcome."""
    if report.files:
        table = list_table("damaged", ("file", "what", "to do" if report.dry_run else "outcome"))
        done = "to be rewritten" if report.dry_run else "whole again, {} rewritten"
        ordered = sorted(report.files, key=lambda file: file.failure is None)
        for file in ordered[:MAX_ROWS]:
            outcome = file.failure or done.format(size(file.made_bytes))
            table.add_row(file.key, file.problem, outcome)
        if (more := len(ordered) - MAX_ROWS) > 0:
            table.add_row("", "", f"... and {more} more (see --json)")
        yield table
    failed = sum(file.failure is not None for file in report.files)
    count = len(report.files) - failed
    made = size(sum(file.made_bytes for file in report.files))
    rows: dict[str, object] = {}
    whole = Text("whole, but for what was left out" if report.absent else "whole", GOOD)
    if report.dry_run:
        rows["would rewrite"] = f"{counted(count, 'damaged file')}, {made} of them from the source"
        rows["root"] = report.root
        damaged = f"DAMAGED, {counted(len(report.files), 'file')}; nothing was written"
        rows["verdict"] = whole if report.ok else Text(damaged, BAD)
    else:
        rows["repaired"] = f"{count} of {counted(len(report.files), 'damaged file')}"
        rows["rewritten"] = made
        rows["source"] = report.source or "not needed"
        rows["root"] = report.root
        wrong = f"FAILED, {counted(failed, 'file is', 'files are')} not in order"
        rows["verdict"] = whole if report.ok else Text(wrong, BAD)
    yield facts_table(f"repair of {report.path}", rows)


def _losses(rounded: list[TensorVerdict]) -> Table:
    columns = (
        *("relative\nMSE", "over\noptimum", "SQNR\ndB", "cosine"),
        *("max /\namax", "max /\nbound"),
    )
    table = list_table("rounded tensors, worst first", ("tensor",), columns)
    for verdict in rounded[:MAX_ROWS]:
        loss = {key: value or 0.0 for key, value in (verdict.loss or {}).items()}
        table.add_row(
            verdict.name,
            f"{loss['rel_mse']:.3e}",
            "" if verdict.excess is None else f"{verdict.excess:.1e}",
            f"{loss['sqnr_db']:.2f}",
            f"{loss['cosine']:.6f}",
            f"{loss['max_abs_error'] / loss['amax']:.3f}" if loss["amax"] else "0",
            "" if verdict.max_error is None else f"{verdict.max_error:.3f}",
        )
    return table


def _gates(gates: Sequence[GateAgreement]) -> Table:
    title = f"rounded router gates, {gates[0].inputs} random inputs, worst first"
    table = list_table(title, ("gate",), ("same experts", "experts in common"))
    for gate in sorted(gates, key=lambda gate: gate.same_set)[:MAX_ROWS]:
        table.add_row(gate.name, f"{gate.same_set:.2%}", f"{gate.overlap:.2%}")
    return table
