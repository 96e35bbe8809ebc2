"""Runs the checks and gathers the verdict."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from pathlib import Path

from dsv4.convert.sources.base import Source
from dsv4.convert.sources.open import open_source
from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.errors import NoStoreError, StoreError
from dsv4.formats.store.reader import PackedStore, collector_paused
from dsv4.validate.checks.content import Checksums, check_content, default_workers
from dsv4.validate.checks.exactness import judge_admissions, read_admissions
from dsv4.validate.checks.inversion import invert, is_another
from dsv4.validate.checks.rounding import Optimum
from dsv4.validate.checks.structure import check_metadata
from dsv4.validate.made_from import cheap_difference
from dsv4.validate.report import Report
from dsv4.validate.watch import Progress, Watch, WatchedSource


def validate(
    packed: str | Path | PackedCheckpoint,
    source: str | Path | None = None,
    *,
    quick: bool = False,
    workers: int | None = None,
    checksums: Checksums = "blake3",
    optimum: Optimum = "sample",
    progress: Progress | None = None,
    on_wait: Callable[[str], None] | None = None,
) -> Report:
    """Check a packed store; with `source`, invert every transform and compare tensor by tensor.

    `quick` reads metadata and file sizes only. workers: cores to use, by default all.
    checksums: "xxh3" leaves out BLAKE3; what then holds is proof against accidents, not against
    forgery. optimum: whether large rounded tensors are rounded again in full or in part.
    progress: called from several threads, with what is read and how much of it has been.
    on_wait: told, in a sentence, when the network is waited for.
    Findings are reported, not raised; NoStoreError is raised where there is no store at all,
    SourceError and ConfigError when `source` itself cannot be read.
    """
    begin, now = time.perf_counter(), datetime.datetime.now(datetime.UTC)
    path = packed if isinstance(packed, str | Path) else packed.store.root
    report = Report(Path(path), quick=quick, source=None if source is None else str(source))
    report.begun = now.isoformat(timespec="seconds")
    opened_source = None if source is None else open_source(source, on_wait=on_wait)
    try:
        checkpoint = PackedCheckpoint.open(path) if isinstance(packed, str | Path) else packed
    except NoStoreError:
        raise
    except StoreError as error:
        report.add("open", str(path), str(error))
        report.seconds = time.perf_counter() - begin
        return report
    report.count("store opened")
    with collector_paused():
        check_metadata(checkpoint, report)
        read_admissions(checkpoint.store, report)
    files = checkpoint.store.files_under(None)
    report.nbytes = sum(file.nbytes for file in files)
    workers, watch = workers or default_workers(), Watch(progress)
    if opened_source is not None and not report.findings:
        _refuse_another(checkpoint, opened_source, report)
    if report.wrong_source:
        report.seconds = time.perf_counter() - begin
        return report
    if not quick:
        watch.expect(sum(file.payload_nbytes for file in files))
    if opened_source is not None:
        watch.expect(_bytes_to_compare(opened_source))
    with watch.stopping():
        if not quick:
            check_content(checkpoint, report, workers=workers, checksums=checksums, watch=watch)
        if opened_source is not None and not report.findings:
            # Comparing with the source is stronger than any checksum, so none is computed twice.
            unverified, watched = _unverified(checkpoint), WatchedSource(opened_source, watch)
            invert(unverified, watched, report, workers=workers, optimum=optimum, watch=watch)
    judge_admissions(report)
    report.seconds = time.perf_counter() - begin
    return report


def _refuse_another(packed: PackedCheckpoint, source: Source, report: Report) -> None:
    """One finding, before hours of work, when the source is visibly another checkpoint."""
    different = cheap_difference(packed.store, source)
    if different is None or not is_another(_unverified(packed), source):
        return
    file, fault = different
    message = f"this is not what the store was made from: {fault}; nothing else was compared"
    report.add("source", file, message)
    report.wrong_source = True


def _unverified(packed: PackedCheckpoint) -> PackedCheckpoint:
    return PackedCheckpoint(PackedStore.open(packed.store.root, verify=False))


def _bytes_to_compare(source: Source) -> int:
    """Every tensor once, and once more the files whose hashes nobody published."""
    hashed = (n for name, n in source.sizes.items() if source.published_sha256(name) is None)
    return sum(entry.nbytes for entry in source.entries.values()) + sum(hashed)
