"""Runs a plan: units into the store, then the metadata, then the marker."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv4.convert.cluster import Job, require_dask, run_on_cluster
from dsv4.convert.counter import Counter, Progress
from dsv4.convert.estimate import budget_for, metadata_bytes
from dsv4.convert.exactness import Tally
from dsv4.convert.keep import refuse_idle_keep
from dsv4.convert.memory import DEFAULT_MEMORY, Budget
from dsv4.convert.metadata import describe, manifest_of
from dsv4.convert.outputs.base import Losses, Unit
from dsv4.convert.outputs.results import Result
from dsv4.convert.pipeline import Part, Workshop, file_note, make_parts
from dsv4.convert.plan import Plan
from dsv4.convert.resume import identity_of, refusal
from dsv4.convert.sources.base import Source
from dsv4.convert.sources.hashing_reader import Fingerprints, entries_of
from dsv4.convert.sources.open import open_source
from dsv4.convert.travelling import make_whole_plan
from dsv4.formats.errors import ChangedSourceError, ConfigError, OtherConversionError
from dsv4.formats.model.recipes import DEFAULT_RECIPE, make_recipe
from dsv4.formats.store.extents import Sink
from dsv4.formats.store.specs import FileSpec
from dsv4.formats.store.writer import StoreWriter

WORTH_MEASURING = 1 << 30  # of a smaller source the copy rate is not worth the time it takes


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a finished conversion reports; tally: what became of every tensor, as measured.

    accepted: whether tensors that were to be carried and could not be were accepted as rounded.
    """

    out: Path
    root: str
    plan: Plan
    resumed_units: int
    losses: Losses  # rounded tensors only
    tally: Tally
    accepted: bool

    @property
    def found(self) -> tuple[str, ...]:
        """Sentences on tensors that were not carried as they should be, and on weights of zeros."""
        return self.tally.notices(accepted=self.accepted)

    @property
    def notices(self) -> tuple[str, ...]:
        """What is left out, ignored, or not as it should be: whole sentences."""
        return (*self.plan.notices, *self.found)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "out": str(self.out),
            "root": self.root,
            "resumed_units": self.resumed_units,
            "losses": self.losses,
            **self.plan.to_dict(),
            **self.tally.to_dict(),
            "accepted_rounding": self.accepted,
            "notices": list(self.notices),
        }


def convert(
    src: str | Path,
    out: str | Path,
    recipe: str = DEFAULT_RECIPE,
    workers: int | None = None,
    progress: Progress | None = None,
    *,
    keep: str | Sequence[str] = (),
    revision: str | None = None,
    memory: int = DEFAULT_MEMORY,
    scheduler: str | None = None,
    accept_rounding: bool = False,
    notice: Callable[[str], object] | None = None,
    on_wait: Callable[[str], None] | None = None,
) -> Summary:
    """Convert the checkpoint `src` into the packed store `out`, within `memory` bytes of RAM.

    keep: globs of tensors to leave as they are in the source, or one glob.
    scheduler: address of a dask.distributed cluster whose workers see the same paths.
    accept_rounding: tensors that are to be carried exactly, and of which NVFP4 cannot hold every
    block, may be rounded. It changes no byte of an array, so a conversion may be continued with it
    that was begun without; the store records it where there is such a tensor.
    notice: gets each sentence of the plan's notices, before any weight is read, and at the end
    what was found in them. on_wait: told, in a sentence, when the network is waited for.
    Resumes when `out` holds an unfinished conversion of the same source, recipe and tool.
    Raises SourceError, NetworkError, ConfigError, ConflictError, OutOfSpaceError, or, with recipe
    native and without accept_rounding, ExactnessError, each naming what to do.
    """
    if scheduler is not None:
        require_dask()
    source = open_source(src, revision, on_wait=on_wait)
    plan = make_whole_plan(source, make_recipe(recipe, keep), notice)
    refuse_idle_keep(plan)
    budget = budget_for(plan, source, memory, workers)
    out = _checked_out(src, out)
    with _writer(src, out, identity_of(source, plan.recipe)) as writer:
        _recover(plan, writer)
        finished = _finished(plan, writer)
        writer.require_space(_missing_bytes(plan, writer))
        rate = None
        if progress is not None and plan.source_bytes >= WORTH_MEASURING:
            rate = writer.measure_rate()
        strict = plan.recipe.exact and not accept_rounding
        counter = Counter(plan, finished, progress, rate, strict=strict)
        work = _Work(plan, finished, source, writer, counter)
        if scheduler is None:
            sha256 = work.run_here(budget)
        else:
            place = str(src) if source.commit else str(Path(src).resolve())
            where, mark = str(out.resolve()), source.fingerprint()
            job = Job(place, source.commit, recipe, plan.recipe.keep, where, mark, budget)
            sha256 = work.run_on_cluster(scheduler, job)
        summary = _finish(plan, source, writer, sha256, len(finished), accept_rounding)
    if notice is not None:
        for sentence in summary.found:
            notice(sentence)
    return summary


