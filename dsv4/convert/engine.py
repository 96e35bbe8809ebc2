"""Runs a plan: units into the store, then the metadata, then the marker."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsv4.convert.budget import DEFAULT_MEMORY, Budget
from dsv4.convert.cluster import Job, require_dask, run_on_cluster
from dsv4.convert.describe import describe, manifest_of
from dsv4.convert.file_pass import Fingerprints, entries_of
from dsv4.convert.forecast import budget_for, metadata_bytes
from dsv4.convert.open_source import open_source
from dsv4.convert.outputs import Losses, Result, Unit
from dsv4.convert.plan import Plan
from dsv4.convert.recipes import DEFAULT_RECIPE, make_recipe
from dsv4.convert.resume import identity_of, refusal
from dsv4.convert.source import Source
from dsv4.convert.travelling import make_whole_plan
from dsv4.convert.workshop import Part, Workshop, file_note, make_parts
from dsv4.formats.errors import ChangedSourceError, ConfigError, OtherConversionError
from dsv4.formats.store.extents import Sink
from dsv4.formats.store.schema import FileSpec
from dsv4.formats.store.writer import StoreWriter

Progress = Callable[["Event"], None]

WORTH_MEASURING = 1 << 30  # of a smaller source the copy rate is not worth the time it takes


@dataclasses.dataclass(frozen=True)
class Event:
    """One finished unit, and how much of the source's bytes and tensors is done."""

    unit: str
    done_bytes: int
    total_bytes: int
    done_tensors: int
    total_tensors: int
    resumed_bytes: int  # of done_bytes, what an earlier run did
    copy_rate: float | None  # bytes a second this machine writes there; None when not measured


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a finished conversion reports."""

    out: Path
    root: str
    plan: Plan
    resumed_units: int
    losses: Losses  # rounded tensors only

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "out": str(self.out),
            "root": self.root,
            "resumed_units": self.resumed_units,
            "losses": self.losses,
            **self.plan.to_dict(),
        }


def convert(
    src: str | Path,
    out: str | Path,
    recipe: str = DEFAULT_RECIPE,
    workers: int | None = None,
    progress: Progress | None = None,
    *,
    keep: Sequence[str] = (),
    revision: str | None = None,
    memory: int = DEFAULT_MEMORY,
    scheduler: str | None = None,
    notice: Callable[[str], object] | None = None,
    on_wait: Callable[[str], None] | None = None,
) -> Summary:
    """Convert the checkpoint `src` into the packed store `out`, within `memory` bytes of RAM.

    scheduler: address of a dask.distributed cluster whose workers see the same paths.
    notice: gets each sentence of the plan's notices, before any weight is read.
    on_wait: told, in a sentence, when the network is waited for.
    Resumes when `out` holds an unfinished conversion of the same source, recipe and tool.
    Raises SourceError, NetworkError, ConfigError, ConflictError or OutOfSpaceError, each naming
    what to do.
    """
    if scheduler is not None:
        require_dask()
    source = open_source(src, revision, on_wait=on_wait)
    plan = make_whole_plan(source, make_recipe(recipe, keep), notice)
    budget = budget_for(plan, source, memory, workers)
    if not os.fspath(out):
        raise ConfigError("--out is empty; give the directory to write into")
    out = Path(out)
    if Path(src).is_dir():
        _refuse_overlap(Path(src), out)
    with _writer(src, out, identity_of(source, plan.recipe)) as writer:
        _recover(plan, writer)
        finished = _finished(plan, writer)
        writer.require_space(_missing_bytes(plan, writer))
        rate = None
        if progress is not None and plan.source_bytes >= WORTH_MEASURING:
            rate = writer.measure_rate()
        counter = _Counter(plan, finished, progress, rate)
        work = _Work(plan, finished, source, writer, counter)
        if scheduler is None:
            sha256 = work.run_here(budget)
        else:
            place = str(src) if source.commit else str(Path(src).resolve())
            job = Job(
                place,
                source.commit,
                recipe,
                tuple(keep),
                str(out.resolve()),
                source.fingerprint(),
                budget,
            )
            sha256 = work.run_on_cluster(scheduler, job)
        notes = writer.notes()
        results = {unit.key: notes[unit.key]["result"] for unit in plan.units}
        _complete(plan, results, source, writer)
        groups, arrays, losses = describe(plan, results)
        manifest = manifest_of(plan, source.description(sha256), source.origin)
        root = writer.finish(groups, arrays, manifest)
    return Summary(out, root, plan, len(finished), losses)


def _writer(src: str | Path, out: Path, identity: dict[str, Any]) -> StoreWriter:
    """The writer of `out`. Raises ConflictError when another conversion is unfinished there."""
    try:
        return StoreWriter(out, identity)
    except OtherConversionError as error:
        raise refusal(error, src, out) from None


def _refuse_overlap(src: Path, out: Path) -> None:
    """Source and output must be disjoint: neither may lie inside the other."""
    a, b = src.resolve(), out.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise ConfigError(f"--out {out} and the source {src} overlap; choose another directory")


def _recover(plan: Plan, writer: StoreWriter) -> None:
    """Files that an interrupted run covered but did not complete."""
    for file in writer.covered_files(plan.files()):
        writer.complete(file)


def _finished(plan: Plan, writer: StoreWriter) -> set[str]:
    """Keys of the units that an earlier run finished durably."""
    notes = writer.notes()
    return {
        unit.key
        for unit in plan.units
        if unit.key in notes and all(writer.covers(*target) for target in unit.targets)
    }


def _missing_bytes(plan: Plan, writer: StoreWriter) -> int:
    """Bytes that still have to be allocated on disk."""
    missing = sum(file.nbytes - writer.allocated(file) for file in plan.files())
    return missing + metadata_bytes(plan)


class _Work:
    """What is not finished, to be run here or on a cluster; -> SHA-256 of every source file."""

    def __init__(
        self,
        plan: Plan,
        finished: set[str],
        source: Source,
        writer: StoreWriter,
        counter: _Counter,
    ) -> None:
        self._plan = plan
        self._source = source
        self._writer = writer
        self._counter = counter
        self._fingerprints = Fingerprints()
        notes = writer.notes()
        for unit in plan.units:
            if unit.key in finished:
                self._fingerprints.remember(unit, notes[unit.key]["read"])
        self._parts: list[Part] = []
        for part in make_parts(plan.units, source.sizes):
            left = tuple(unit for unit in part.units if unit.key not in finished)
            note = notes.get(file_note(part.file))
            if left or not note:
                self._parts.append(dataclasses.replace(part, units=left))
            elif part.watched:
                known = {(begin, end): passed for begin, end, passed in note["watched"]}
                for entry in part.watched:
                    self._fingerprints.passed[entry] = known[entry.begin, entry.end]

    def run_here(self, budget: Budget) -> dict[str, str]:
        """On threads of this process."""
        workshop = Workshop(
            self._source, self._writer, budget, self._fingerprints, self._counter.add
        )
        return self._checked(lambda: workshop.run(self._parts))

    def run_on_cluster(self, scheduler: str, job: Job) -> dict[str, str]:
        """On the workers of a dask.distributed cluster."""
        add, known = self._counter.add, self._fingerprints
        return self._checked(
            lambda: run_on_cluster(scheduler, job, self._parts, self._writer, known, add)
        )

    def _checked(self, run: Callable[[], None]) -> dict[str, str]:
        """Drop what was made from a file that proved to be another one than it should be."""
        try:
            run()
            self._fingerprints.check()
        except ChangedSourceError as error:
            self._writer.forget(_made_from(self._plan, error.file), [file_note(error.file)])
            raise
        notes = self._writer.notes()
        return {file: notes[file_note(file)]["sha256"] for file in self._source.sizes}


def _made_from(plan: Plan, file: str) -> set[FileSpec]:
    """Files of the output that hold anything made from a file of the source."""
    return {
        target.file
        for unit in plan.units
        if any(entry.file == file for entry in entries_of(unit))
        for target in unit.targets
    }


class _Counter:
    """Counts finished units, in bytes and tensors."""

    def __init__(
        self, plan: Plan, finished: set[str], progress: Progress | None, rate: float | None
    ) -> None:
        done = [unit for unit in plan.units if unit.key in finished]
        self._lock = threading.Lock()
        self._progress = progress
        self._rate = rate
        self._total = plan.source_bytes, sum(len(unit.inputs) for unit in plan.units)
        self._bytes = self._resumed = sum(unit.input_bytes for unit in done)
        self._tensors = sum(len(unit.inputs) for unit in done)

    def add(self, unit: Unit) -> None:
        """One more unit is finished."""
        with self._lock:
            self._bytes += unit.input_bytes
            self._tensors += len(unit.inputs)
            if self._progress is not None:
                total_bytes, total_tensors = self._total
                self._progress(
                    Event(
                        unit.key,
                        self._bytes,
                        total_bytes,
                        self._tensors,
                        total_tensors,
                        self._resumed,
                        self._rate,
                    )
                )


def _complete(plan: Plan, results: dict[str, Result], source: Source, writer: StoreWriter) -> None:
    """The small files that need every unit's result, and what travels along."""
    with Sink(writer.out) as sink:
        for output in plan.outputs:
            output.complete([results[unit.key] for unit in output.units()], sink)
        writer.commit(sink.sync())
    for name, data in source.aux_files().items():
        writer.write_asset(name, data)
