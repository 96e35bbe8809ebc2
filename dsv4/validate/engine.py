"""Runs the checks and gathers the verdict."""

from __future__ import annotations

import time
from pathlib import Path

from dsv4.convert.open_source import open_source
from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.errors import StoreError
from dsv4.formats.store.reader import PackedStore, collector_paused
from dsv4.validate.content import Checksums, check_content, default_workers
from dsv4.validate.exactness import judge_admissions, read_admissions
from dsv4.validate.inversion import invert
from dsv4.validate.report import Report
from dsv4.validate.rounding import Optimum
from dsv4.validate.structure import check_metadata


def validate(
    packed: str | Path | PackedCheckpoint,
    source: str | Path | None = None,
    *,
    quick: bool = False,
    workers: int | None = None,
    checksums: Checksums = "blake3",
    optimum: Optimum = "sample",
) -> Report:
    """Check a packed store; with `source`, invert every transform and compare tensor by tensor.

    `quick` reads metadata and file sizes only. workers: cores to use, by default all.
    checksums: "xxh3" leaves out BLAKE3; what then holds is proof against accidents, not against
    forgery. optimum: whether large rounded tensors are rounded again in full or in part.
    Findings are reported, not raised; SourceError and ConfigError are raised when `source` itself
    cannot be read.
    """
    begin = time.perf_counter()
    path = packed if isinstance(packed, str | Path) else packed.store.root
    report = Report(Path(path), quick=quick, source=None if source is None else str(source))
    opened_source = None if source is None else open_source(source)
    try:
        checkpoint = PackedCheckpoint.open(path) if isinstance(packed, str | Path) else packed
    except StoreError as error:
        report.add("open", str(path), str(error))
        report.seconds = time.perf_counter() - begin
        return report
    report.count("store opened")
    with collector_paused():
        check_metadata(checkpoint, report)
        read_admissions(checkpoint.store, report)
    workers = workers or default_workers()
    if not quick:
        check_content(checkpoint, report, workers=workers, checksums=checksums)
    if opened_source is not None and not report.findings:
        # Comparing with the source is stronger than any checksum, so none is computed twice.
        unverified = PackedCheckpoint(PackedStore.open(checkpoint.store.root, verify=False))
        invert(unverified, opened_source, report, workers=workers, optimum=optimum)
    judge_admissions(report)
    report.seconds = time.perf_counter() - begin
    return report
