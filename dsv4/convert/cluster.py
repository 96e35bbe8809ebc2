"""The same units on many machines: a dask.distributed cluster and a shared output directory.

A task is a part: one source file and the units that become ready in it. Its worker opens the
source and makes the plan by itself, writes into the shared directory, syncs, and returns what it
wrote; only the process that holds the lock keeps the journal and makes files whole. A part whose
worker dies is run again elsewhere and writes the same bytes into the same places.
Whoever may talk to the scheduler may run code on the cluster: that is dask's trust, not ours.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from dsv4.convert.memory import Budget
from dsv4.convert.outputs.base import Unit
from dsv4.convert.outputs.results import Result
from dsv4.convert.pipeline import Part, Workshop, make_parts
from dsv4.convert.plan import Plan, make_plan
from dsv4.convert.sources.base import Source
from dsv4.convert.sources.hashing_reader import Fingerprints
from dsv4.convert.sources.open import open_source
from dsv4.formats.errors import ClusterError, ConfigError, SourceError
from dsv4.formats.model.recipes import make_recipe
from dsv4.formats.store.extents import Batch, Extent
from dsv4.formats.store.manifest import FileRecord
from dsv4.formats.store.specs import FileSpec
from dsv4.formats.store.writer import StoreWriter

SECONDS_TO_CONNECT = 30


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker needs to make the same plan. src, out: the same everywhere."""

    src: str
    revision: str | None  # a commit, for a hub id
    recipe: str
    keep: tuple[str, ...]
    out: str
    fingerprint: str
    budget: Budget


@dataclasses.dataclass(frozen=True)
class Done:
    """What a worker made of a part."""

    batches: tuple[tuple[Batch, Mapping[str, Any]], ...]
    fingerprints: Fingerprints


def require_dask() -> None:
    """Raise ConfigError unless dask.distributed is installed, before anything is written."""
    if importlib.util.find_spec("distributed") is None:
        raise ConfigError("--scheduler needs dask: pip install 'dsv4[cluster]'")


def run_on_cluster(
    scheduler: str,
    job: Job,
    parts: Iterable[Part],
    writer: StoreWriter,
    fingerprints: Fingerprints,
    finished: Callable[[Unit, Result], None],
) -> None:
    """Run every part on the cluster at `scheduler`; the journal is kept here.

    Raises ClusterError when there is no cluster, no worker, or a part keeps losing its workers;
    otherwise what a part raised.
    """
    by_key = {f"dsv4-{index}-{part.file}": part for index, part in enumerate(parts)}
    seen = fingerprints.seen
    tasks = {k: Task.of(part, seen.get(part.file, ()), writer) for k, part in by_key.items()}
    with ThreadPoolExecutor(job.budget.workers) as completing:
        whole: list[Future[None]] = []
        for key, done in _results(scheduler, job, tasks):
            results: dict[str, Any] = {}
            for batch, notes in done.batches:
                results |= notes
                covered = writer.commit(batch, notes)
                whole += [completing.submit(writer.complete, file) for file in covered]
            fingerprints.merge(done.fingerprints)
            for unit in by_key[key].units:
                finished(unit, Result.from_json(results[unit.key]["result"], unit.key))
        for future in whole:
            future.result()


def _results(scheduler: str, job: Job, tasks: Mapping[str, Task]) -> Iterator[tuple[str, Done]]:
    """What the parts return, as they finish.

    A result is let go once it is here: the death of the worker that held it would have the part
    run again, into files that are whole by then.
    """
    from distributed import Client, KilledWorker, as_completed

    try:
        client = Client(scheduler, timeout=SECONDS_TO_CONNECT)
    except (OSError, TimeoutError, ValueError) as error:
        raise ClusterError(f"no dask scheduler answers at {scheduler}: {error}") from None
    with client:
        try:
            client.wait_for_workers(1, timeout=SECONDS_TO_CONNECT)
        except TimeoutError:
            raise ClusterError(f"the scheduler at {scheduler} has no workers; start some") from None
        futures = [client.submit(run_part, job, task, key=key) for key, task in tasks.items()]
        try:
            for future in as_completed(futures):
                try:
                    done = future.result()
                except KilledWorker:
                    raise ClusterError(
                        f"{tasks[future.key].file} lost its worker again and again; what is "
                        "finished is kept: look at the workers, then run the same command again"
                    ) from None
                future.release()
                yield future.key, done
        finally:
            client.cancel(futures)


@dataclasses.dataclass(frozen=True)
class Task:
    """A part as it is sent to a worker.

    keys: of the units to run. seen: what earlier runs have read of the file. durable: targets of
    these units that need not be written again, `(file key, begin, end)`.
    """

    file: str
    keys: frozenset[str]
    seen: tuple[tuple[int, str], ...]
    durable: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, part: Part, seen: Sequence[tuple[int, str]], writer: StoreWriter) -> Self:
        """The task of a part, at this state of the journal."""
        targets = [target for unit in part.units for target in unit.targets]
        durable = ((t.file.key, t.begin, t.end) for t in targets if writer.covers(*t))
        return cls(
            part.file, frozenset(unit.key for unit in part.units), tuple(seen), tuple(durable)
        )


def run_part(job: Job, task: Task) -> Done:
    """On a worker: run a task."""
    source, plan = _opened(job)
    part = next(part for part in make_parts(plan.units, source.sizes) if part.file == task.file)
    units = tuple(unit for unit in part.units if unit.key in task.keys)
    collector, fingerprints = _Collector(Path(job.out), task.durable), Fingerprints()
    fingerprints.seen[task.file] = list(task.seen)
    budget = dataclasses.replace(job.budget, streams=1)
    workshop = Workshop(source, collector, budget, fingerprints, lambda unit, result: None)
    workshop.run([dataclasses.replace(part, units=units)])
    return Done(tuple(collector.batches), fingerprints)


@functools.lru_cache(maxsize=1)
def _opened(job: Job) -> tuple[Source, Plan]:
    source = open_source(job.src, job.revision)
    if source.fingerprint() != job.fingerprint:
        raise SourceError(
            f"{job.src} is not the same on a worker as where the conversion was started; mount "
            "the same directory everywhere"
        )
    return source, make_plan(source, make_recipe(job.recipe, job.keep))


class _Collector:
    """Stands for the store's writer on a worker: notes what was made durable, keeps no journal."""

    def __init__(self, out: Path, durable: Sequence[tuple[str, int, int]]) -> None:
        self.out = out
        self._durable = durable
        self.batches: list[tuple[Batch, Mapping[str, Any]]] = []

    def commit(self, batch: Batch, notes: Mapping[str, Any]) -> list[FileSpec]:
        """To be committed by whoever keeps the journal."""
        files: dict[str, FileRecord] = dict(batch.files)
        extents: dict[FileSpec, list[Extent]] = {f: list(e) for f, e in batch.extents.items()}
        self.batches.append((Batch(files, extents), dict(notes)))
        return []

    def covers(self, file: FileSpec, begin: int, end: int) -> bool:
        """Whether an earlier run has written this already."""
        return any(k == file.key and b <= begin and end <= e for k, b, e in self._durable)

    def complete(self, file: FileSpec) -> None:
        """Nothing is covered as far as a worker can tell."""
        raise AssertionError(f"{file.key} was completed on a worker")
