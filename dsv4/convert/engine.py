"""Runs a plan: units in order into the store, then the metadata, then the marker."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dsv4.convert.local_source import LocalSource
from dsv4.convert.outputs import TILE_BYTES, Losses, Output, Result, Unit
from dsv4.convert.plain import PlainOutput
from dsv4.convert.plan import Plan, make_plan
from dsv4.convert.recipes import DEFAULT_RECIPE, make_recipe
from dsv4.convert.source import Source
from dsv4.formats.errors import ConfigError, SourceError
from dsv4.formats.layouts import LAYOUTS
from dsv4.formats.store.schema import ArraySpec
from dsv4.formats.store.writer import StoreWriter
from dsv4.formats.version import TOOL

Progress = Callable[["Event"], None]


@dataclasses.dataclass(frozen=True)
class Event:
    """One finished unit: its key, and source bytes done of all."""

    unit: str
    done_bytes: int
    total_bytes: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a finished conversion reports."""

    out: Path
    root: str
    plan: Plan
    resumed_units: int
    losses: Losses  # rounded tensors only


def open_source(src: str | Path, revision: str | None = None) -> Source:
    """A local directory. Raises SourceError; hub ids are refused by name in this version."""
    path = Path(src)
    if path.is_dir():
        if revision is not None:
            raise SourceError(f"--revision {revision} has no meaning for the directory {path}")
        return LocalSource(path)
    raise SourceError(
        f"{src} is not a directory; this version reads local checkpoints only, so download the "
        f"repository first and give its directory"
    )


def convert(
    src: str | Path,
    out: str | Path,
    recipe: str = DEFAULT_RECIPE,
    workers: int | None = None,
    progress: Progress | None = None,
    *,
    keep: Sequence[str] = (),
    revision: str | None = None,
) -> Summary:
    """Convert the checkpoint `src` into the packed store `out`.

    Resumes when `out` holds an unfinished conversion of the same source, recipe and tool.
    Raises SourceError, ConfigError, ConflictError or OutOfSpaceError, each naming what to do.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers}, expected at least 1")
    source = open_source(src, revision)
    plan = make_plan(source, make_recipe(recipe, keep))
    out = Path(out)
    _refuse_overlap(Path(src), out)
    identity = {
        "tool": TOOL,
        "recipe": plan.recipe.to_dict(),
        "source": source.fingerprint(),
    }
    with StoreWriter(out, identity) as writer:
        finished = _finished(plan, writer)
        remaining = [unit for unit in plan.units() if unit.key not in finished]
        writer.require_space(sum(file.nbytes for file in plan.files() if not writer.has(file)))
        results = finished | _run(remaining, source, writer, workers or 1, progress, plan)
        for output in plan.outputs:
            output.complete([results[unit.key] for unit in output.units()], writer.write)
        for name, data in source.aux_files().items():
            writer.write_asset(name, data)
        groups, arrays, losses = _metadata(plan, results)
        root = writer.finish(groups, arrays, _manifest(plan, source))
    return Summary(out, root, plan, len(finished), losses)


def _refuse_overlap(src: Path, out: Path) -> None:
    """Source and output must be disjoint: neither may lie inside the other."""
    a, b = src.resolve(), out.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise ConfigError(f"--out {out} and the source {src} overlap; choose another directory")


def _finished(plan: Plan, writer: StoreWriter) -> dict[str, Result]:
    """Results of the units that an earlier run finished durably."""
    notes = writer.notes()
    return {
        unit.key: notes[unit.key]
        for unit in plan.units()
        if unit.key in notes and all(writer.has(file) for file in unit.files)
    }


def _run(
    units: Iterable[Unit],
    source: Source,
    writer: StoreWriter,
    workers: int,
    progress: Progress | None,
    plan: Plan,
) -> dict[str, Result]:
    """Run the units on `workers` threads; the first failure stops the rest."""
    units = list(units)
    total = plan.source_bytes
    done = total - sum(unit.input_bytes for unit in units)
    results: dict[str, Result] = {}

    def work(unit: Unit) -> Result:
        result = unit.run(source, writer.write)
        writer.note(unit.key, result)
        return result

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        pending = {pool.submit(work, unit): unit for unit in units}
        try:
            for future in concurrent.futures.as_completed(pending):
                unit = pending[future]
                results[unit.key] = future.result()
                done += unit.input_bytes
                if progress is not None:
                    progress(Event(unit.key, done, total))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return results


def _metadata(
    plan: Plan, results: dict[str, Result]
) -> tuple[dict[str, dict[str, Any]], list[ArraySpec], Losses]:
    """-> (group attributes by path, arrays, losses of the rounded tensors)."""
    files = {name: index for index, name in enumerate(plan.source_files)}
    groups: dict[str, dict[str, Any]] = {}
    arrays: list[ArraySpec] = []
    losses: Losses = {}
    for output in plan.outputs:
        measured = [results[unit.key] for unit in output.units()]
        attributes = {"dsv4": output.attributes(measured, files)}
        if isinstance(output, PlainOutput):
            arrays += _with_attributes(output, attributes)
        else:
            groups[output.path] = attributes
            arrays += output.arrays()
        losses |= output.losses(measured)
    return groups, arrays, losses


def _with_attributes(output: Output, attributes: dict[str, Any]) -> list[ArraySpec]:
    return [dataclasses.replace(array, attributes=attributes) for array in output.arrays()]


def _manifest(plan: Plan, source: Source) -> dict[str, Any]:
    return {
        "tool": TOOL,
        "layouts": {layout.id: dict(layout.parameters) for layout in LAYOUTS.values()},
        "config": plan.config.to_dict(),
        "recipe": plan.recipe.to_dict(),
        "source": source.description({file: _sha256(source, file) for file in source.sizes}),
    }


def _sha256(source: Source, file: str) -> str:
    digest = hashlib.sha256()
    left = source.sizes[file]
    buffer = bytearray(min(left, TILE_BYTES))
    with source.stream(file) as stream:
        while left:
            view = memoryview(buffer)[:left]
            stream.readinto(view)
            digest.update(view)
            left -= len(view)
    return digest.hexdigest()