def _finish(
    plan: Plan,
    source: Source,
    writer: StoreWriter,
    sha256: Mapping[str, str],
    resumed: int,
    accept_rounding: bool,
) -> Summary:
    """The small arrays, the metadata, then the marker: all from what the units measured."""
    results = _results(plan.units, writer)
    _complete(plan, results, source, writer)
    tally = Tally.of(plan, results)
    accepted = accept_rounding and bool(tally.inexact)
    groups, arrays, losses = describe(plan, results)
    manifest = manifest_of(plan, source.description(sha256), source.origin, accepted=accepted)
    root = writer.finish(groups, arrays, manifest)
    return Summary(writer.out, root, plan, resumed, losses, tally, accepted)


def _writer(src: str | Path, out: Path, identity: dict[str, Any]) -> StoreWriter:
    """The writer of `out`. Raises ConflictError when another conversion is unfinished there."""
    try:
        return StoreWriter(out, identity)
    except OtherConversionError as error:
        raise refusal(error, src, out) from None


def _checked_out(src: str | Path, out: str | Path) -> Path:
    """Where to write. Source and output must be disjoint: neither may lie inside the other."""
    if not os.fspath(out):
        raise ConfigError("--out is empty; give the directory to write into")
    if Path(src).is_dir():
        a, b = Path(src).resolve(), Path(out).resolve()
        if a == b or a in b.parents or b in a.parents:
            raise ConfigError(f"--out {out} and the source {src} overlap; choose another directory")
    return Path(out)


def _recover(plan: Plan, writer: StoreWriter) -> None:
    """Files that an interrupted run covered but did not complete."""
    for file in writer.covered_files(plan.files()):
        writer.complete(file)


def _finished(plan: Plan, writer: StoreWriter) -> dict[str, Result]:
    """What the units measured that an earlier run finished durably, by key."""
    notes = writer.notes()
    return _results(
        [
            unit
            for unit in plan.units
            if unit.key in notes and all(writer.covers(*target) for target in unit.targets)
        ],
        writer,
    )


def _results(units: Sequence[Unit], writer: StoreWriter) -> dict[str, Result]:
    """What the journal says that the units measured."""
    notes = writer.notes()
    return {unit.key: Result.from_json(notes[unit.key]["result"], unit.key) for unit in units}


def _missing_bytes(plan: Plan, writer: StoreWriter) -> int:
    """Bytes that still have to be allocated on disk."""
    missing = sum(file.nbytes - writer.allocated(file) for file in plan.files())
    return missing + metadata_bytes(plan)


class _Work:
    """What is not finished, to be run here or on a cluster; -> SHA-256 of every source file."""

    def __init__(
        self,
        plan: Plan,
        finished: Mapping[str, Result],
        source: Source,
        writer: StoreWriter,
        counter: Counter,
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


def _complete(plan: Plan, results: dict[str, Result], source: Source, writer: StoreWriter) -> None:
    """The small files that need every unit's result, and what travels along."""
    with Sink(writer.out) as sink:
        for output in plan.outputs:
            output.complete([results[unit.key] for unit in output.units()], sink)
        writer.commit(sink.sync())
    for name, data in source.aux_files().items():
        writer.write_asset(name, data)
