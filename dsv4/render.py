"""What the command line shows: rich tables and progress over the results of the other rooms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from dsv4.convert.recipes import SAME_EXPERTS
from dsv4.formats.plain_text import counted, first

if TYPE_CHECKING:
    from dsv4.convert.engine import Summary
    from dsv4.validate.repair import RepairReport
    from dsv4.validate.report import GateAgreement, Report, TensorVerdict

MAX_ROWS = 20


def size(count: float) -> str:
    """Bytes for people: 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def facts_table(title: str, rows: Mapping[str, object]) -> Table:
    """Names and what they are, a line each."""
    table = Table(title=escape(title), show_header=False, title_justify="left", box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows.items():
        table.add_row(key, escape(str(value)))
    return table


def plan_table(source: str, plan: Mapping[str, Any]) -> Table:
    """The plan of one conversion."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in plan["encodings"].items() if count)
    rows = {
        "recipe": plan["recipe"]["name"],
        "tensors": f"{plan['tensors']} ({kinds})",
        "exact": _planned_exact(plan),
        **_block_scales(plan),
        "rounded to NVFP4": _planned_rounding(plan),
        **_gates_kept(plan),
        "left behind": _left_behind(plan),
        "reads": size(plan["source_bytes"]),
        "network": size(plan["network_bytes"]),
        "writes": f"{size(plan['output_bytes'])} in {plan['files']} files",
        "peak RAM": size(plan["peak_ram_bytes"]),
        "peak disk": size(plan["peak_disk_bytes"]),
        "workers": plan["workers"],
        "units of work": plan["units"],
    }
    return facts_table(f"plan for {source}", rows)


def _planned_exact(plan: Mapping[str, Any]) -> str:
    scales = plan["block_scales"]
    known = scales["looked_at"] == scales["tensors"]
    return f"{plan['exact_tensors']}{'' if known else ' as planned, not all of them looked at'}"


def _planned_rounding(plan: Mapping[str, Any]) -> str:
    count = len(plan["rounded_tensors"]) - len(plan["inexact_tensors"])
    return f"{count} (router gates, lm_head, ...)" if count else "none"


def _block_scales(plan: Mapping[str, Any]) -> dict[str, str]:
    """What was looked at to say so, of a source with MXFP4 tensors."""
    scales, inexact = plan["block_scales"], plan["inexact_tensors"]
    if not scales["tensors"]:
        return {}
    reason = f" ({scales['reason']})" if scales["reason"] else ""
    said = f"{scales['looked_at']} of {scales['tensors']} MXFP4 tensors looked at{reason}"
    if scales["looked_at"]:
        held = scales["looked_at"] - len(inexact)
        said += f", NVFP4 holds {held} of them exactly"
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
        "vision tensors": plan["skipped_tensors"],
        "scales of activations": plan["ignored_input_scales"],
        "draft copies of embedding and head": len(plan["ignored_draft_copies"]),
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "nothing"


def summary_table(summary: Summary) -> Table:
    """What a finished conversion wrote."""
    plan, tally = summary.plan.to_dict(), summary.tally
    rows: dict[str, object] = {
        "recipe": plan["recipe"]["name"],
        "tensors": f"{plan['tensors']}, {tally.exact} carried exactly",
        "left behind": _left_behind(plan),
        "written": f"{size(plan['output_bytes'])} in {plan['files']} files",
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


def report_tables(report: Report) -> Iterator[Table]:
    """The verdict: findings first, then rounded tensors with their losses, then the counts."""
    if report.findings:
        table = Table(title="findings", title_justify="left")
        for column in ("check", "where", "what"):
            table.add_column(column, overflow="fold")
        for finding in report.findings[:MAX_ROWS]:
            table.add_row(finding.check, escape(finding.where), escape(finding.message))
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
    seconds = max(report.seconds, 1e-9)
    rows["read"] = f"{size(report.bytes_read)} in {seconds:.2f} s"
    accepted = len(report.inexact) if report.accepted_rounding else 0
    good = f"OK, {counted(accepted, 'tensor')} accepted as rounded" if accepted else "OK"
    rows["verdict"] = good if report.ok else f"FAILED, {counted(len(report.findings), 'finding')}"
    yield facts_table(f"validation of {report.path}", rows)


def repair_tables(report: RepairReport) -> Iterator[Table]:
    """What was damaged and what became of it, what failed first; then the outcome."""
    if report.files:
        table = Table(title="damaged", title_justify="left")
        for column in ("file", "what", "outcome"):
            table.add_column(column, overflow="fold")
        ordered = sorted(report.files, key=lambda file: file.failure is None)
        for file in ordered[:MAX_ROWS]:
            outcome = file.failure or f"whole again, {size(file.made_bytes)} rewritten"
            table.add_row(escape(file.key), escape(file.problem), escape(outcome))
        if (more := len(ordered) - MAX_ROWS) > 0:
            table.add_row("", "", f"... and {more} more (see --json)")
        yield table
    failed = sum(file.failure is not None for file in report.files)
    rows: dict[str, object] = {
        "repaired": f"{len(report.files) - failed} of {len(report.files)} damaged files",
        "rewritten": size(sum(file.made_bytes for file in report.files)),
        "source": report.source or "not needed",
        "root": report.root,
        "verdict": f"FAILED, {failed} files are not in order" if failed else "whole",
    }
    yield facts_table(f"repair of {report.path}", rows)


def _losses(rounded: list[TensorVerdict]) -> Table:
    table = Table(title="rounded tensors, worst first", title_justify="left")
    table.add_column("tensor", overflow="fold")
    columns = ("relative MSE", "over optimum", "SQNR dB", "cosine", "max / amax", "max / bound")
    for column in columns:
        table.add_column(column, justify="right")
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
    table = Table(title=title, title_justify="left")
    table.add_column("gate", overflow="fold")
    for column in ("same experts", "experts in common"):
        table.add_column(column, justify="right")
    for gate in sorted(gates, key=lambda gate: gate.same_set)[:MAX_ROWS]:
        table.add_row(gate.name, f"{gate.same_set:.2%}", f"{gate.overlap:.2%}")
    return table


def store_table(tree: Mapping[str, Any]) -> Table:
    """A store at a glance: tensors, sizes and formats by part."""
    origin = " ".join(map(str, tree["source"].values()))
    title = f"packed store, root {tree['root']}\nfrom {origin}, recipe {tree['recipe']}"
    table = Table(title=escape(title), title_justify="left", show_footer=True)
    table.add_column("part", "all")
    table.add_column("tensors", str(len(tree["tensors"])), justify="right")
    table.add_column("size", size(tree["bytes"]), justify="right")
    table.add_column("formats")
    for part, facts in tree["parts"].items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in facts["formats"].items())
        table.add_row(escape(part), str(facts["tensors"]), size(facts["bytes"]), kinds)
    return table


def tensor_table(name: str, facts: Mapping[str, Any]) -> Table:
    """Where one tensor's bytes came from, what became of them, and its first block."""
    block = facts["first_block"]
    rows = {key: value for key, value in facts.items() if key != "first_block"}
    rows["transforms"] = "; ".join(facts["transforms"])
    for role, place in facts["sources"].items():
        rows[f"source of {role}"] = f"{place['file']}, bytes {place['begin']} to {place['end']}"
    rows |= {f"first block: {key}": value for key, value in block.items() if key != "codes"}
    if "codes" in block:
        rows["first block: codes"] = " ".join(f"{code:x}" for code in block["codes"])
    rows.pop("sources")
    return facts_table(name, rows)


def diff_table(document: Mapping[str, Any]) -> Table:
    """What differs between two stores."""
    found = document["differences"]
    verdict = f"{len(found)} differences" if found else "no difference"
    title = f"A {document['a']}\nB {document['b']}\n{verdict}"
    table = Table(title=escape(title), title_justify="left")
    for column in ("kind", "where", "tensors", "what"):
        table.add_column(column, overflow="fold")
    for one in found:
        names = ", ".join(one["names"])
        table.add_row(one["kind"], escape(one["path"]), escape(names), escape(one["what"]))
    return table
