"""What the command line shows: rich tables and progress over the results of the other rooms."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from dsv4.bench.convert import Throughput
    from dsv4.bench.kernels import Line, Machine
    from dsv4.bench.load import Loading
    from dsv4.bench.quantize import Quality, Speed
    from dsv4.bench.store import Made
    from dsv4.bench.validate import Pass
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


def _facts(title: str, rows: Mapping[str, object]) -> Table:
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
        "exact": plan["exact_tensors"],
        "rounded to NVFP4": f"{len(plan['rounded_tensors'])} (router gates, lm_head, ...)"
        if plan["rounded_tensors"]
        else "none",
        "left behind": _left_behind(plan),
        "reads": size(plan["source_bytes"]),
        "network": size(plan["network_bytes"]),
        "writes": f"{size(plan['output_bytes'])} in {plan['files']} files",
        "peak RAM": size(plan["peak_ram_bytes"]),
        "peak disk": size(plan["peak_disk_bytes"]),
        "workers": plan["workers"],
        "units of work": plan["units"],
    }
    return _facts(f"plan for {source}", rows)


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
    plan = summary.plan.to_dict()
    rows: dict[str, object] = {
        "recipe": plan["recipe"]["name"],
        "tensors": f"{plan['tensors']}, {plan['exact_tensors']} carried exactly",
        "left behind": _left_behind(plan),
        "written": f"{size(plan['output_bytes'])} in {plan['files']} files",
        "root": summary.root,
    }
    if summary.resumed_units:
        rows["resumed"] = f"{summary.resumed_units} of {plan['units']} units were done already"
    if losses := summary.losses:
        worst = max(losses, key=lambda name: losses[name]["rel_mse"] or 0.0)
        rows["rounded"] = (
            f"{len(losses)} tensors, worst relative MSE {losses[worst]['rel_mse']:.3e} ({worst})"
        )
    return _facts(f"packed {summary.out}", rows)


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
    if report.checksums == "xxh3":
        rows["not checked"] = "BLAKE3, and so no forgery; give --checksums blake3"
    rows["root"] = report.root or "none"
    seconds = max(report.seconds, 1e-9)
    rows["read"] = f"{size(report.bytes_read)} in {seconds:.2f} s"
    rows["verdict"] = "OK" if report.ok else f"FAILED, {len(report.findings)} findings"
    yield _facts(f"validation of {report.path}", rows)


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
    yield _facts(f"repair of {report.path}", rows)


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
    return _facts(name, rows)


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


def quality_table(lines: Sequence[Quality], seeds: int) -> Table:
    """Relative MSE per distribution and method over the seeds, all on the same weights."""
    table = Table(title=f"relative MSE of rounding to NVFP4, {seeds} seed(s)", title_justify="left")
    table.add_column("weights")
    table.add_column("method")
    for column in ("mean", "std. error", "least", "largest", "over the optimum"):
        table.add_column(column, justify="right")
    for line in lines:
        for method, found in line.methods.items():
            if found is None:
                table.add_row(line.distribution, method, "not installed")
                continue
            error = "" if found.standard_error is None else f"{found.standard_error:.1e}"
            values = (f"{v:.4e}" for v in (found.mean, found.least, found.largest))
            mean, least, largest = values
            over = f"{found.excess:.4%}"
            table.add_row(line.distribution, method, mean, error, least, largest, over)
        table.add_section()
    return table


def speed_table(lines: Sequence[Speed], threads: int) -> Table:
    """Rates, and the fraction of a plain copy's rate: both from memory, and both in cache."""
    table = Table(title=f"speed, {threads} thread(s), median", title_justify="left")
    table.add_column("operation")
    for column in ("Melem/s", "GB/s in + out", "of a copy", "in cache", "result"):
        table.add_column(column, justify="right")
    for line in lines:
        seconds = (line.from_memory or line.in_cache).seconds
        table.add_row(
            line.operation,
            f"{line.elements / seconds / 1e6:.0f}",
            f"{line.nbytes / seconds / 1e9:.2f}",
            f"{line.from_memory.of_copy:.3f}" if line.from_memory else "",
            f"{line.in_cache.of_copy:.3f}",
            "right" if line.correct else "WRONG",
        )
    return table


