"""The page at `/` is one file that needs nothing else, and its policy lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import httpx2
import pytest

from tests.serve.conftest import Script
from tests.support.serving import Live, ScriptedEngine, live


class _Parts(HTMLParser):
    """Inline scripts and styles, ids, and whatever would be fetched or run from an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self.outside: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self._open: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = tag if tag in self.inline else None
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            inert = name == "href" and value == "data:,"
            if not inert and (name in ("src", "href", "style") or name.startswith("on")):
                self.outside.append((tag, name))

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.inline[self._open].append(data)
            self._open = None


@pytest.fixture
def page(served: Live) -> httpx2.Response:
    return served.client.get(served.url)


def test_its_policy_names_its_own_parts_and_no_others(page: httpx2.Response) -> None:
    parts = _Parts()
    parts.feed(page.text)
    assert parts.outside == []
    policy = dict(
        rule.strip().split(" ", 1) for rule in page.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    for tag, (content,) in parts.inline.items():
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"


def test_it_asks_for_nothing_from_elsewhere_and_writes_no_html(page: httpx2.Response) -> None:
    assert "://" not in page.text and "@import" not in page.text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", page.text)


def test_its_script_uses_elements_that_are_there(page: httpx2.Response) -> None:
    parts = _Parts()
    parts.feed(page.text)
    used = set(re.findall(r'at\("(\w+)"\)', page.text))
    named = re.search(r"for \(const name of \[([^\]]+)\]", page.text)
    assert named is not None
    assert used | set(re.findall(r'"(\w+)"', named[1])) <= set(parts.ids)
    assert len(parts.ids) == len(set(parts.ids))


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_its_script_parses(page: httpx2.Response, tmp_path: Path) -> None:
    script = tmp_path / "page.js"
    script.write_text(page.text.split("<script>")[1].split("</script>")[0])
    done = subprocess.run(["node", "--check", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_can_be_turned_off(script: Script) -> None:
    with live(ScriptedEngine(script), page=False) as served:
        assert "<script>" not in served.client.get(served.url).text
