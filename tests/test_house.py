"""The house holds: lint, types, file and function sizes, and who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.imports import circles, import_graph

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
    "export": {"export", "convert", "formats"},
    "sharing": {"sharing", "validate", "convert", "formats"},
    "synthetic": {"synthetic", "convert", "formats"},
    "serve": {"serve", "runtime", "kernels", "formats"},
}
LEAST_FILE_LINES = 40  # of a module that one other module imports

# Lines that the parts of the package may have: what they have, rounded up to 100. A feature raises
# a number in the commit that needs it. All three miss their targets: the book had 16,400 when its
# target was set, and what came since (counted exactness, going back, more of hubs and dialects) was
# not paid for by merging, such as of the parallel outputs and of the readers of files by ranges.
# Draft layers on the CPU and their rounds took 1,200 of the book, parts left out of a pull 100,
# what fit says of DSpark on a GPU 50, biases 20,
# losses of a store 50, taken from the card and from info.
MOST_LINES = {
    # formats, convert, validate, the CPU's model and its text, the reference; the target is 14,000.
    "the book": (
        22_560,
        ("formats/**", "convert/**", "validate/**", "runtime", "runtime/text", "kernels/reference"),
    ),
    # The target is 13,000; 1,900 of these lines are FP4 x FP4, 550 experts in two memories, 160
    # wheels of kernels and where they are found, 60 what drafts launch.
    "kernels": (15_900, ("kernels", "kernels/core", "kernels/device", "kernels/ops/**")),
    # The target is 31,000; `bench serve` took 60 for a bare step and the next turn, drafts 1,200,
    # the export 1,000, `dsv4 info` 270, push and pull 1,700, DSpark on a GPU 900, a fourth of it to
    # measure it, drafts in the server 400, its description 180.
    "the wheel": (61_700, ("**",)),
}
SLIVERS = {
    "dsv4.kernels.device.grid_barrier": "one protocol, beside the other barriers of the device",
}
# Circles that are left; each is closed by an import for types alone.
CIRCLES = [
    {"dsv4.kernels.ops.experts.contract", "dsv4.kernels.ops.experts.reference"},
    {"dsv4.kernels.ops.kv_cache.contract", "dsv4.kernels.ops.kv_cache.reference"},
    {f"dsv4.runtime.gpu.{name}" for name in ("engine", "model", "rehearsal", "session")},
]
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


@pytest.mark.parametrize("part", MOST_LINES)
def test_the_package_has_the_size_that_it_promises(part: str) -> None:
    most, folders = MOST_LINES[part]
    paths = {path for folder in folders for path in PACKAGE.glob(f"{folder}/*.py")}
    lines = sum(len(path.read_text().splitlines()) for path in paths)
    assert lines <= most, f"{part} has {lines} lines, at most {most} are promised"
    assert lines > 0.9 * most, f"{part} has {lines} lines: lower its number, which is {most}"


def test_no_sliver_has_a_single_importer() -> None:
    graph = import_graph(PACKAGE)
    small = set()
    for path in _modules():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        importers = [other for other, used in graph.items() if name in used]
        if len(path.read_text().splitlines()) < LEAST_FILE_LINES and len(importers) == 1:
            small.add(name)
    assert small == SLIVERS.keys(), "a module this small belongs into the one that imports it"


def test_no_modules_import_each_other() -> None:
    found = sorted(map(sorted, circles(import_graph(PACKAGE))))
    assert found == sorted(map(sorted, CIRCLES))


def test_circles_and_importers_are_found(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    for name, text in {
        "__init__": "from package import a",
        "a": "from package.b import f",
        "b": "def f():\n    import package.c",
        "c": "from package import a, d",
        "d": "import package.e",
        "e": "",
    }.items():
        (package / f"{name}.py").write_text(text)
    graph = import_graph(package)
    assert graph["package.c"] == {"package.a", "package.d"}
    assert circles(graph) == [{"package.a", "package.b", "package.c"}]


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
