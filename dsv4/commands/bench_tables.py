"""What `dsv4 bench` finds, as tables for a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from dsv4.commands.tables import facts_table
from dsv4.formats.plain_text import counted, size

if TYPE_CHECKING:
    from dsv4.bench import decode, draft, prompt, serve, streaming
    from dsv4.bench.convert import Throughput
    from dsv4.bench.kernels import Line, Machine
    from dsv4.bench.load import Loading
    from dsv4.bench.validate import Pass
    from dsv4.synthetic.store import Made


def throughput_table(found: Throughput) -> Table:
    """Every lane's rate beside the plain copy's."""
    title = (
        f"{found.model}, {counted(found.layers, 'layer')} of {found.experts} experts, "
        f"{size(found.nbytes)}, {counted(found.workers, 'worker')}, median of "
        f"{counted(found.rounds, 'round')}"
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
    return table


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
    verdict = f"WRONG: {'; '.join(line.faults)}" if line.faults else line.skipped or "right"
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
    table = Table(title=title, title_justify="left")
    for column in ("operation", "shape", "model"):
        table.add_column(column)
    for column in ("rows", "us", "MB", "GB/s", "of bound", "result"):
        table.add_column(column, justify="right")
    for line in lines:
        table.add_row(
            line.operation,
            f"{line.shape} ({line.note})" if line.note else line.shape,
            line.model,
            str(line.rows),
            f"{line.seconds * 1e6:.2f}" if line.seconds else "",
            f"{line.nbytes / 1e6:.2f}",
            f"{line.nbytes / line.seconds / 1e9:.0f}" if line.seconds else "",
            f"{line.fraction:.3f}" if line.fraction else "",
            "WRONG" if line.faults else line.skipped or "right",
        )
    return table


def serve_table(name: str, slots: int, lines: Sequence[serve.Line], again: serve.Again) -> Table:
    """What clients wait for and get, alone and among others."""
    title = (
        f"{name}, {slots} slots, prompts of {again.prompt_tokens} tokens; one asked again: first "
        f"token after {again.warm * 1e3:.0f} ms instead of {again.cold * 1e3:.0f}, {again.cached} "
        f"tokens remembered, {'same' if again.right else 'OTHER'} answer; the turn after it: "
        f"{again.turn * 1e3:.0f} ms, {again.live} tokens still there"
    )
    table = Table(title=title, title_justify="left")
    for column in ("clients", "answers", "tokens/s", "first token ms", "p99", "between ms", "p99"):
        table.add_column(column, justify="right")
    table.add_column("bare step ms", justify="right")
    table.add_column("alone = among others")
    for line in lines:
        milliseconds = (f"{1e3 * one:.2f}" for one in (*line.first, *line.gap))
        rate = f"{line.tokens_per_second:.1f}"
        verdict = "right" if line.right else "WRONG"
        bare = "" if line.bare is None else f"{1e3 * line.bare:.2f}"
        table.add_row(str(line.clients), str(line.answers), rate, *milliseconds, bare, verdict)
    return table


def decode_table(report: decode.Report) -> Table:
    """A step's time, its bound, and how right its logits are."""
    machine, agreement = report.machine, report.agreement
    verdict = "logits not compared"
    if agreement is not None:
        verdict = (
            f"logits {'right' if agreement.right else 'WRONG'}: {agreement.ours:.4f} of their "
            f"deviation from float32, the reference in bfloat16 {agreement.bfloat16:.4f}; "
            f"{'same' if agreement.repeatable else 'OTHER'} bytes whatever the cuts"
        )
    title = (
        f"{report.model}, {report.layers} layers, context {report.context}, {machine.name}, "
        f"{machine.bandwidth / 1e12:.2f} TB/s measured now; {verdict}"
    )
    table = Table(title=title, title_justify="left")
    columns = ("rows", "us a step", "us a layer", "its bytes' bound", "experts read a layer")
    for column in (*columns, "MB read", "of bound", "launches"):
        table.add_column(column, justify="right")
    for step in report.steps:
        table.add_row(
            str(step.rows),
            f"{step.seconds * 1e6:.1f}",
            f"{step.layer_seconds * 1e6:.1f}",
            f"{step.layer_bound * 1e6:.1f}",
            f"{step.experts:.1f}",
            f"{step.nbytes / 1e6:.0f}",
            f"{step.fraction:.3f}",
            str(step.launches),
        )
    return table


