"""Every byte of a store, each file read once: checksums, and values no correct packer writes.

Threads take whole files, several a core, so that the disk never waits for a hash. Each reads into a
buffer that stays in its core's cache, and hashes and judges it there; nothing is mapped. BLAKE3 is
what the Merkle root commits to; XXH3 alone is cheaper and proves nothing to someone who fears
forgery.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, TypeVar

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from torch import Tensor

from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.errors import StoreError
from dsv4.formats.store import digest
from dsv4.formats.store.damage import symbolic_link
from dsv4.formats.store.file_digest import ChunkDigests
from dsv4.formats.store.reader import PackedStore
from dsv4.formats.store.specs import FileSpec
from dsv4.validate.checks.coherence import check_counts, check_padding
from dsv4.validate.checks.value_ranges import NO_JUDGE, Judge, judges
from dsv4.validate.provenance import add_scales, quantized_groups, said_exact
from dsv4.validate.report import Report
from dsv4.validate.watch import Watch

Checksums = Literal["blake3", "xxh3"]
"""What a full pass compares: both kinds of checksum, or XXH3 alone."""

PIECE_BYTES = 1 << 20
THREADS_A_CORE = 4  # some wait for the disk while others hash
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_Item = TypeVar("_Item")
_Done = TypeVar("_Done")


@dataclasses.dataclass
class Scan:
    """What one file holds. broken: rules that do not hold; tally: count of each byte, int64."""

    problems: list[tuple[int | None, str]] = dataclasses.field(default_factory=list)
    forged: bool = False
    broken: set[str] = dataclasses.field(default_factory=set)
    tally: Tensor | None = None
    nbytes: int = 0


def default_workers() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def in_parallel(
    work: Callable[[_Item], _Done], items: Sequence[_Item], workers: int, watch: Watch
) -> Iterator[_Done]:
    """`map` over threads, in order; when the caller stops, what has begun is made to end."""
    pool = ThreadPoolExecutor(workers)
    try:
        with watch.stopping():
            yield from pool.map(work, items)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def check_content(
    packed: PackedCheckpoint,
    report: Report,
    *,
    workers: int,
    checksums: Checksums = "blake3",
    watch: Watch | None = None,
) -> None:
    """Read all files, on `workers` cores; findings go into `report`, what was read to `watch`."""
    store = packed.store
    files = store.files_under(None)
    judged = judges(packed)
    threads = workers * THREADS_A_CORE
    proof = checksums == "blake3"
    scans = scan_files(store, files, judged, workers=threads, proof=proof, watch=watch or Watch())
    damaged = False
    broken: dict[tuple[str, str], None] = {}
    for file, scan in zip(files, scans, strict=True):
        report.bytes_read += scan.nbytes
        for chunk, problem in scan.problems[:1]:
            where = file.key if chunk is None else f"{file.key}, chunk {chunk}"
            report.add("checksums", where, problem)
            damaged = True
        if scan.forged:
            report.add("hashes", file.key, "its BLAKE3 is not the manifest's")
            damaged = True
        if not scan.problems:
            owner = judged.get(file.key, NO_JUDGE).owner
            broken |= dict.fromkeys((owner, what) for what in sorted(scan.broken))
    for where, what in broken:
        report.add("values", where, what)
    report.checksums = checksums
    report.count("chunk checksums", sum(file.chunks for file in files))
    if checksums == "blake3":
        report.count("file hashes", len(files))
    rules = {(judge.owner, rule) for judge in judged.values() for rule in judge.rules}
    report.count("value ranges", len(rules))
    report.damaged |= damaged
    if not damaged:
        report.said_exact = said_exact(store)
        tallies = {f.key: s.tally for f, s in zip(files, scans, strict=True) if s.tally is not None}
        for group in quantized_groups(store):
            if group.format == "nvfp4":
                add_scales(store, group, tallies, report)
            check_padding(store, group, report)
            if group.experts and f"{group.path}/lineage" in store.hierarchy.arrays:
                check_counts(store, group, report)


def scan_files(
    store: PackedStore,
    files: Sequence[FileSpec],
    judged: Mapping[str, Judge],
    *,
    workers: int,
    proof: bool,
    watch: Watch,
) -> list[Scan]:
    """Read each file once; -> one Scan per file, in their order. Large files are begun first."""
    real: set[str] = set()
    links = {d: symbolic_link(store.root, d, real) for d in map(_directory, files)}

    def scan(number: int) -> Scan:
        file = files[number]
        found = Scan()
        if link := links[_directory(file)]:
            found.problems.append((None, f"{link} is a symbolic link, expected a directory"))
            return found
        try:
            _scan(store, file, judged.get(file.key, NO_JUDGE), found, watch, proof=proof)
        except (OSError, StoreError) as error:
            found.problems.append((None, f"it cannot be read: {error}"))
        return found

    order = sorted(range(len(files)), key=lambda number: -files[number].nbytes)
    done = dict(zip(order, in_parallel(scan, order, workers, watch), strict=True))
    return [done[number] for number in range(len(files))]


def _scan(
    store: PackedStore, file: FileSpec, judge: Judge, found: Scan, watch: Watch, *, proof: bool
) -> None:
    chunks, whole = ChunkDigests(file.chunk_nbytes), blake3()
    descriptor = os.open(store.root / file.key, _OPEN)
    try:
        if os.fstat(descriptor).st_size != file.nbytes:
            raise StoreError("it changed since the store was opened")
        for piece in _pieces(descriptor, file.payload_nbytes):
            chunks.payload(piece.data)
            if proof:
                whole.update(piece.data)
            found.broken |= judge.broken_by(piece)
            if judge.tally:
                counts = torch.bincount(torch.from_numpy(piece), minlength=256)
                found.tally = counts if found.tally is None else found.tally + counts
            found.nbytes += len(piece)
            watch.read("checksums", len(piece))
        index = os.pread(descriptor, file.index_nbytes, file.payload_nbytes)
    finally:
        os.close(descriptor)
    whole.update(index)
    found.nbytes += len(index)
    measured = digest.decode_digests(chunks.finish(), file.chunks)
    wrong = np.flatnonzero(measured != store.chunk_digests(file.key))
    found.problems += [(int(n), "the bytes do not match the checksum") for n in wrong]
    if file.sharded and index != digest.dense_index(file.chunks, file.chunk_nbytes):
        found.problems.append((None, "the sharding index behind the chunks is altered"))
    if proof and not found.problems:
        found.forged = whole.hexdigest() != store.records[file.key].blake3


def _pieces(descriptor: int, nbytes: int) -> Iterator[NDArray[np.uint8]]:
    """The first `nbytes` of a file, in one buffer again and again; all but the last are full."""
    buffer = np.empty(min(PIECE_BYTES, nbytes), np.uint8)
    for position in range(0, nbytes, PIECE_BYTES):
        piece = buffer[: min(PIECE_BYTES, nbytes - position)]
        filled = 0
        while filled < len(piece):
            count = os.preadv(descriptor, [piece[filled:].data], position + filled)
            if not count:
                raise StoreError("it is shorter than when the store was opened")
            filled += count
        yield piece


def _directory(file: FileSpec) -> str:
    return file.key.rpartition("/")[0]
