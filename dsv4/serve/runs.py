"""The jobs of one request: taken together, heard together, given up together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from dsv4.formats.errors import Dsv4Error, QueueFull
from dsv4.serve.jobs import Engine, Event, Finish, Job
from dsv4.serve.metrics import Meter, Metrics
from dsv4.serve.record import Record
from dsv4.serve.refusal import Refusal


class Runs:
    """Jobs in an engine; their events come by `next`, as (index of the job, event).

    open: jobs whose last event has not come. Is made on the event loop. Raises what
    `Engine.submit` does, and then none of the jobs runs.
    """

    def __init__(
        self,
        engine: Engine,
        jobs: Sequence[Job],
        record: Record,
        metrics: Metrics,
        seconds: float | None = None,
    ) -> None:
        """seconds: that all of them may take; None for any."""
        if len(jobs) > engine.most_jobs:
            raise Refusal(
                400,
                f"the request asks for {len(jobs)} answers; this server takes at most "
                f"{engine.most_jobs} at once, by --slots and --queue",
            )
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._record, self._seconds = record, seconds
        self._ends = None if seconds is None else self._loop.time() + seconds
        told = [(job, self._deliver(index)) for index, job in enumerate(jobs)]
        try:
            self._tickets = engine.submit_all(told)
        except Dsv4Error as error:
            metrics.rejected("queue_full" if isinstance(error, QueueFull) else "refused")
            raise
        self._meters = [Meter(metrics, job) for job in jobs]
        self.open = set(range(len(jobs)))
        record.prompt_tokens += sum(len(job.ids) for job in jobs)
        record.meters += self._meters

    async def next(self) -> tuple[int, Event]:
        """The next event of a job that is open. Raises Refusal 504 once they took too long."""
        while True:
            try:
                async with asyncio.timeout_at(self._ends):
                    index, event = await self._queue.get()
            except TimeoutError:
                self.cancel()
                raise Refusal(
                    504, f"the answer took longer than the {self._seconds:g} s that it may"
                ) from None
            if index in self.open:
                self._meters[index].note(event)
                if event.finish is not None:
                    self.open.discard(index)
                return index, event

    def end(self, index: int, finish: Finish = Finish.STOP) -> None:
        """Nothing more is wanted of a job, which need not be open."""
        if index in self.open:
            self.open.discard(index)
            self._tickets[index].cancel()
            self._meters[index].end(finish)

    def cancel(self) -> None:
        """Nobody waits for the jobs that are open any more."""
        for index in sorted(self.open):
            self._record.cancelled = True
            self.end(index, Finish.CANCELLED)

    def give_up(self, why: str) -> None:
        """The server cannot go on with them: whoever waits hears `why`."""
        for index in sorted(self.open):
            self._tickets[index].cancel()
            self._queue.put_nowait((index, Event(finish=Finish.FAILED, error=why)))

    def generated(self, index: int) -> int:
        """Tokens of a job so far."""
        return self._meters[index].generated

    def cached(self, index: int) -> int:
        """Tokens of a job's prompt that were not computed again."""
        return self._meters[index].cached

    def _deliver(self, index: int) -> Callable[[Event], None]:
        def deliver(event: Event) -> None:
            # A loop that is closed has nobody left to tell.
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, event))

        return deliver
