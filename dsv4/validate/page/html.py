"""The report as one HTML page that needs nothing else: no network, no script, no other file.

jinja2 for its escaping, since names come from an untrusted checkpoint; the plots are SVG drawn by
the template, because a plotting library would outweigh the validator for a scatter and some bars.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
import shlex
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from dsv4.formats.plain_text import duration, printable, size
from dsv4.formats.version import TOOL
from dsv4.validate.page import plots
from dsv4.validate.report import Finding, Report, TensorVerdict

MAX_FINDINGS = 500
MAX_ROWS = 12
WIDTHS = {plots.WIDTH: "narrow", plots.WIDE: "wide"}

ADVICE = {
    "open": "Give the directory that `dsv4 convert` wrote; if it is unfinished, run the same "
    "conversion again; if files of it are missing or cut short, {repair} rewrites them.",
    "root": "The metadata is not what was packed. Copy the store again from where it validates, "
    "or convert the source again.",
    "files": "The store was damaged after packing. {repair} rewrites what is missing or altered, "
    "and nothing else; files that do not belong are to be moved away.",
    "checksums": "The file was damaged after packing. {repair} rewrites the damaged chunks.",
    "hashes": "The file was damaged after packing. {repair} rewrites it.",
    "inventory": "The store is of another model or another source. Convert the source again.",
    "values": "No correct packer writes such values: the source itself is damaged. Check its "
    "hashes, download it again and convert it again.",
    "config": "The store was packed from a checkpoint with another config.json. Give that one.",
    "inversion": "The bytes are not the source's. Give the source that was packed, or convert "
    "this one again.",
    "layouts": "The metadata is not what was packed. Convert the source again.",
    "counts": "The metadata is not what was packed. Convert the source again.",
    "source": "Give the source that was packed; if it is this one, convert it again.",
    "assets": "The file is not the source's. Convert the source again.",
    "exact": "The source has experts that NVFP4 cannot hold. Convert it again with "
    "`--accept-rounding` if these errors do no harm, or choose another source.",
    "text": "`dsv4 run` refuses the file. Correct it in the source and convert again, or, if "
    "its checksum does not match either, repair the store.",
    "recipe": "The recipe is not the one that was packed by. Convert the source again.",
    "origin": "What the store says of its source is wrong. Convert the source again.",
    "loss": "What the store says of its losses is wrong. Convert the source again.",
    "bound": "A code is not the nearest one, which no correct packer writes. Convert the source "
    "again.",
    "optimum": "The format allows a smaller error. Convert the source again with this version.",
}
"""What to do about a finding, by the check that made it. {repair}: the command."""

_DAMAGED = "The store is damaged: it is not what was packed."
_DIFFERS = "The store is not what its source and its recipe make."
_FAILED = {
    "open": "The store cannot be opened.",
    "root": _DAMAGED,
    "files": _DAMAGED,
    "checksums": _DAMAGED,
    "hashes": _DAMAGED,
    "values": "The store holds values that no correct packer writes.",
    "layouts": _DAMAGED,
    "counts": _DAMAGED,
}


def render_html(report: Report) -> str:
    """The page. The same report gives the same text; only its times differ between two runs."""
    style = _resource("report.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # No control character of a stranger's reaches the page, nor reorders what it shows.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters |= {"words": _words, "size": size, "duration": duration}
    where = Path(os.path.abspath(report.path))  # noqa: PTH100  # follows no link
    template = environment.from_string(_resource("report.html.j2"))
    return template.render(
        report=report,
        style=Markup(style),
        style_hash=digest,
        validated_by=TOOL,
        name=where.name,
        where=str(where),
        command=_command(report),
        sentence=_sentence(report),
        advice={check: _advice(check, report) for check in ADVICE},
        findings=_by_check(report.findings),
        widths=WIDTHS,
        MAX_ROWS=MAX_ROWS,
        more=max(len(report.findings) - MAX_FINDINGS, 0),
        plots=plots,
        **_losses(report),
        histograms=[plots.histogram(kind, counts) for kind, counts in sorted(_scales(report))],
        exact=sum(verdict.exact for verdict in report.tensors),
        slowest=_top(report.tensors, "seconds"),
    )


def _sentence(report: Report) -> str:
    """What was looked at, or what failed, in one sentence."""
    if report.wrong_source:
        return "The source is another checkpoint, so nothing was compared with it."
    if report.findings:
        return _FAILED.get(report.findings[0].check, _DIFFERS)
    if not report.checks:
        return "Nothing was checked."
    if report.quick:
        return "A quick check: metadata and file sizes, no content."
    if report.tensors:
        return "Every tensor was inverted from the emitted bytes and compared with the source."
    if report.checksums == "xxh3":
        return "The store was checked against accidents: chunk checksums, but no BLAKE3."
    return "The store was checked against itself; without a source, nothing proves its values."


def _advice(check: str, report: Report) -> str:
    source = "SRC" if report.source is None else shlex.quote(report.source)
    return ADVICE[check].format(
        repair=f"`dsv4 repair {shlex.quote(str(report.path))} --source {source}`"
    )


def _command(report: Report) -> str:
    """What gives this report again."""
    words = ["dsv4", "validate", str(report.path)]
    words += [] if report.source is None else ["--source", report.source]
    words += ["--quick"] if report.quick else []
    words += ["--checksums", "xxh3"] if report.checksums == "xxh3" else []
    return shlex.join(words)


def _words(text: str) -> Markup:
    """A text whose `names` in backticks are set as code."""
    parts = printable(text).split("`")
    shown = (
        escape(p) if i % 2 == 0 else Markup("<code>{}</code>").format(p)
        for i, p in enumerate(parts)
    )
    return Markup("").join(shown)


def _by_check(findings: list[Finding]) -> dict[str, list[Finding]]:
    """The findings that are shown, by check, so that what to do is said once."""
    found: dict[str, list[Finding]] = {}
    for finding in findings[:MAX_FINDINGS]:
        found.setdefault(finding.check, []).append(finding)
    return found


def _losses(report: Report) -> dict[str, Any]:
    """What the page says of rounding: as measured where a source was given, else as recorded."""
    measured = {
        verdict.name: rel_mse
        for verdict in report.tensors
        if verdict.loss is not None and (rel_mse := verdict.loss["rel_mse"])
    }
    losses = measured if report.tensors else report.recorded
    drawn = {name: rel_mse for name, rel_mse in losses.items() if math.isfinite(rel_mse)}
    order = {name: drawn.get(name, math.inf) for name in losses}
    return {
        "measured": bool(report.tensors),
        "losses": losses,
        "error_plots": [plots.error_plot(drawn, width) for width in WIDTHS if drawn],
        "worst": sorted(losses.items(), key=lambda item: -order[item[0]])[:MAX_ROWS],
        "verdicts": {verdict.name: verdict for verdict in report.tensors},
        "compared": [v for v in report.tensors if v.excess is not None],
        "sampled": sum((v.optimum_share or 1.0) < 1.0 for v in report.tensors),
        "gates": sorted(report.gates, key=lambda gate: gate.same_set)[:MAX_ROWS],
        "excess": _top([v for v in report.tensors if (v.excess or 0.0) > 0.0], "excess"),
    }


def _scales(report: Report) -> Iterator[tuple[str, list[int]]]:
    return ((kind, counts) for kind, counts in report.scales.items() if any(counts))


def _top(verdicts: list[TensorVerdict], field: str) -> list[TensorVerdict]:
    return sorted(verdicts, key=lambda verdict: -float(getattr(verdict, field)))[:MAX_ROWS]


def _resource(name: str) -> str:
    return (resources.files("dsv4.validate.page") / name).read_text(encoding="utf-8")
