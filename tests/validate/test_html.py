"""The page says what the report says, needs nothing else, and runs nothing of a stranger's."""

from __future__ import annotations

import base64
import copy
import hashlib
import math
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

import dsv4
from dsv4.cli import cli
from dsv4.convert.exactness import Inexact
from dsv4.formats.plain_text import size
from dsv4.validate.page import plots
from dsv4.validate.page.html import ADVICE, MAX_FINDINGS, MAX_ROWS, render_html
from dsv4.validate.provenance import role
from dsv4.validate.report import SCALE_OCTAVES, Finding, Report, TensorVerdict
from tests.validate.page import Page

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = (
    "</code></td><script>alert(1)</script><img src=x onerror='a\"b'>&amp;{{ 7*7 }}\x1b[2J\u202e"
)
ALLOWED_ATTRIBUTES = {
    *("aria-hidden", "aria-label", "aria-labelledby", "charset", "class", "content", "cx", "cy"),
    *("d", "height", "http-equiv", "id", "lang", "name", "r", "role", "scope", "tabindex"),
    *("text-anchor", "viewbox", "width", "x", "x1", "x2", "y", "y1", "y2"),
}


@pytest.fixture(scope="module")
def compared(tiny_source: Path, standard_store: Path) -> Report:
    return dsv4.validate(standard_store, source=tiny_source)


@pytest.fixture(scope="module")
def alone(standard_store: Path) -> Report:
    return dsv4.validate(standard_store)


@pytest.fixture(scope="module")
def hostile(compared: Report) -> Report:
    """The same report, had every text in it come from an attacker."""
    report = copy.deepcopy(compared)
    report.path, report.source, report.root = Path(HOSTILE), HOSTILE, HOSTILE
    report.tool = report.recipe = HOSTILE
    report.findings += [Finding(HOSTILE, HOSTILE, HOSTILE), Finding("files", HOSTILE, HOSTILE)]
    loss = compared.tensors[-1].loss or {"rel_mse": 9.0, "sqnr_db": None, "amax": 0.0}
    report.tensors.append(TensorVerdict(HOSTILE, HOSTILE, False, loss | {"rel_mse": 9.0}, 1.0, 9e9))
    report.checks[HOSTILE] = 3
    report.inexact.append(Inexact(HOSTILE, 8, 1, 1e-9, 1e-9))
    report.zero.append(HOSTILE)
    report.scales[HOSTILE] = [1] * len(SCALE_OCTAVES)
    return report


@pytest.fixture(scope="module")
def quick(standard_store: Path) -> Report:
    return dsv4.validate(standard_store, quick=True)


REPORTS = ("compared", "alone", "hostile", "quick")


@pytest.fixture(params=REPORTS)
def report(request: pytest.FixtureRequest) -> Report:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Report)
    return found


def test_the_page_is_well_formed_and_refers_to_nothing(report: Report) -> None:
    text = render_html(report)
    page = Page(text)
    assert page.errors == []
    tags = {element.tag for element in page.elements}
    assert not tags & {"script", "link", "iframe", "img", "object", "embed", "base", "form", "a"}
    assert {name for element in page.elements for name in element.attributes} <= ALLOWED_ATTRIBUTES
    (style,) = page.all("style")
    assert not re.search(r"@import|url\(|expression|http", style.text)
    policy = next(
        element.attributes["content"]
        for element in page.all("meta")
        if element.attributes.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(style.text.encode()).digest()).decode()
    assert policy.startswith("default-src 'none';")
    assert f"style-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_a_strangers_text_is_shown_and_not_obeyed(hostile: Report) -> None:
    text = render_html(hostile)
    assert "<script" not in text
    assert "49" not in Page(text).text("root")
    assert not set(text) & {"\x1b", "\u202e"}
    shown = HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    page = Page(text)
    assert page.text("root") == shown
    assert page.rows(f"Findings: {shown}") == [[shown, shown]]
    assert page.rows("Largest relative error")[0][0] == shown
    assert page.rows("Slowest tensors")[0][0] == shown
    assert [shown, "3"] in page.rows("What was checked")
    assert any(shown in title.text for title in page.all("title"))


def test_the_numbers_are_the_reports(compared: Report) -> None:
    page = Page(render_html(compared))
    rounded = {v.name: v.loss["rel_mse"] for v in compared.tensors if v.loss is not None}
    exact = sum(verdict.exact for verdict in compared.tensors)
    assert page.text("verdict") == "OK"
    assert page.text("root") == compared.root
    assert page.text("tensors") == (
        f"{len(compared.tensors)} compared, {exact} of them equal to the source exactly, "
        f"{len(rounded)} rounded"
    )
    assert len(rounded) == 8
    worst = page.rows("Largest relative error")
    assert {row[0]: row[1] for row in worst} == {
        name: f"{rel_mse:.4e}" for name, rel_mse in rounded.items()
    }
    assert [float(row[1]) for row in worst] == sorted(
        (float(row[1]) for row in worst), reverse=True
    )
    titles = [title.text for title in page.all("title")]
    for name, rel_mse in rounded.items():  # once in either layout
        assert titles.count(f"{name}: {rel_mse:.4g}") == 2
    assert page.rows("What was checked") == [
        [check, f"{count:,}"] for check, count in compared.checks.items()
    ]
    slow = page.rows("Slowest tensors")
    assert len(slow) == MAX_ROWS
    assert float(slow[0][1]) == pytest.approx(max(v.seconds for v in compared.tensors), abs=1e-3)
    assert f"all {len(rounded)} rounded tensors are at the optimum" in render_html(compared)


