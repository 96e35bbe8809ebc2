"""What the benchmarks find, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from dsv4.formats.plain_text import counted

if TYPE_CHECKING:
    from benchmarks.kernel_peers import PeerLine
    from benchmarks.parity_logits import Proof
    from benchmarks.quantize import Quality, Speed
    from benchmarks.stages import Seconds
    from benchmarks.transformers_peer import Rivals
    from dsv4.bench.decode import Step
    from dsv4.bench.kernels import Machine


def quality_table(lines: Sequence[Quality], seeds: int) -> Table:
    """Relative MSE per distribution and method over the seeds, all on the same weights."""
    title = f"relative MSE of rounding to NVFP4, {counted(seeds, 'seed')}"
    table = Table(title=title, title_justify="left")
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
    table = Table(title=f"speed, {counted(threads, 'thread')}, median", title_justify="left")
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


def peer_line(line: PeerLine) -> str:
    """One measured kernel of ours or of others as a line of progress."""
    said = line.fault or ("right" if line.right else f"WRONG: {line.error} of its tolerance")
    time = ""
    if line.seconds and line.fraction:
        time = f"{line.seconds * 1e6:.2f} us, {line.fraction:.3f} of its bound, "
    if line.ratio:
        time += f"{line.ratio:.2f} of our time, "
    form = f" ({line.form})" if line.form else ""
    return f"{line.shape} {line.model} rows {line.rows} {line.peer}{form}: {time}{said}"


def peers_table(lines: Sequence[PeerLine], machine: Machine) -> Table:
    """Each shape's kernels, ours first: time, over ours, bytes that it reads, fraction of them."""
    title = f"{machine.name}: {machine.bandwidth / 1e12:.2f} TB/s measured now"
    table = Table(title=title, title_justify="left")
    for column in ("shape", "rows", "kernel"):
        table.add_column(column)
    for column in ("us", "of our time", "MB", "of bound", "result"):
        table.add_column(column, justify="right")
    for line in lines:
        verdict = "right" if line.right else line.fault or "WRONG"
        table.add_row(
            f"{line.shape} {line.model}" if line.peer == "dsv4" else "",
            str(line.rows) if line.peer == "dsv4" else "",
            f"{line.peer}: {line.form}" if line.form else line.peer,
            f"{line.seconds * 1e6:.1f}" if line.seconds else "",
            f"{line.ratio:.2f}" if line.ratio else "",
            f"{line.nbytes / 1e6:.1f}",
            f"{line.fraction:.3f}" if line.fraction else "",
            verdict,
        )
    return table


def parity_table(proofs: Sequence[Proof], title: str) -> Table:
    """What was compared, what came of it, and what was allowed."""
    table = Table(title=title, title_justify="left")
    for column in ("what", "found", "allowed", "result"):
        table.add_column(column)
    for one in proofs:
        verdict = "right" if one.right else "WRONG"
        table.add_row(one.what, one.found, one.allowed, verdict)
    return table


def rivals_table(rivals: Rivals, steps: Sequence[Step]) -> Table:
    """transformers' step in every way it was run, over ours."""
    title = f"transformers: {rivals.fault}"
    if not rivals.fault:
        title = (
            f"transformers {rivals.version} in bfloat16, a token after a prompt of "
            f"{rivals.context}; logits {'right' if rivals.right else 'WRONG'}: "
            f"{rivals.difference:.4f} of their deviation from ours, likeliest token the same in "
            f"{rivals.same:.0%}"
        )
    table = Table(title=title, title_justify="left")
    table.add_column("experts")
    for column in ("ms a step", "of our time"):
        table.add_column(column, justify="right")
    table.add_column("")
    ours = [step.seconds for step in steps if step.rows == 1]
    for line in rivals.lines:
        table.add_row(
            line.name,
            f"{line.seconds * 1e3:.2f}" if line.seconds else "",
            f"{line.seconds / ours[0]:.1f}" if line.seconds and ours else "",
            line.fault,
        )
    return table


def stages_table(stages: Mapping[str, Seconds], recipe: str) -> Table:
    """Seconds over all threads, elapsed and on a core, and calls of every stage."""
    title = f"{recipe}, seconds over all threads"
    table = Table(title=title, title_justify="left")
    table.add_column("stage")
    for column in ("elapsed", "on a core", "calls"):
        table.add_column(column, justify="right")
    for stage, spent in stages.items():
        table.add_row(stage, f"{spent.wall:.2f}", f"{spent.cpu:.2f}", str(spent.calls))
    return table
