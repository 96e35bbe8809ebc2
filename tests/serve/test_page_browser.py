"""The page in a real browser: it streams, folds the thinking away, stops, and fits a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.conftest import Script
from tests.support.serving import Live, ScriptedEngine, live, served_model

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (extra `browser`)"
)

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ENDED = "count => document.querySelectorAll('.cost').length === count"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no Chromium on this machine (looked for {', '.join(NAMES)})")
    with playwright.sync_playwright() as started:
        # The page is ours; a sandbox cannot be had as root in a container.
        chromium = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def talking(script: Script) -> Iterator[Live]:
    script.say("I greet back.</think>Hello <b>you</b>!\n  x < 3")
    with live(ScriptedEngine(script, cached=5), served_model(effort="low")) as running:
        yield running


def opened(browser: Any, served: Live, complaints: list[str], width: int = 375) -> Any:

    def elsewhere(url: str) -> list[str]:
        return [] if url.startswith(served.url) else [url]

    page = browser.new_page(viewport={"width": width, "height": 700}, color_scheme="dark")
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.extend(elsewhere(request.url)))
    page.goto(served.url)
    page.wait_for_function("document.getElementById('state').textContent === 'ready'")
    return page


def ask(page: Any, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def test_a_conversation(browser: Any, talking: Live) -> None:
    complaints: list[str] = []
    page = opened(browser, talking, complaints)
    ask(page, "hi <i>there</i>")
    page.wait_for_function(ENDED, arg=1)
    assert page.inner_text("article.user") == "hi <i>there</i>"
    assert page.inner_text("article.model > .said") == "Hello <b>you</b>!\n  x < 3"
    assert not page.is_visible(".thought .said")
    page.click(".thought summary")
    assert page.inner_text(".thought .said") == "I greet back."
    assert "5 cached" in page.inner_text(".cost")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    page.click("#settings summary")
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0.5")
    ask(page, "more")
    page.wait_for_function(ENDED, arg=2)
    prompt = talking.text.decode(talking.engine.jobs[1].ids)
    assert "Be brief." in prompt and "hi <i>there</i>" in prompt and "more" in prompt
    assert talking.engine.jobs[1].sampler.temperature == 0.5
    page.close()
    assert complaints == []


def test_stop_ends_the_job(browser: Any, talking: Live) -> None:
    complaints: list[str] = []
    page = opened(browser, talking, complaints, width=1200)
    talking.engine.step = 0.05
    ask(page, "hi")
    page.wait_for_selector(".thought")
    page.click("#stop")
    page.wait_for_function(ENDED, arg=1)
    assert "stopped" in page.inner_text(".cost")
    assert talking.engine.cancels.get(timeout=5) is talking.engine.jobs[0]
    page.close()
    assert complaints == []
