"""Who imports whom among the package's modules, read from their source."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path


def import_graph(package: Path) -> dict[str, set[str]]:
    """The modules that each module of `package` imports, wherever the import stands."""
    paths = {_name(path, package): path for path in package.rglob("*.py")}
    return {name: set(_imported(path, paths)) - {name} for name, path in paths.items()}


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(path: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module in modules:
            below = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in below if name in modules)
            if not all(name in modules for name in below):
                yield node.module


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Sets of modules that import each other, directly or through others (Tarjan)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(module: str) -> None:
        index[module] = lowest[module] = len(index)
        stack.append(module)
        for other in graph[module]:
            if other not in index:
                visit(other)
            if other in stack:
                lowest[module] = min(lowest[module], lowest[other])
        if lowest[module] == index[module]:
            one = set(stack[stack.index(module) :])
            del stack[stack.index(module) :]
            if len(one) > 1:
                found.append(one)

    for module in graph:
        if module not in index:
            visit(module)
    return found
