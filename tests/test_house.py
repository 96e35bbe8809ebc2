"""The house holds: lint, types, file and function sizes, and who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dsv4"
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60  # signature and docstring included

ALLOWED = {
    "formats": {"formats"},
    "kernels": {"kernels", "formats"},
    "runtime": {"runtime", "kernels", "formats"},
    "convert": {"convert", "formats"},
    "validate": {"validate", "convert", "formats"},
    "synthetic": {"synthetic", "convert", "formats"},
    "serve": {"serve", "runtime", "kernels", "formats"},
}
OFFLINE_LIBRARIES = {"zarr", "safetensors", "huggingface_hub", "blake3"}
ONLINE_ENTRY = """
import sys
for name in ("zarr", "safetensors", "huggingface_hub", "blake3", "click", "rich", "cutlass"):
    sys.modules[name] = None  # importing it now raises ImportError
import torch, dsv4
session = dsv4.load(sys.argv[1]).session(8)
print(session.forward(torch.tensor([1, 2, 3])).shape[0])
"""


def _modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _imports(path: Path) -> Iterator[str]:
    """Top-level dotted names a module imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy", "--no-error-summary"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_lint_and_types(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_their_neighbours(room: str) -> None:
    modules = sorted((PACKAGE / room).rglob("*.py"))
    assert modules
    for path in modules:
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] == "dsv4" and len(parts) > 1:
                assert parts[1] in ALLOWED[room], f"{path.relative_to(ROOT)} imports {name}"


def test_the_package_does_not_use_what_is_beside_it() -> None:
    for path in _modules():
        for name in _imports(path):
            outside = name.split(".")[0] in ("benchmarks", "tests", "examples")
            assert not outside, f"{path.relative_to(ROOT)} imports {name}"


def test_the_online_half_names_no_offline_library() -> None:
    writers = {"zarr_metadata.py", "file_digest.py"}  # used where a store is written or proved
    for room in ("runtime", "kernels", "formats"):
        for path in sorted((PACKAGE / room).rglob("*.py")):
            if path.name not in writers:
                top = {name.split(".")[0] for name in _imports(path)}
                assert not top & OFFLINE_LIBRARIES, path.relative_to(ROOT)


def test_the_online_half_runs_without_the_offline_libraries(standard_store: Path) -> None:
    command = [sys.executable, "-c", ONLINE_ENTRY, str(standard_store)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "3", done.stderr


def test_files_and_functions_stay_readable() -> None:
    long = []
    for path in _modules():
        text = path.read_text()
        if (count := len(text.splitlines())) > MAX_FILE_LINES:
            long.append(f"{path.relative_to(ROOT)}: {count} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {length} lines")
    assert long == []


def test_every_module_and_public_function_says_what_it_is() -> None:
    silent = []
    for path in _modules():
        tree = ast.parse(path.read_text())
        if ast.get_docstring(tree) is None:
            silent.append(str(path.relative_to(ROOT)))
        definitions = (n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef))
        silent += [
            f"{path.relative_to(ROOT)}: {node.name}"
            for node in definitions
            if not node.name.startswith("_") and ast.get_docstring(node) is None
        ]
    assert silent == []
