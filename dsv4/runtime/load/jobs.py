"""The plan cut into what one reader does at a time.

A job is a run of the arena that fits into a slot: a piece of one file, or many small files that lie
side by side. Where readers hash, they need whole chunks: a chunk larger than a slot is then a job
by itself, which passes through several slots in order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

from dsv4.formats.store.specs import ALIGNMENT, FileSpec
from dsv4.runtime.load.plan import Span


@dataclasses.dataclass(frozen=True)
class Job:
    """Spans that follow each other in the arena. at: first byte of it; nbytes: gaps included."""

    spans: tuple[Span, ...]
    at: int
    nbytes: int

    @classmethod
    def of(cls, spans: list[Span]) -> Job:
        """The job of a run of spans."""
        last = spans[-1]
        return cls(tuple(spans), spans[0].at, last.at + last.nbytes - spans[0].at)


def make_jobs(
    spans: Iterable[Span], slot_nbytes: int, whole_chunks: Callable[[FileSpec], bool]
) -> list[Job]:
    """Cut `spans`, which are in the order of the arena; large chunks first, else in that order.

    whole_chunks: whether chunks of a file have to stay together.
    """
    jobs = list(_cut(spans, slot_nbytes, whole_chunks))
    # A reader is busy with a large chunk for long: begun last, it would keep the others waiting.
    jobs.sort(key=lambda job: job.nbytes <= slot_nbytes)
    return jobs


def _cut(
    spans: Iterable[Span], slot_nbytes: int, whole_chunks: Callable[[FileSpec], bool]
) -> Iterator[Job]:
    run: list[Span] = []
    for span in spans:
        file, begin, at = span.file, span.begin, span.at
        unit = file.chunk_nbytes
        if not whole_chunks(file) and unit % ALIGNMENT == 0:
            unit = ALIGNMENT
        while begin < span.end:
            used = at - run[0].at if run else 0
            units = (slot_nbytes - used) // unit
            if units <= 0 and run:
                yield Job.of(run)
                run = []
                continue
            end = min(span.end, begin + max(units, 1) * unit)
            run.append(Span(file, begin, end, at))
            begin, at = end, at + (end - begin)
    if run:
        yield Job.of(run)