def draft_table(report: draft.Report) -> Table:
    """Rounds of every length, by how many tokens they keep."""
    found, proposal = report.comparison, report.proposal_seconds
    verdict = "proposals not compared"
    if found is not None:
        ours, theirs = ("/".join(f"{x:.4f}" for x in one) for one in (found.ours, found.bfloat16))
        verdict = (
            f"proposals {'right' if found.right else 'WRONG'}: logits/confidence {ours} of their "
            f"deviation from float32, the reference in bfloat16 {theirs}; {found.ids:.0%} of ids "
            f"the same; {'same' if found.repeatable else 'OTHER'} bytes whenever asked"
        )
    machine, plain, kept = report.machine, report.plain_seconds, report.observed_seconds
    title = (
        f"{report.model}, {report.layers} layers, {report.experts} experts, context "
        f"{report.context}, {machine.name}; {verdict}\n"
        f"a step of one token {plain * 1e6:.1f} us, with draft layers loaded {kept * 1e6:.1f} "
        f"({kept / plain - 1:+.1%}); a proposal {proposal * 1e6:.1f} us, {report.launches} launches"
    )
    table = Table(title=title, title_justify="left")
    most = len(report.rounds)
    for column in ("drafts", "us a step", "proposal + step", "arithmetic", "us a round"):
        table.add_column(column, justify="right")
    for count in range(1, most + 2):
        table.add_column(f"tokens/s, {count} kept", justify="right")
    for one in report.rounds:
        rates = [f"{count / s:.0f}" for count, s in enumerate(one.seconds, 1)]
        table.add_row(
            str(one.drafts),
            f"{one.step_seconds * 1e6:.1f}",
            f"{(proposal + one.step_seconds) * 1e6:.1f}",
            f"{one.arithmetic * 1e6:.1f}" if one.arithmetic else "",
            f"{sum(one.seconds) / len(one.seconds) * 1e6:.1f}",
            *rates,
            *[""] * (most - one.drafts),
        )
    return table


def streaming_table(report: streaming.Report) -> Table:
    """Each text on each placement beside its arithmetic."""
    title = (
        f"{report.store} on {report.device}; host memory, GB/s: {report.fetch / 1e9:.1f} by the "
        f"kernel, {report.copy / 1e9:.1f} by the copy engine; "
        f"{'same' if report.right else 'OTHER'} bytes of logits for every placement"
    )
    table = Table(title=title, title_justify="left")
    columns = ("experts", "text", "placed by", "hot", "cold", "spare", "tokens/s", "arithmetic")
    for column in (*columns, "without misses", "misses", "hits", "bus GB/s", "prompt", "effective"):
        table.add_column(column, justify="right")
    for line in report.lines:
        table.add_row(
            line.experts,
            line.text,
            "counts" if line.counts else "nothing",
            str(line.hot),
            str(line.cold),
            str(line.spare),
            f"{1 / line.seconds:.1f}",
            f"{1 / line.expected:.1f}",
            f"{1 / line.still:.1f}",
            f"{line.misses:.2f}",
            f"{line.hits:.4f}",
            f"{line.bus / 1e9:.1f}",
            f"{line.prompt:.0f}",
            f"{line.effective:.0f}",
        )
    return table


def made_table(made: Made) -> Table:
    """A synthetic store."""
    links = ", the others are links to these" if made.written < made.nbytes else ""
    rows = {
        "size": f"{size(made.nbytes)} in {made.files} files",
        "written": size(made.written) + links,
        "seconds": f"{made.seconds:.1f} ({made.written / made.seconds / 1e9:.2f} GB/s)",
        "root": made.root,
    }
    return facts_table(f"made {made.path}", rows)


def loading_tables(found: Loading) -> Iterator[Table]:
    """Each lane's rate beside its bound and beside dsv4's; then dsv4's phases."""
    machine = found.machine
    disk = f", disk {machine.disk / 1e9:.2f} GB/s" if machine.disk else ""
    title = (
        f"{size(found.nbytes)} to {machine.device}, {machine.cores} cores, bus "
        f"{machine.bus / 1e9:.1f} GB/s{disk}, page cache {machine.page_cache / 1e9:.0f}, plain "
        f"copies {machine.memory / 1e9:.0f}, all measured now"
    )
    table = Table(title=title, title_justify="left")
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
            phases.add_row(text)
        yield phases


def prompt_table(report: prompt.Report) -> Table:
    """Prompts by chunks of several sizes and by steps alone."""
    machine = report.machine
    title = (
        f"{report.model}, {report.layers} layers, prompts of {report.tokens} tokens, "
        f"{machine.name}, {machine.matrix_rate / 1e12:.0f} TFLOP/s and "
        f"{machine.bandwidth / 1e12:.2f} TB/s measured now; the reference in bfloat16 is "
        f"{report.rounded} from float32 (median, rms, largest error of a token, same likeliest id)"
    )
    table = Table(title=title, title_justify="left")
    for column in ("chunk", "ms", "tokens/s", "us a layer and 1,000 tokens", "from float32", ""):
        table.add_column(column, justify="right")
    for one in report.lines:
        per_layer = one.seconds / one.tokens * 1e9 / report.layers
        table.add_row(
            str(one.chunk or "steps of 8"),
            f"{one.seconds * 1e3:.1f}",
            f"{one.tokens / one.seconds:,.0f}",
            f"{per_layer:.0f}",
            str(one.distance),
            "right" if one.right else "WRONG",
        )
    return table
