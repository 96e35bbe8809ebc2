"""The page in a real browser: it fits a phone, draws its plots, and follows the colour scheme."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dsv4
from dsv4.validate.page.html import render_html

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (extra `browser`)"
)

PHONE, DESK = 375, 1200
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
READABLE = 4.5  # WCAG AA for text
LOOK = """() => {
  const rgb = (element, what) =>
    getComputedStyle(element)[what].match(/[\\d.]+/g).slice(0, 3).map(Number);
  const boxes = [...document.querySelectorAll("svg.errors, svg.histogram")]
    .map(svg => svg.getBoundingClientRect()).filter(box => box.width > 0)
    .map(box => [box.left, box.width, box.height]);
  const marks = [...document.querySelectorAll("svg.errors .mark")]
    .filter(mark => mark.checkVisibility()).map(mark => mark.getBoundingClientRect().width);
  const small = [...document.querySelectorAll("svg.errors text, svg.histogram text")]
    .map(text => text.getBoundingClientRect().height).filter(height => height > 0);
  return {
    width: document.documentElement.scrollWidth,
    verdict: document.querySelector("h1").textContent.trim(),
    back: rgb(document.body, "backgroundColor"), text: rgb(document.body, "color"),
    raised: rgb(document.querySelector("header"), "backgroundColor"),
    verdictColor: rgb(document.querySelector("h1"), "color"),
    faint: rgb(document.querySelector(".faint"), "color"),
    label: rgb(document.querySelector("svg.histogram text"), "fill"),
    mark: rgb(document.querySelector("svg.errors .mark"), "fill"),
    boxes, marks, text_height: Math.min(...small),
  };
}"""


def _executable() -> str:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no Chromium on this machine (looked for {', '.join(NAMES)})")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = _executable()
    with playwright.sync_playwright() as started:
        # The page is ours; a sandbox cannot be had as root in a container.
        chromium = started.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def good(tiny_source: Path, standard_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "good.html"
    path.write_text(render_html(dsv4.validate(standard_store, source=tiny_source)))
    return path


@pytest.fixture(scope="module")
def bad(tiny_source: Path, standard_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Findings of the longest names, with markup in them."""
    path = tmp_path_factory.mktemp("page") / "bad.html"
    report = dsv4.validate(standard_store, source=tiny_source)
    report.path = Path("/" + "deep/" * 60)
    report.add("inversion", "layers." + "x" * 250, "<script>document.title='run'</script>" * 20)
    report.add("files", "y" * 512, "word " * 100)
    path.write_text(render_html(report))
    return path


def _look(browser: Any, path: Path, width: int, scheme: str) -> dict[str, Any]:
    """What the page looks like, having talked to nobody and complained of nothing."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(path.as_uri())
    seen: dict[str, Any] = page.evaluate(LOOK)
    assert page.title() != "run"
    page.close()
    assert requests == [path.as_uri()]
    assert complaints == []
    return seen


def _contrast(one: list[float], other: list[float]) -> float:
    """WCAG contrast ratio of two sRGB colours, 1 to 21."""

    def luminance(color: list[float]) -> float:
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in (channel / 255 for channel in color)
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("name", ["good", "bad"])
def test_the_page_fits_and_is_readable_in_both_schemes(
    browser: Any, name: str, width: int, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(name)
    seen = {scheme: _look(browser, path, width, scheme) for scheme in ("light", "dark")}
    for look in seen.values():
        assert look["width"] <= width
        assert look["verdict"] == {"good": "OK", "bad": "2 findings"}[name]
        assert len(look["boxes"]) == 4  # one layout of the plot over layers, three histograms
        for left, across, down in look["boxes"]:
            assert left >= 0
            assert left + across <= width
            assert across >= 300
            assert down >= 150
        assert len(look["marks"]) == 8
        assert min(look["marks"]) > 3
        assert look["text_height"] >= 10
        for text in ("text", "faint", "label"):
            assert _contrast(look[text], look["back"]) >= READABLE
        assert _contrast(look["verdictColor"], look["raised"]) >= READABLE
        assert _contrast(look["mark"], look["back"]) >= 3
    assert _contrast(seen["light"]["back"], seen["dark"]["back"]) > 10
    assert _contrast(seen["light"]["text"], seen["dark"]["text"]) > 10
