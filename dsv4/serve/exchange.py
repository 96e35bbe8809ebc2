"""A request of a conversation from its body to its last byte, the same for all protocols.

Reading, rendering and encoding run on a thread of the pool; jobs are taken before the first byte of
a stream, so that whatever is refused has its own status.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from dsv4.serve.answer import Answer
from dsv4.serve.body import read_json
from dsv4.serve.courses import course_of
from dsv4.serve.face import Body, Face, Read, Usage, Wire
from dsv4.serve.jobs import Engine, Event, Finish, Job
from dsv4.serve.messages import Messages
from dsv4.serve.model import ServedModel
from dsv4.serve.prompts import Prompt, encode
from dsv4.serve.record import Record
from dsv4.serve.refusal import Refusal, too_long
from dsv4.serve.replay import keys
from dsv4.serve.runs import Runs
from dsv4.serve.server import Server
from dsv4.serve.sse import EventStream, until_gone
from dsv4.serve.steering import Course, constraint_of

CLIENT_LEFT = 499


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that was read: what the engine is asked for, and who asked."""

    read: Read
    prompt: Prompt
    jobs: tuple[Job, ...]
    salt: bytes


def prepare(server: Server, engine: Engine, face: Face, body: Body, id: str, salt: bytes) -> Asked:
    """Read, render and encode a body. Raises Refusal."""
    model = server.model
    model.check_name(body.get("model"))
    with as_refusals():
        read = face.read(body, model, id)
        prompt = encode(read.request.conversation, model.text, server.memory, salt)
    most = _length(server, engine.max_seq_len, read, len(prompt.ids))
    course = course_of(read, model)
    jobs = (_job(model, read, prompt, course, most, salt, n) for n in range(read.knobs.n))
    return Asked(read, prompt, tuple(jobs), salt)


@contextlib.contextmanager
def as_refusals() -> Iterator[None]:
    """Libraries raise errors of Python's for some bodies that it does not take."""
    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:
        raise Refusal(400, f"the request cannot be read: {error}") from None


def _length(server: Server, room: int, read: Read, prompt: int) -> int:
    """Most tokens of the answer. Raises Refusal for a prompt that leaves too little room."""
    left, asked = room - prompt, read.max_tokens
    if left < 1 or (asked is not None and asked > left and not read.cuts):
        raise too_long(prompt, asked, room)
    if asked is None:
        own = server.model.settings.new_tokens(prompt)
        usual = left if read.fills else read.request.resolve_max_tokens(prompt, room)
        asked = usual if own is None else max(min(own, usual), 1)
    return min(asked, left, server.limits.tokens or left)