def test_without_a_source_losses_are_those_of_the_conversion(
    alone: Report, standard_store: Path
) -> None:
    text = render_html(alone)
    packed = dsv4.open(standard_store)
    rows = Page(text).rows("Largest relative error")
    assert len(rows) == 8
    for name, rel_mse, _ in rows:
        assert rel_mse == f"{packed.provenance(name)['loss']['rel_mse']:.4e}"
    assert "as recorded at conversion" in text
    assert "nothing proves its values" in text
    exact = sum(packed.provenance(name)["exact"] for name in packed.names())
    assert Page(text).text("tensors") == f"{exact} carried exactly, as recorded at conversion"


def test_findings_come_with_what_to_do(tiny_source: Path, standard_store: Path) -> None:
    report = dsv4.validate(standard_store, source=tiny_source)
    report.add("inversion", "layers.0.x", "is not the source's")
    page = Page(render_html(report))
    assert page.text("verdict") == "1 finding"
    assert page.rows("Findings: inversion") == [["layers.0.x", "is not the source's"]]
    assert ADVICE["inversion"] in [p.text for p in page.all("p")]
    report.findings *= MAX_FINDINGS + 5
    page = Page(render_html(report))
    assert page.text("verdict") == f"{MAX_FINDINGS + 5} findings"
    assert len(page.rows("Findings: inversion")) == MAX_FINDINGS
    assert any("and 5 more" in p.text for p in page.all("p"))


def test_every_check_has_its_advice() -> None:
    made = set()
    for path in sorted((ROOT / "dsv4" / "validate").rglob("*.py")):
        made |= set(re.findall(r"report\.add\(\s*\"(\w+)\"", path.read_text()))
    assert made == ADVICE.keys()


def test_a_store_that_cannot_be_opened_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "zarr.json").write_text("{}")
    report = dsv4.validate(tmp_path)
    page = Page(render_html(report))
    assert page.errors == []
    assert page.text("verdict") == "1 finding"
    assert not page.all("svg")
    assert [heading.text for heading in page.all("h2")] == ["Findings"]  # nothing empty is kept


def test_the_page_says_what_it_is_of_and_how_to_have_it_again(
    compared: Report, standard_store: Path, tiny_source: Path
) -> None:
    page = Page(render_html(compared))
    assert f"dsv4 validate: {standard_store.name}, OK" in [t.text for t in page.all("title")]
    again = shlex.split(page.text("command"))
    assert again == ["dsv4", "validate", str(standard_store), "--source", str(tiny_source)]
    nbytes = sum(file.stat().st_size for file in standard_store.rglob("*") if file.is_file())
    assert 0.9 * nbytes < compared.nbytes <= nbytes  # without the metadata
    assert size(compared.nbytes) in render_html(compared)


def test_a_damaged_store_is_told_what_repairs_it(tiny_source: Path, small_copy: Path) -> None:
    norm = small_copy / "norm" / "weight" / "c" / "0"
    norm.write_bytes(bytes([norm.read_bytes()[0] ^ 1]) + norm.read_bytes()[1:])
    report = dsv4.validate(small_copy, source=tiny_source)
    text = render_html(report)
    page = Page(text)
    said = [p.text for p in page.all("p")]
    assert "The store is damaged: it is not what was packed." in said
    assert not any("was inverted" in p for p in said)
    command = f"dsv4 repair {small_copy} --source {tiny_source}"
    assert command in [code.text for code in page.all("code")]
    assert "`" not in text.partition("</style>")[2]


def test_losses_without_a_number_are_shown(compared: Report) -> None:
    report = copy.deepcopy(compared)
    loss = {"sqnr_db": None, "max_abs_error": 1.0, "amax": 0.0}
    for name, rel_mse in (("a", math.inf), ("b", math.nan)):
        report.tensors.append(TensorVerdict(name, "nvfp4", False, loss | {"rel_mse": rel_mse}))
    page = Page(render_html(report))
    rows = page.rows("Largest relative error")
    assert [row[:2] for row in rows[:2]] == [["a", "inf"], ["b", "nan"]]


