"""README: short, and what it prints of the demo is what the demo prints."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
MAX_LINES = 150
LEFT_OUT = "..."
_TIMES = re.compile(r"[\d.]+( s\b| tokens/s| min\b)")  # a machine's, not the demo's


def blocks() -> list[tuple[str, list[str]]]:
    """(command, the lines printed below it) of the demo."""
    (text,) = re.findall(r"^## What `make demo` prints.*?^```\n(.*?)^```", README, re.S | re.M)
    found = []
    for part in text.split("$ dsv4 ")[1:]:
        command = re.match(r".*?(?<!\\)\n", part, re.S)
        assert command is not None
        found.append((command[0].replace("\\\n", " "), part[command.end() :].splitlines()))
    return found


def missing(shown: list[str], printed: list[str]) -> str | None:
    """The first line of `shown` that is not printed where it stands; None if all are."""
    at, free = 0, False
    for line in shown:
        if line == LEFT_OUT:
            free = True
            continue
        places = range(at, len(printed)) if free else range(at, min(at + 1, len(printed)))
        place = next((i for i in places if printed[i] == line), None)
        if place is None:
            return line
        at, free = place + 1, False
    return None if free or at == len(printed) else printed[at]


def same(lines: Iterator[str] | list[str]) -> list[str]:
    """Lines as they are compared: without trailing blanks, and without times."""
    return [_TIMES.sub(r"#\1", line.rstrip()) for line in lines]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= MAX_LINES


def test_the_demo_prints_what_it_says(tmp_path: Path) -> None:
    shown = blocks()
    makefile = (ROOT / "Makefile").read_text()
    assert [words.split()[0] for words, _ in shown] == ["convert", "validate", "run"]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "demo").mkdir()
    for words, lines in shown:
        command = words.replace("$(printf 'class Stack:\\n    def __init__(self):')", "@PROMPT@")
        arguments = [
            word.replace("@PROMPT@", "class Stack:\n    def __init__(self):")
            for word in shlex.split(command)
        ]
        for option in (word for word in arguments if word.startswith("--")):
            assert option in makefile
        done = subprocess.run(
            [sys.executable, "-m", "dsv4", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        found = missing(same(lines), same(done.stdout.splitlines()))
        assert found is None, found


@pytest.mark.parametrize(
    ("shown", "found"),
    [
        (["a", "b"], "b"),
        (["a", "c"], None),
        (["a", LEFT_OUT], None),
        ([LEFT_OUT, "c"], None),
        (["a"], "c"),
        (["c", "a"], "c"),
    ],
)
def test_a_line_that_is_not_printed_is_noticed(shown: list[str], found: str | None) -> None:
    assert missing(shown, ["a", "c"]) == found


def test_what_readme_links_to_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        if not target.startswith("https:"):
            assert (ROOT / target).exists(), target


def test_the_tests_that_promises_name_exist() -> None:
    for target in re.findall(r"(tests/[\w./]+)", README):
        assert (ROOT / target).exists(), target