class Exchange:
    """One request under way. Made on the event loop; raises what `Engine.submit` does."""

    def __init__(self, server: Server, engine: Engine, asked: Asked, wire: Wire, record: Record):
        self._server, self._asked, self.wire, self._record = server, asked, wire, record
        read, model = asked.read, server.model
        self.runs = Runs(engine, asked.jobs, record, server.metrics, server.limits.seconds)
        server.runs.add(self.runs)
        self._answers = [
            Answer(
                read.request,
                read.generator(),
                model.tokenizer,
                model.stop_ids,
                logprobs=read.knobs.logprobs is not None,
            )
            for _ in asked.jobs
        ]
        self._opened = [False] * len(asked.jobs)

    async def pieces(self) -> AsyncIterator[tuple[int, list[Any]]]:
        """(choice, what the recipe made) as it comes. Raises Refusal for an answer that fails."""
        if self.wire.early:
            for index in range(len(self._answers)):
                yield index, self._open(index)
        while self.runs.open:
            index, event = await self.runs.next()
            chunks = [*self._open(index), *self._answers[index].feed(event)]
            self._conclude(index, event)
            yield index, chunks

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer as bytes on the wire."""
        wire, usage = self.wire, self.usage
        try:
            async for index, chunks in self.pieces():
                for left, chunk in enumerate(chunks, 1 - len(chunks)):
                    if not left and self._answers[index].done:
                        # Before a client learns of the end, for its next request may be fast.
                        await self._remember(index)
                    name, data = wire.response.sse_event_name(chunk), json.loads(chunk.to_json())
                    for part in wire.events(index, name, data, usage()):
                        yield part
            for part in wire.end(usage()):
                yield part
        except Refusal as refusal:
            self._record.error = refusal.for_the_log
            yield wire.error(refusal)
        finally:
            self.runs.cancel()

    async def whole(self) -> Body:
        """The answer in one piece."""
        read, wire, prompt = self._asked.read, self.wire, len(self._asked.prompt.ids)
        parts: list[list[Any]] = [[] for _ in range(read.knobs.n)]
        try:
            async for index, chunks in self.pieces():
                parts[index] += chunks
        finally:
            self.runs.cancel()
        choices = []
        for index, chunks in enumerate(parts):
            response = wire.response(
                wire.id, wire.model, wire.created, prompt, self.runs.cached(index)
            )
            for chunk in chunks:
                response.accumulate(chunk)
            choices.append(json.loads(response.to_json()))
        result = wire.whole(choices, self.usage())
        for index in range(len(choices)):
            await self._remember(index)
        return result

    def usage(self) -> Usage:
        """As far as it is known."""
        count = len(self._answers)
        generated = [self.runs.generated(index) for index in range(count)]
        cached = max(self.runs.cached(index) for index in range(count))
        return Usage(len(self._asked.prompt.ids), cached, generated)

    def _open(self, index: int) -> list[Any]:
        if self._opened[index]:
            return []
        self._opened[index] = True
        tokens, cached = len(self._asked.prompt.ids), self.runs.cached(index)
        return self._answers[index].open(tokens, cached, self._server.model.fingerprint)

    def _conclude(self, index: int, event: Event) -> None:
        if self._answers[index].done:
            self.runs.end(index)
            self._record.finish = (event.finish or Finish.STOP).value
        elif event.finish is not None:
            self._record.finish = event.finish.value
            raise Refusal(500, event.error or "the answer was cancelled by the server")

    async def _remember(self, index: int) -> None:
        asked, answer = self._asked, self._answers[index]
        if asked.prompt.before is None or answer.stopped:
            return
        said = await asyncio.to_thread(answer.said)
        calls = self.wire.call_ids.get(index, [])
        self._server.memory.keep(keys(asked.salt, asked.prompt.before, said.content, calls), said)


def _job(
    model: ServedModel,
    read: Read,
    prompt: Prompt,
    course: Course,
    most: int,
    salt: bytes,
    choice: int,
) -> Job:
    knobs = read.knobs
    return Job(
        ids=prompt.ids,
        sampler=knobs.sampler(model.settings, model.text.vocab_size, choice),
        max_new_tokens=most,
        stop_ids=frozenset() if knobs.ignore_eos else model.stop_ids,
        logprobs=knobs.logprobs,
        constraint=constraint_of(course, knobs, model.text, model.stop_ids),
        salt=salt,
    )


async def converse(request: Request, server: Server, face: Face, record: Record) -> ASGIApp:
    """Answer a request in the protocol of `face`. Raises what `refusal_of` knows."""
    engine = server.engine
    body = await read_json(request, server.limits.body)
    record.model = server.model.names[0]
    id, salt = face.id_prefix + uuid.uuid4().hex, request.scope["dsv4.salt"]
    asked = await asyncio.to_thread(prepare, server, engine, face, body, id, salt)
    wire = face.wire(asked.read, server.model.names[0], id, int(time.time()))
    exchange = Exchange(server, engine, asked, wire, record)
    if asked.read.stream:
        return EventStream(exchange.stream(), wire.keep_alive, exchange.runs.cancel)
    return await unless_gone(request, exchange.whole(), exchange.runs)


async def count_tokens(request: Request, server: Server, record: Record) -> ASGIApp:
    """`POST /v1/messages/count_tokens`: by the code that answers, without an answer."""
    body = await read_json(request, server.limits.body)
    model, salt = server.model, request.scope["dsv4.salt"]
    model.check_name(body.get("model"))

    def count() -> int:
        with as_refusals():
            read = Messages().count(body, model)
            return len(encode(read.request.conversation, model.text, server.memory, salt).ids)

    return JSONResponse({"input_tokens": await asyncio.to_thread(count)})


async def unless_gone(request: Request, work: Coroutine[Any, Any, Body], runs: Runs) -> Response:
    """What `work` makes as JSON; nothing, and the jobs cancelled, once the client has left."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(until_gone(request.receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return JSONResponse(working.result())
        return Response(status_code=CLIENT_LEFT)
    finally:
        runs.cancel()
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