def test_two_validations_give_the_same_page(tiny_source: Path, standard_store: Path) -> None:
    pages = []
    for _ in range(2):
        report = dsv4.validate(standard_store, source=tiny_source)
        assert Page(render_html(report)).text("when").startswith(report.begun)
        report.begun, report.seconds = "2026-01-02T03:04:05+00:00", 61.0
        text = render_html(report)
        assert re.findall(r"20\d\d-\d\d\S*|\d\d:\d\d", text) == ["2026-01-02T03:04:05+00:00,"]
        pages.append(text.partition('<section aria-labelledby="slowest">')[0])
    assert pages[0] == pages[1]


def test_scales_are_counted_once_and_without_padding(
    compared: Report, standard_store: Path
) -> None:
    packed = dsv4.open(standard_store)
    expected: dict[str, list[int]] = {}
    for name in packed.names():
        if packed.format_of(name) == "nvfp4":
            scales = packed.provenance(name)["scales"]
            totals = expected.setdefault(str(role(name)), [0, 0, 0])
            for index, key in enumerate(("blocks", "zero", "subnormal")):
                totals[index] += scales[key]
    assert expected.keys() == compared.scales.keys() == {"expert", "lm head", "router gate"}
    subnormal = slice(1, 1 + SCALE_OCTAVES[1:].index(-6))
    for kind, counts in compared.scales.items():
        assert [sum(counts), counts[0], sum(counts[subnormal])] == expected[kind]
    assert expected["expert"][2] > 0


@pytest.mark.parametrize("width", [plots.WIDTH, plots.WIDE])
@pytest.mark.parametrize("layers", [1, 6, 61])
def test_marks_lie_where_their_numbers_say(layers: int, width: float) -> None:
    losses = {"head.weight": 4e-3, "mtp.0.ffn.gate.weight": 5e-3}
    losses |= {f"layers.{n}.ffn.gate.weight": 6e-3 + n * 1e-5 for n in range(layers)}
    losses |= {f"layers.{n}.attn.{m}.weight": 3e-3 for n in range(layers) for m in ("wkv", "wq_a")}
    plot = plots.error_plot(losses, width)
    assert plot.series == ("dense", "lm head", "router gate")
    base, top = plot.y_ticks[0], plot.y_ticks[-1]
    scale = float(top.label) / (base.at - top.at)
    assert len(plot.marks) == 2 + 2 * layers
    for mark in plot.marks:
        name, value = mark.title.split(", ")[0].split(": ")
        assert (base.at - mark.y) * scale == pytest.approx(losses[name], rel=1e-6)
        assert float(value) == pytest.approx(losses[name], rel=1e-3)
        assert plots.LEFT - plot.radius <= mark.x <= width - plots.RIGHT
        assert plots.TOP <= mark.y <= mark.low <= plots.HEIGHT - plots.BOTTOM
    gates = [mark.x for mark in plot.marks if mark.series == 2]
    assert gates == sorted(gates)
    gaps = [b.at - a.at for a, b in zip(plot.x_ticks, plot.x_ticks[1:], strict=False)]
    assert min(gaps, default=99) >= 22  # labels of 11 px do not touch
    assert [tick.label for tick in plot.x_ticks[-2:]] == ["mtp", "head"]


def test_bars_are_as_high_as_their_share() -> None:
    counts = [0] * len(SCALE_OCTAVES)
    counts[0], counts[5], counts[-1] = 10, 30, 60
    plot = plots.histogram("expert", counts)
    shares = [bar.height for bar in plot.bars if bar.height > 0]
    assert shares == pytest.approx([shares[-1] / 6, shares[-1] / 2, shares[-1]])
    assert plot.bars[5].title == "2⁻⁵: 30 of 100 blocks (30 %)"
    tick = plot.y_ticks[-1]
    assert float(tick.label.split()[0]) <= 60 * 1.12
    assert plot.y_ticks[0].at - plot.bars[-1].height == pytest.approx(plot.bars[-1].y)


def test_the_command_writes_the_page(standard_store: Path, tmp_path: Path) -> None:
    page, data = tmp_path / "report.html", tmp_path / "report.json"
    args = ["validate", str(standard_store), "--html", str(page), "--json", str(data)]
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0, done.output
    assert Page(page.read_text(encoding="utf-8")).text("verdict") == "OK"
    for field in ("recorded_rel_mse", "scales", "said_exact", "validated_by", "recipe"):
        assert f'"{field}"' in data.read_text()
    (tmp_path / "zarr.json").write_text("{}")  # what is left of a store
    done = CliRunner().invoke(cli, ["validate", str(tmp_path), "--html", str(page)])
    assert done.exit_code == 1
    assert Page(page.read_text(encoding="utf-8")).text("verdict") == "1 finding"


def test_a_wheel_contains_what_the_page_is_made_of() -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    data = document["tool"]["setuptools"]["package-data"]
    packed = {
        ROOT / package.replace(".", "/") / pattern
        for package, patterns in data.items()
        for pattern in patterns
    }
    here = {p for p in (ROOT / "dsv4").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {path for path in here if path.suffix != ".py"} == packed
