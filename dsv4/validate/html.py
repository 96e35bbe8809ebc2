"""The report as one HTML page that needs nothing else: no network, no script, no other file.

jinja2 for its escaping, since names come from an untrusted checkpoint; the plots are SVG drawn by
the template, because a plotting library would outweigh the validator for a scatter and some bars.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dsv4.formats.plain_text import printable
from dsv4.formats.version import TOOL
from dsv4.validate import plots
from dsv4.validate.report import Finding, Report, TensorVerdict

MAX_FINDINGS = 500
MAX_ROWS = 12
WIDTHS = {plots.WIDTH: "narrow", plots.WIDE: "wide"}

ADVICE = {
    "open": "Give the directory that `dsv4 convert` wrote; if it is unfinished, run the same "
    "conversion again.",
    "root": "The metadata is not what was packed. Copy the store again from where it validates, "
    "or convert the source again.",
    "files": "Copy the store again, or convert the source again; remove files that do not belong.",
    "checksums": "The file was damaged after packing. Copy it again from where it validates.",
    "hashes": "The file was damaged after packing. Copy it again from where it validates.",
    "inventory": "The store is of another model or another source. Convert the source again.",
    "values": "No correct packer writes such values: the source itself is damaged. Check its "
    "hashes, download it again and convert it again.",
    "config": "The store was packed from a checkpoint with another config.json. Give that one.",
    "inversion": "The bytes are not the source's. Give the source that was packed, or convert "
    "this one again.",
    "layouts": "The metadata is not what was packed. Convert the source again.",
    "counts": "The metadata is not what was packed. Convert the source again.",
    "source": "The store does not come from this source, or says so wrongly. Convert it again.",
    "assets": "The file is not the source's. Convert the source again.",
    "exact": "The source has experts that NVFP4 cannot hold. Convert it again with "
    "--accept-rounding if these errors do no harm, or choose another source.",
    "text files": "`dsv4 run` refuses the file. Correct it in the source and convert again, or, if "
    "its checksum does not match either, repair the store.",
    "recipe": "The recipe is not the one that was packed by. Convert the source again.",
    "origin": "What the store says of its source is wrong. Convert the source again.",
    "loss": "What the store says of its losses is wrong. Convert the source again.",
    "bound": "A code is not the nearest one, which no correct packer writes. Convert the source "
    "again.",
    "optimum": "The format allows a smaller error. Convert the source again with this version.",
}
"""What to do about a finding, by the check that made it."""


def write_html(report: Report, path: Path) -> None:
    """Write the page to `path`. Raises OSError."""
    path.write_text(render_html(report), encoding="utf-8")


def render_html(report: Report) -> str:
    """The page. The same report gives the same text; only the seconds differ between two runs."""
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
    template = environment.from_string(_resource("report.html.j2"))
    return template.render(
        report=report,
        style=Markup(style),
        style_hash=digest,
        validated_by=TOOL,
        advice=ADVICE,
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
    return (resources.files("dsv4.validate") / name).read_text(encoding="utf-8")
