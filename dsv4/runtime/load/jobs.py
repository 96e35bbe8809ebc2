"""The plan cut into what one reader does at a time.

A job is a run of the arena that fits into a slot: whole chunks of one file, or many small files
that lie side by side. A chunk larger than a slot is a job by itself, which passes through several
slots in order, because its checksum is taken from its first byte to its last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from dsv4.runtime.load.plan import Span


@dataclasses.dataclass(frozen=True)
class Job:
    """Spans that follow each other in the arena, from byte `at` to `end`."""

    spans: tuple[Span, ...]

    @property
    def at(self) -> int:
        """Its first byte in the arena."""
        return self.spans[0].at

    @property
    def nbytes(self) -> int:
        """Bytes of the arena it fills, gaps between files included."""
        last = self.spans[-1]
        return last.at + last.nbytes - self.at


def make_jobs(spans: Iterable[Span], slot_nbytes: int) -> list[Job]:
    """Cut `spans`, which are in the order of the arena, the largest chunks' jobs first."""
    jobs = list(_cut(spans, slot_nbytes))
    # A reader is busy with a large chunk for long: begun last, it would keep the others waiting.
    jobs.sort(key=lambda job: job.nbytes <= slot_nbytes)
    return jobs


def _cut(spans: Iterable[Span], slot_nbytes: int) -> Iterator[Job]:
    run: list[Span] = []
    for span in spans:
        file, begin, at = span.file, span.begin, span.at
        while begin < span.end:
            used = at - run[0].at if run else 0
            chunks = (slot_nbytes - used) // file.chunk_nbytes
            if chunks <= 0 and run:
                yield Job(tuple(run))
                run = []
                continue
            end = min(span.end, begin + max(chunks, 1) * file.chunk_nbytes)
            run.append(Span(file, begin, end, at))
            begin, at = end, at + (end - begin)
    if run:
        yield Job(tuple(run))