def throughput_tables(found: Throughput) -> Iterator[Table]:
    """Every lane's rate beside the plain copy's; then where dsv4's lanes spend their time."""
    title = (
        f"{found.layers} {found.model} layer(s) of {found.experts} experts, {size(found.nbytes)}, "
        f"{found.workers} worker(s), median of {found.rounds} round(s)"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("lane")
    for column in ("GB/s", "spread", "of the copy", "CPU s/GB", "start-up", "peak RSS", "result"):
        table.add_column(column, justify="right")
    for line in found.lines:
        table.add_row(
            line.lane,
            f"{line.rate:.3f}",
            f"{line.slowest:.3f} to {line.fastest:.3f}",
            f"{line.of_copy:.2f}",
            f"{line.cpu_seconds_per_gb:.2f}",
            f"{line.start_up:.1f} s",
            f"{line.peak_rss / 2**20:.0f} MiB",
            "right" if line.correct else "WRONG",
        )
    yield table
    title = "seconds per GB over all threads: elapsed (on a core) in calls"
    table = Table(title=title, title_justify="left")
    table.add_column("stage")
    by_stage: dict[str, list[str]] = {}
    for stage in found.stages:
        seconds = f"{stage.wall_per_gb:.2f} ({stage.cpu_per_gb:.2f}) in {stage.calls}"
        by_stage.setdefault(stage.stage, []).append(seconds)
    for recipe in dict.fromkeys(stage.recipe for stage in found.stages):
        table.add_column(recipe, justify="right")
    for name, columns in by_stage.items():
        table.add_row(name, *columns)
    yield table


def passes_table(passes: Sequence[Pass]) -> Table:
    """The full pass and the plain read, from the disk and from the page cache."""
    table = Table(title="validation beside a plain read of the same files", title_justify="left")
    table.add_column("from")
    table.add_column("pass")
    for column in ("GB/s, median", "spread", "of the read", "CPU s/GB", "result"):
        table.add_column(column, justify="right")
    for one in passes:
        table.add_row(
            "disk" if one.cold else "page cache",
            one.name,
            f"{statistics.median(one.rates) / 1e9:.2f}",
            f"{min(one.rates) / 1e9:.2f} to {max(one.rates) / 1e9:.2f}",
            f"{one.of_read:.2f}",
            f"{one.cpu_seconds_per_gb:.2f}",
            "right" if one.correct else "WRONG",
        )
    return table


def kernel_line(line: Line) -> str:
    """One measured kernel as a line of progress."""
    verdict = "right" if not line.faults else f"WRONG: {'; '.join(line.faults)}"
    time = ""
    if line.seconds and line.fraction:
        time = f"{line.seconds * 1e6:.2f} us, {line.fraction:.3f} of the bound, "
    return f"{line.operation} {line.shape} {line.model} rows {line.rows}: {time}{verdict}"


def kernels_table(lines: Sequence[Line], machine: Machine) -> Table:
    """Time, bytes, rate, fraction of the bound and correctness of every kernel."""
    title = (
        f"{machine.name}: {machine.bandwidth / 1e12:.2f} TB/s, "
        f"{machine.matrix_rate / 1e12:.0f} TFLOP/s in bfloat16, both measured now"
    )
    table = Table(title=escape(title), title_justify="left")
    for column in ("operation", "shape", "model"):
        table.add_column(column)
    for column in ("rows", "us", "MB", "GB/s", "of bound", "result"):
        table.add_column(column, justify="right")
    for line in lines:
        table.add_row(
            line.operation,
            escape(f"{line.shape} ({line.note})" if line.note else line.shape),
            line.model,
            str(line.rows),
            f"{line.seconds * 1e6:.2f}" if line.seconds else "",
            f"{line.nbytes / 1e6:.2f}",
            f"{line.nbytes / line.seconds / 1e9:.0f}" if line.seconds else "",
            f"{line.fraction:.3f}" if line.fraction else "",
            "WRONG" if line.faults else "right",
        )
    return table


def made_table(made: Made) -> Table:
    """A synthetic store."""
    rows = {
        "written": f"{size(made.nbytes)} in {made.files} files",
        "seconds": f"{made.seconds:.1f} ({made.nbytes / made.seconds / 1e9:.2f} GB/s)",
        "root": made.root,
    }
    return _facts(f"made {made.path}", rows)


def loading_tables(found: Loading) -> Iterator[Table]:
    """Each lane's rate beside its bound and beside dsv4's; then dsv4's phases."""
    machine = found.machine
    disk = f", disk {machine.disk / 1e9:.2f} GB/s" if machine.disk else ""
    title = (
        f"{size(found.nbytes)} to {machine.device}, {machine.cores} cores, bus "
        f"{machine.bus / 1e9:.1f} GB/s{disk}, both measured now"
    )
    table = Table(title=escape(title), title_justify="left")
    table.add_column("from")
    table.add_column("lane")
    for column in ("GB/s, median", "spread", "of bound", "dsv4 is", "result"):
        table.add_column(column, justify="right")
    ours = {line.cold: line.rate for line in reversed(found.lines) if line.lane == "dsv4"}
    for line in found.lines:
        table.add_row(
            "disk" if line.cold else "page cache",
            line.lane,
            f"{line.rate / 1e9:.2f}",
            f"{min(line.rates) / 1e9:.2f} to {max(line.rates) / 1e9:.2f}",
            f"{line.of_bound:.2f} of {'disk' if line.cold else 'bus'}",
            f"{ours[line.cold] / line.rate:.1f}x",
            "right" if line.correct else "WRONG",
        )
    yield table
    bound = {"first": machine.bus, "warm": machine.bus, "cold": machine.disk}
    for state, report in found.reports.items():
        phases = Table(title=f"dsv4, {state}", title_justify="left", show_header=False, box=None)
        for text in report.lines(**{"disk" if state == "cold" else "bus": bound[state]}):
            phases.add_row(escape(text))
        yield phases
