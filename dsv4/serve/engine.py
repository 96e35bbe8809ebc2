"""The engine behind a server: one thread alone touches the model; jobs come from any other."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

from dsv4.formats.errors import QueueFull, RuntimeRefusal
from dsv4.runtime.gpu.model import GpuModel
from dsv4.runtime.model import Model
from dsv4.runtime.text.drafting import Wish
from dsv4.serve.backend import Backend
from dsv4.serve.cpu_backend import CpuBackend
from dsv4.serve.gpu_backend import GpuBackend
from dsv4.serve.jobs import Deliver, Event, Job, Stats, Ticket
from dsv4.serve.prefix_cache import PrefixCache
from dsv4.serve.prefix_files import PrefixFiles
from dsv4.serve.remembering import MemoryOptions, Remembering
from dsv4.serve.run import Run, checked
from dsv4.serve.scheduler import Scheduler, Sharing

QUEUE_PER_SLOT = 4
PREFIX_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True)
class Options:
    """queue: jobs that may wait for a slot, by default four for each. prefix_bytes: of host memory
    for beginnings of prompts, 0 for none. root: names the model's weights, so that nothing of
    another model is used. draft: tokens that are guessed ahead: as it pays, never, or so many.
    """

    queue: int | None = None
    prefix_bytes: int = PREFIX_BYTES
    root: bytes = b""
    draft: Wish = "auto"
    sharing: Sharing = dataclasses.field(default_factory=Sharing)
    memory: MemoryOptions = dataclasses.field(default_factory=MemoryOptions)


def backend_of(
    model: Model | GpuModel, slots: int, max_seq_len: int | None = None, *, chunk: int | None = None
) -> Backend:
    """What runs a loaded model. chunk: most tokens of a prompt that a GPU reads at once; rings of
    every slot hold so many. Raises as `GpuModel.engine` and `CpuBackend` do.
    """
    if isinstance(model, Model):
        return CpuBackend(model, slots, max_seq_len)
    return GpuBackend(model.engine(max_seq_len, slots=slots, chunk=chunk))


class ServeEngine:
    """Implements `jobs.Engine`. files: where prompts are kept beyond this process. ended: called
    once, when it is closed without a failure and nothing runs any more.

    Begins at once. An exception that is not one job's fault ends it: every job fails, and so does
    every later one. Raises RuntimeRefusal for a share of time that is not below 1.
    """

    def __init__(
        self,
        backend: Backend,
        options: Options | None = None,
        files: PrefixFiles | None = None,
        clock: Callable[[], float] = time.monotonic,
        ended: Callable[[], None] | None = None,
    ) -> None:
        own = options or Options()
        if not 0 <= own.sharing.share < 1:
            raise RuntimeRefusal(f"share is {own.sharing.share}, expected 0 or more and below 1")
        self.backend = backend
        self._files, self._ended = files, ended
        cache = None
        if own.prefix_bytes > 0:
            cache = PrefixCache(backend, own.prefix_bytes, own.root, files)
        remembering = Remembering(backend, cache, own.memory)
        self._scheduler = Scheduler(backend, remembering, own.sharing, clock, own.draft)
        queue = QUEUE_PER_SLOT * backend.slots if own.queue is None else own.queue
        self._most_jobs = backend.slots + queue
        self._changed = threading.Condition()
        self._arrived: list[Run] = []
        self._unfinished = 0
        self._closing = self._cancelling = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._work, name="dsv4 engine", daemon=True)
        self._thread.start()

    @property
    def max_seq_len(self) -> int:
        """See `jobs.Engine`."""
        return self.backend.capacity

    @property
    def most_jobs(self) -> int:
        """See `jobs.Engine`."""
        return self._most_jobs

    @property
    def failure(self) -> str | None:
        """Why it has ended, if it failed."""
        return self._failure

    def submit(self, job: Job, deliver: Deliver) -> Ticket:
        """See `jobs.Engine`."""
        return self.submit_all([(job, deliver)])[0]

    def submit_all(self, jobs: Sequence[tuple[Job, Deliver]]) -> Sequence[Ticket]:
        """See `jobs.Engine`."""
        runs = [self._run(job, deliver) for job, deliver in jobs]
        with self._changed:
            if self._failure is not None:
                raise RuntimeRefusal(self._failure)
            if self._closing:
                raise RuntimeRefusal("the engine takes no more jobs: it is being closed")
            if self._unfinished + len(runs) > self._most_jobs:
                raise QueueFull(self._full(len(runs)))
            self._unfinished += len(runs)
            self._arrived += runs
            self._changed.notify()
        return runs

    def stats(self) -> Stats:
        """See `jobs.Engine`."""
        found = self._scheduler.stats()
        return dataclasses.replace(found, waiting=found.waiting + len(self._arrived))

    def close(self, *, finish: bool) -> None:
        """See `jobs.Engine`. Returns when all is done; may be called again, to cancel after all."""
        with self._changed:
            self._closing = True
            self._cancelling = self._cancelling or not finish
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        if self._files is not None:
            self._files.close()
        with self._changed:
            ended, self._ended = self._ended, None
        if ended is not None and self._failure is None:
            ended()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _run(self, job: Job, deliver: Deliver) -> Run:
        """A checked job that is counted until it has ended."""
        checked(job, self.backend.capacity, self.backend.vocab)

        def told(event: Event) -> None:
            if event.finish is not None:
                with self._changed:
                    self._unfinished -= 1
            deliver(event)

        return Run(job, told, self.backend.capacity, self._wake)

    def _full(self, more: int) -> str:
        slots, waiting = self.backend.slots, max(self._unfinished - self.backend.slots, 0)
        if more == 1:
            return (
                f"{waiting} jobs wait for one of {slots} slots, which is as many as may wait; "
                "try again later"
            )
        return (
            f"{self._unfinished} jobs run or wait, and {more} more at once are too many: "
            f"{self._most_jobs} may; try again later"
        )

    def _work(self) -> None:
        try:
            while self._next():
                pass
        except BaseException as error:
            self._fail(error)

    def _next(self) -> bool:
        """A turn, or a wait for one. False when all is done."""
        with self._changed:
            arrived, self._arrived = self._arrived, []
            cancelling = self._cancelling
        for run in arrived:
            self._scheduler.submit(run)
        if cancelling:
            self._scheduler.cancel()
        if self._scheduler.turn():
            return True
        with self._changed:
            if self._arrived:
                return True
            if self._closing:
                return False
            self._changed.wait()
        return True

    def _fail(self, error: BaseException) -> None:
        what = f"the engine ended because of {type(error).__name__}: {error}"
        with self._changed:
            self._failure = f"{what}; start the server again"
            arrived, self._arrived = self._arrived, []
        for run in arrived:
            self._scheduler.waiting.append(run)
        self._scheduler.fail(self._failure)
