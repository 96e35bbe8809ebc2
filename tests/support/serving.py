"""A server for tests: the tiny tokenizer, an engine that says what it is told to, a real socket."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx2
import uvicorn
from deepseek_recipe import Tokenizer

from dsv4.formats.errors import QueueFull, RuntimeRefusal
from dsv4.formats.model.settings import GenerationSettings
from dsv4.runtime.text.tokenizer import Text
from dsv4.serve.app import make_app
from dsv4.serve.jobs import Event, Finish, Job, Stats, TokenLogprob
from dsv4.serve.model import ServedModel
from dsv4.serve.server import Server

TOKENIZER = Path(__file__).resolve().parents[2] / "examples" / "tiny-dsv4" / "tokenizer.json"
VOCAB = 1536
EOS = 1


def served_model(*, effort: str = "none", names: tuple[str, ...] = ("tiny",)) -> ServedModel:
    """The tiny tokenizer as a model to serve."""
    raw = TOKENIZER.read_bytes()
    return ServedModel(
        names,
        Text.from_file(TOKENIZER),
        Tokenizer.from_str(raw.decode()),
        raw,
        GenerationSettings((EOS,)),
        frozenset({EOS}),
        VOCAB,
        8192,
        "test",
        effort != "none",
        effort,
        (),
    )


class Ticket:
    """Of a `ScriptedEngine`."""

    def __init__(self, job: Job, deliver: Callable[[Event], None]) -> None:
        self.job, self.deliver = job, deliver
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        """As in `Ticket`."""
        self.cancelled.set()


class ScriptedEngine:
    """An `Engine` that says what `script` says: ids for a job, ended by a stop id, or a sentence of
    failure.

    A mask that forbids the next id is honoured: the lowest id that it allows comes instead, and
    `swerved` tells of both. cached: tokens that it claims to have had. step: waits so long before
    each token. hold: while set, nothing is told but cancels.
    """

    def __init__(
        self,
        script: Callable[[Job], Sequence[int] | str],
        *,
        max_seq_len: int = 4096,
        most: int = 64,
        cached: int = 0,
        step: float = 0.0,
    ) -> None:
        self.script, self.max_seq_len, self.most = script, max_seq_len, most
        self.most_jobs = max(most, 64)  # what waits included
        self.cached, self.step = cached, step
        self.jobs: list[Job] = []
        self.swerved: list[tuple[int, int]] = []
        self.cancels: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.hold = threading.Event()
        self.failure: str | None = None
        self.running, self.counted = 0, Stats()
        self._lock = threading.Lock()

    def submit(self, job: Job, deliver: Callable[[Event], None]) -> Ticket:
        """As in `Engine`."""
        return self.submit_all([(job, deliver)])[0]

    def submit_all(self, jobs: Sequence[tuple[Job, Callable[[Event], None]]]) -> list[Ticket]:
        """As in `Engine`; each job on a thread of its own."""
        if any(len(job.ids) + job.max_new_tokens > self.max_seq_len for job, _ in jobs):
            raise RuntimeRefusal("the job does not fit")
        with self._lock:
            if self.running + len(jobs) > self.most:
                raise QueueFull(f"{self.running} requests wait already; try again later")
            self.running += len(jobs)
            self.jobs += [job for job, _ in jobs]
        tickets = [Ticket(job, deliver) for job, deliver in jobs]
        for ticket in tickets:
            threading.Thread(target=self._run, args=(ticket,), daemon=True).start()
        return tickets

    def stats(self) -> Stats:
        """Nothing is counted but who runs, and what a test says."""
        return dataclasses.replace(self.counted, running=self.running)

    def close(self, *, finish: bool) -> None:
        """Nothing to end."""

    def _run(self, ticket: Ticket) -> None:
        last = Event(finish=Finish.FAILED, error="the script broke")
        try:
            for event in self._events(ticket):
                last = event
                if event.finish is None:
                    ticket.deliver(event)
        finally:
            with self._lock:
                self.running -= 1
            if last.finish is Finish.CANCELLED:
                self.cancels.put(ticket.job)
            ticket.deliver(last)

    def _events(self, ticket: Ticket) -> Iterator[Event]:
        job, said = ticket.job, self.script(ticket.job)
        prompt = tuple(_logprob(token, job.logprobs or 0) for token in job.ids[1:])
        yield Event(
            cached_tokens=min(self.cached, len(job.ids) - 1),
            prompt_logprobs=prompt if job.prompt_logprobs else (),
        )
        if isinstance(said, str):
            yield Event(finish=Finish.FAILED, error=said)
            return
        end = min(job.stop_ids, default=EOS)
        for count, wanted in enumerate(itertools.chain(said, itertools.repeat(end)), 1):
            if self.step:
                time.sleep(self.step)
            while self.hold.is_set() and not ticket.cancelled.is_set():
                time.sleep(0.005)
            if ticket.cancelled.is_set():
                yield Event(finish=Finish.CANCELLED)
                return
            token = self._drawn(job, wanted)
            if token in job.stop_ids:
                yield Event(finish=Finish.STOP)
                return
            told = () if job.logprobs is None else (_logprob(token, job.logprobs),)
            if job.constraint is not None:
                job.constraint.took(token)
            finish = Finish.LENGTH if count == job.max_new_tokens else None
            if job.constraint is not None and job.constraint.ended:
                finish = Finish.STOP
            yield Event((token,), told, finish=finish)
            if finish is not None:
                return

    def _drawn(self, job: Job, wanted: int) -> int:
        mask = None if job.constraint is None else job.constraint.mask()
        if mask is None or bool(mask[wanted]):
            return wanted
        allowed = mask.nonzero().flatten().tolist()
        with self._lock:
            self.swerved.append((wanted, allowed[0]))
        return int(allowed[0])


def _logprob(token: int, top: int) -> TokenLogprob:
    """Something that tells tokens apart: -token/1000, the next ids less likely."""
    value = -token / 1000
    return TokenLogprob(token, value, tuple((token + i, value - i) for i in range(top)))


@dataclasses.dataclass(frozen=True)
class Live:
    """A server that answers. url: without /v1."""

    url: str
    server: Server
    engine: ScriptedEngine
    text: Text
    client: httpx2.Client

    def post(self, path: str, body: object, **headers: str) -> httpx2.Response:
        """One request."""
        return self.client.post(self.url + path, json=body, headers=headers)

    def raw(self, path: str, body: dict[str, object]) -> str:
        """A whole stream as it is on the wire."""
        response = self.post(path, body | {"stream": True})
        assert response.status_code == 200, response.text
        return response.content.decode()


def events(raw: str) -> list[tuple[str | None, dict[str, object] | str]]:
    """(event, data) of a stream. Anything that is not an event, a comment or a blank line fails."""
    found: list[tuple[str | None, dict[str, object] | str]] = []
    for block in raw.split("\n\n"):
        name, data = None, []
        for line in block.splitlines():
            field, _, value = line.partition(": ")
            assert field in ("event", "data", ""), line
            if field == "event":
                name = value
            elif field == "data":
                data.append(value)
        if data:
            assert len(data) == 1, "data of several lines"
            found.append((name, data[0] if data[0] == "[DONE]" else json.loads(data[0])))
    return found


@contextlib.contextmanager
def live(
    engine: ScriptedEngine | None, model: ServedModel | None = None, **options: object
) -> Iterator[Live]:
    """A server on a free port of loopback; without an engine it is loading."""
    server = Server(model or served_model(), **options)  # type: ignore[arg-type]
    if engine is not None:
        server.ready(engine)
    config = uvicorn.Config(
        make_app(server), port=0, lifespan="off", log_config=None, access_log=False
    )
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.005)
    port = runner.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx2.Client(timeout=30, verify=False, trust_env=False) as client:
            yield Live(url, server, engine, server.model.text, client)  # type: ignore[arg-type]
    finally:
        runner.should_exit = True
        thread.join(10)
