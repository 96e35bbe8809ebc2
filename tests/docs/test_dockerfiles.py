"""The Dockerfiles agree with pyproject.toml, Makefile and commands; nothing is built here."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dsv4.cli import cli

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FILES = ("Dockerfile", "Dockerfile.pack")
KNOWN = {"FROM", "RUN", "ARG", "WORKDIR", "COPY", "USER", "ENV", "EXPOSE", "ENTRYPOINT", "CMD"}


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, its arguments) in order, continued lines joined."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2]) for line in joined.splitlines() if line]


def commands_in(text: str) -> list[list[str]]:
    """The words of every command of a shell line."""
    return [shlex.split(part) for part in text.split("&&")]


@pytest.mark.parametrize("name", FILES)
def test_versions_are_those_of_the_project(name: str) -> None:
    found = instructions(name)
    assert {word for word, _ in found} <= KNOWN and found[0][0] == "FROM"
    for _, image in (one for one in found if one[0] == "FROM"):
        version = re.match(r"python:(\d+\.\d+)-slim\b", image)
        assert version and version[1] in SpecifierSet(PROJECT["requires-python"])
    torch = next(Requirement(one) for one in PROJECT["dependencies"] if one.startswith("torch"))
    makefile = (ROOT / "Makefile").read_text()
    for _, text in (one for one in found if one[0] == "ARG"):
        key, _, value = text.partition("=")
        value = value.strip('"')
        if key == "TORCH":
            assert value.removeprefix("torch==") in torch.specifier
            assert f"TORCH := {value}\n" in makefile
        else:
            assert f"{key} ?= {value}" in makefile or key == "ARCH"


@pytest.mark.parametrize("name", FILES)
def test_extras_commands_and_files_are_there(name: str) -> None:
    ignored = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if "!" in line
    ]
    for word, text in instructions(name):
        if word == "COPY" and "--from=" not in text:
            for source in text.split()[:-1]:
                assert (ROOT / source).exists() and source in ignored
        for words in commands_in(text) if word == "RUN" else ():
            if words[0] == "dsv4":
                assert_command(words[1:])
            for package in words:
                if match := re.fullmatch(r"\.\[(.+)\]", package):
                    assert set(match[1].split(",")) <= set(PROJECT["optional-dependencies"])
    assert json.loads(dict(instructions(name))["ENTRYPOINT"]) == ["dsv4"]
    assert PROJECT["scripts"]["dsv4"]


@pytest.mark.parametrize("name", FILES)
def test_the_commands_in_the_comments_are_commands(name: str) -> None:
    said = [line[1:].strip() for line in (ROOT / name).read_text().splitlines() if line[:1] == "#"]
    builds = [line for line in said if line.startswith("docker build")]
    runs = [line for line in said if line.startswith("docker run")]
    assert builds and runs
    for line in builds:
        words = shlex.split(line)
        assert words[-1] == "." and (name == "Dockerfile") == ("--file" not in words)
    (image,) = {shlex.split(line)[shlex.split(line).index("--tag") + 1] for line in builds}
    for line in runs:
        words = shlex.split(line)
        assert_command(words[words.index(image) + 1 :])


def assert_command(words: list[str]) -> None:
    """Every word that leads to a command and every option is one that there is."""
    command: click.Command = cli
    while isinstance(command, click.Group):
        found = command.commands.get(words[0])
        assert found is not None, words
        command, words = found, words[1:]
    known = {option for one in command.params for option in one.opts}
    assert {word for word in words if fnmatch.fnmatch(word, "--*")} <= known
