"""Each half runs where only its extra is installed, and names the extra that the other one needs.

A clean environment is a folder of links to the packages that an extra asks for, directly or through
others, and a Python that sees nothing else (`-I -S`).
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dsv4.extras import BRINGS

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Declared by others, and imported by neither them nor us when a store is run.
NOT_NEEDED = {("tokenizers", "huggingface-hub"), ("torch", "jinja2")}
COMMAND = """
import sys
sys.path[:0] = [{packages!r}, {root!r}]
from dsv4.__main__ import main
main()
"""
PYTHON = """
import sys
sys.path[:0] = [{packages!r}, {root!r}]
import dsv4
try:
    dsv4.convert("source", "out")
except dsv4.Dsv4Error as error:
    print(error)
"""

KERNELS = """
import json, pathlib, sys
sys.path[:0] = [{packages!r}, {root!r}]
from dsv4.kernels.core.library import Library
import dsv4
folder = pathlib.Path(sys.argv[1])
(folder / "sm_90a").mkdir()
(folder / "sm_90a" / "kernels.json").write_text(json.dumps(dict(compiler="", kernels=dict())))
try:
    Library(folder, "sm_90a")
except dsv4.Dsv4Error as error:
    print(error)
"""


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _asked_for(extra: str) -> Iterator[Requirement]:
    """What pyproject.toml lists for `extra`, extras within it resolved."""
    for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]):
        one = Requirement(text)
        if one.name == "dsv4":
            for other in one.extras:
                yield from _asked_for(other)
        else:
            yield one


def _distributions(extra: str) -> set[str]:
    """Their names and those of all that they need, except for `NOT_NEEDED`."""
    found: set[str] = set()
    waiting = [_plain(one.name) for one in _asked_for(extra)]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for text in distribution(name).requires or ():
            needed = Requirement(text)
            wanted = needed.marker is None or needed.marker.evaluate({"extra": ""})
            if wanted and (name, _plain(needed.name)) not in NOT_NEEDED:
                waiting.append(_plain(needed.name))
    return found


def _environment(extra: str, folder: Path) -> Path:
    """A folder with links to the packages of `extra`."""
    folder.mkdir()
    for name in _distributions(extra):
        there = distribution(name)
        for top in {path.parts[0] for path in there.files or ()} - {"..", "__pycache__"}:
            link = folder / top
            if not link.exists():
                link.symlink_to(Path(str(there.locate_file(top))))
    return folder


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("environments")
    return {extra: _environment(extra, folder / extra) for extra in ("convert", "run")}


def _run(script: str, packages: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    code = script.format(packages=str(packages), root=str(ROOT))
    command = [sys.executable, "-I", "-S", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=packages.parent)


def _chat(packages: Path, store: Path) -> tuple[int, str]:
    """`dsv4 run` on a terminal -> exit code, and what it says."""
    code = COMMAND.format(packages=str(packages), root=str(ROOT))
    ours, its = pty.openpty()
    command = [sys.executable, "-I", "-S", "-c", code, "run", str(store)]
    with subprocess.Popen(command, stdin=its, stdout=subprocess.DEVNULL, stderr=its) as process:
        os.close(its)
        said = b""
        with contextlib.suppress(OSError):  # EIO: the process is gone
            while piece := os.read(ours, 4096):
                said += piece
        os.close(ours)
    return process.returncode, " ".join(said.decode().split())


def test_the_two_halves_ask_for_different_packages() -> None:
    convert, run = _distributions("convert"), _distributions("run")
    assert not run & {"zarr", "blake3", "huggingface-hub", "httpx2", "jinja2", "safetensors"}
    assert not convert & {"apache-tvm-ffi", "prompt-toolkit", "nvidia-cutlass-dsl"}


@pytest.mark.parametrize("extra", BRINGS)
def test_what_an_extra_brings_is_what_is_named_when_it_is_missing(extra: str) -> None:
    common = {_plain(Requirement(text).name) for text in PROJECT["dependencies"]}
    listed = {_plain(one.name) for one in _asked_for(extra)} - common
    modules = {"apache-tvm-ffi": "tvm-ffi"}
    assert {modules.get(name, name) for name in listed} == set(map(_plain, BRINGS[extra]))


def test_convert_packs_and_proves_and_names_what_a_gpu_needs(
    environments: dict[str, Path], tiny_source: Path, tmp_path: Path
) -> None:
    here, packed = environments["convert"], tmp_path / "packed"
    made = _run(COMMAND, here, "convert", "--hf", tiny_source, "--out", packed)
    assert made.returncode == 0, made.stderr
    proved = _run(COMMAND, here, "validate", packed, "--source", tiny_source)
    assert proved.returncode == 0, proved.stderr
    code, said = _chat(here, packed)
    assert code == 2 and "Traceback" not in said
    assert "dsv4: this needs dsv4[run], as prompt_toolkit is not installed" in said
    kernels = _run(KERNELS, here, tmp_path).stdout
    assert "this needs dsv4[run]: pip install 'dsv4[run]'" in kernels


def test_run_answers_and_names_what_packing_needs(
    environments: dict[str, Path], standard_store: Path, tiny_source: Path, tmp_path: Path
) -> None:
    here = environments["run"]
    arguments = ("--tokens", "1,2,3", "--max-new-tokens", "2", "--device", "cpu", "--json")
    answer = _run(COMMAND, here, "run", standard_store, *arguments)
    assert answer.returncode == 0, answer.stderr
    shown = _run(COMMAND, here, "inspect", standard_store)
    assert shown.returncode == 0, shown.stderr
    for command in (
        ("plan", tiny_source),
        ("convert", "--hf", tiny_source, "--out", tmp_path / "packed"),
        ("validate", standard_store),
        ("tiny", tmp_path / "tiny"),
    ):
        refused = _run(COMMAND, here, *command)
        assert refused.returncode == 2, refused.stderr
        sentence = " ".join(refused.stderr.split())
        assert sentence.startswith("dsv4: this needs dsv4[convert]"), sentence
        assert sentence.endswith("pip install 'dsv4[convert]'"), sentence
    assert "this needs dsv4[convert]" in _run(PYTHON, here).stdout
    assert list(tmp_path.iterdir()) == []
