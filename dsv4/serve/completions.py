"""OpenAI's Completions: prompts as they are, with `echo` and logprobs as evaluations read them.

lm-eval takes a continuation for greedy where its logprob equals the largest of `top_logprobs`, so
the same float stands in both.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from dsv4.runtime.text.pieces import StopStrings
from dsv4.runtime.text.tokenizer import Text
from dsv4.serve import sse
from dsv4.serve.body import read_json
from dsv4.serve.courses import answer_grammar
from dsv4.serve.exchange import as_refusals, unless_gone
from dsv4.serve.face import Body
from dsv4.serve.jobs import Engine, Event, Finish, Job, TokenLogprob
from dsv4.serve.knobs import MAX_TOP_LOGPROBS, Knobs, flag, integer, read_knobs, read_stops
from dsv4.serve.record import Record
from dsv4.serve.refusal import Refusal, invalid, too_long
from dsv4.serve.runs import Runs
from dsv4.serve.server import Server
from dsv4.serve.steering import Course, constraint_of

MAX_PROMPTS = 256
DEFAULT_TOKENS = 16  # OpenAI's


@dataclasses.dataclass(frozen=True)
class Asked:
    """A body that was read. most: tokens of an answer, 0 for the prompt alone."""

    prompts: list[list[int]]
    knobs: Knobs
    most: int
    stops: tuple[str, ...]
    stop_ids: frozenset[int]
    echo: bool
    stream: bool
    usage: bool
    course: Course


def read(body: Body, server: Server, engine: Engine) -> Asked:
    """Raises Refusal 400 naming the field."""
    model = server.model
    model.check_name(body.get("model"))
    knobs = read_knobs(body, model.vocab, logprobs=integer(body, "logprobs", 0, MAX_TOP_LOGPROBS))
    prompts = _prompts(body.get("prompt"), model.text, model.vocab)
    most = integer(body, "max_tokens", 0, engine.max_seq_len)
    most = DEFAULT_TOKENS if most is None else most
    for ids in prompts:
        if len(ids) + max(most, 1) > engine.max_seq_len:
            raise too_long(len(ids), most, engine.max_seq_len)
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise invalid("stream_options", "stream_options is not an object")
    stops = read_stops(body.get("stop"))
    return Asked(
        prompts,
        knobs,
        min(most, server.limits.tokens or most),
        stops,
        frozenset() if knobs.ignore_eos else model.stop_ids,
        bool(flag(body, "echo")),
        bool(flag(body, "stream")),
        bool(options.get("include_usage")),
        Course(model.vocab, False, body=answer_grammar(body.get("response_format"), model)),
    )


def _prompts(value: Any, text: Text, vocab: int) -> list[list[int]]:
    """Ids of every prompt: a text, texts, ids, or lists of ids."""
    single = isinstance(value, str) or (isinstance(value, list) and _are_ids(value, vocab))
    prompts = [value] if single else value
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= MAX_PROMPTS:
        raise invalid("prompt", f"prompt is not a text, token ids, or 1 to {MAX_PROMPTS} of them")
    result = []
    for one in prompts:
        if isinstance(one, str):
            ids = text.encode(one)
        elif isinstance(one, list) and _are_ids(one, vocab):
            ids = one
        else:
            raise invalid("prompt", f"prompt has something that is not token ids below {vocab}")
        if not ids:
            raise invalid("prompt", "prompt is empty, expected at least one token")
        result.append(ids)
    return result


def _are_ids(value: list[Any], vocab: int) -> bool:
    return bool(value) and all(type(one) is int and 0 <= one < vocab for one in value)


class Choice:
    """One continuation: text as it comes, and the logprobs that belong to it."""

    def __init__(self, index: int, asked: Asked, ids: Sequence[int], text: Text) -> None:
        self.index, self._asked, self._ids, self._text = index, asked, ids, text
        self._stream = text.stream(show_special=False)
        self._stops = StopStrings(asked.stops)
        self._offset = self._told = 0
        self._begun = self.done = False

    def feed(self, event: Event) -> Body | None:
        """What an event adds, as a choice of the wire; None for nothing."""
        pieces: list[str] = []
        entries: list[tuple[int, TokenLogprob | None]] = []
        if not self._begun and event.cached_tokens is not None:
            self._begun = True
            if self._asked.echo:
                pieces.append(self._text.decode(self._ids, show_special=True))
                entries += zip(self._ids, [None, *event.prompt_logprobs], strict=False)
        logprobs = event.logprobs or (None,) * len(event.tokens)
        for token, logprob in zip(event.tokens, logprobs, strict=True):
            if self._told == self._asked.most or self._stops.found:
                break
            self._told += 1
            pieces.append(self._stops.push(self._stream.push(token)))
            entries.append((token, logprob))
        reason = self._reason(event)
        if reason is not None:
            pieces.append(self._stops.push(self._stream.flush()) + self._stops.flush())
        if not entries and reason is None and not any(pieces):
            return None
        return {
            "index": self.index,
            "text": "".join(pieces),
            "logprobs": None if self._asked.knobs.logprobs is None else self._logprobs(entries),
            "finish_reason": reason,
        }

    def _reason(self, event: Event) -> str | None:
        if self._stops.found:
            self.done = True
            return "stop"
        if event.finish is None:
            return None
        self.done = True
        return "length" if event.finish is Finish.LENGTH else "stop"

    def _logprobs(self, entries: Sequence[tuple[int, TokenLogprob | None]]) -> Body:
        """OpenAI's four lists; null for a token that nothing came before."""
        result: Body = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, logprob in entries:
            spelling = self._spelling(token)
            result["tokens"].append(spelling)
            result["token_logprobs"].append(None if logprob is None else logprob.logprob)
            result["top_logprobs"].append(None if logprob is None else self._top(logprob))
            result["text_offset"].append(self._offset)
            self._offset += len(spelling)
        return result

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        top: dict[str, float] = {}
        for token, value in [*logprob.top, (logprob.token, logprob.logprob)]:
            spelling = self._spelling(token)
            top[spelling] = max(value, top.get(spelling, value))
        return top

    def _spelling(self, token: int) -> str:
        return self._text.decode([token], show_special=True)


class Completion:
    """One request under way. Made on the event loop; raises what `Engine.submit` does."""

    def __init__(self, server: Server, engine: Engine, asked: Asked, salt: bytes, record: Record):
        self._asked, self._record, self._model = asked, record, server.model
        pairs = [(ids, n) for ids in asked.prompts for n in range(asked.knobs.n)]
        jobs = [_job(server, asked, ids, n, salt) for ids, n in pairs]
        self.runs = Runs(engine, jobs, record, server.metrics, server.limits.seconds)
        server.runs.add(self.runs)
        self._choices = [
            Choice(index, asked, ids, server.model.text) for index, (ids, _) in enumerate(pairs)
        ]
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": server.model.names[0],
            "system_fingerprint": server.model.fingerprint,
        }

    async def _pieces(self) -> AsyncIterator[Body]:
        while self.runs.open:
            index, event = await self.runs.next()
            if event.finish in (Finish.FAILED, Finish.CANCELLED):
                raise Refusal(500, event.error or "the answer was cancelled by the server")
            choice = self._choices[index]
            piece = choice.feed(event)
            if choice.done:
                self.runs.end(index)
                self._record.finish = None if piece is None else piece["finish_reason"]
            if piece is not None:
                yield piece

    async def stream(self) -> AsyncIterator[bytes]:
        """Chunks, the usage where it was asked for, and the mark."""
        try:
            async for piece in self._pieces():
                usage = {"usage": None} if self._asked.usage else {}
                yield sse.event(self._head | {"choices": [piece]} | usage)
            if self._asked.usage:
                yield sse.event(self._head | {"choices": [], "usage": self._usage()})
            yield sse.DONE
        except Refusal as refusal:
            self._record.error = refusal.for_the_log
            yield sse.event(refusal.openai())
        finally:
            self.runs.cancel()

    async def whole(self) -> Body:
        """All choices in one piece."""
        choices: list[Body | None] = [None] * len(self._choices)
        try:
            async for piece in self._pieces():
                choices[piece["index"]] = _joined(choices[piece["index"]], piece)
        finally:
            self.runs.cancel()
        return self._head | {"choices": choices, "usage": self._usage()}

    def _usage(self) -> Body:
        count = range(len(self._choices))
        prompt = sum(len(ids) for ids in self._asked.prompts)
        generated = sum(min(self.runs.generated(index), self._asked.most) for index in count)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": max(map(self.runs.cached, count))},
        }


def _joined(before: Body | None, piece: Body) -> Body:
    if before is None:
        return piece
    logprobs = before["logprobs"]
    if logprobs is not None:
        logprobs = {key: logprobs[key] + piece["logprobs"][key] for key in logprobs}
    return piece | {"text": before["text"] + piece["text"], "logprobs": logprobs}


def _job(server: Server, asked: Asked, ids: list[int], choice: int, salt: bytes) -> Job:
    model, knobs = server.model, asked.knobs
    return Job(
        ids=ids,
        sampler=knobs.sampler(model.settings, model.text.vocab_size, choice),
        max_new_tokens=max(asked.most, 1),  # an engine draws at least one
        stop_ids=asked.stop_ids,
        logprobs=knobs.logprobs,
        prompt_logprobs=asked.echo and knobs.logprobs is not None,
        constraint=constraint_of(asked.course, knobs, model.text, model.stop_ids),
        salt=salt,
    )


def _read(body: Body, server: Server, engine: Engine) -> Asked:
    with as_refusals():
        return read(body, server, engine)


async def complete(request: Request, server: Server, record: Record) -> ASGIApp:
    """`POST /v1/completions`. Raises what `refusal_of` knows."""
    engine = server.engine
    body = await read_json(request, server.limits.body)
    record.model = server.model.names[0]
    asked = await asyncio.to_thread(_read, body, server, engine)
    completion = Completion(server, engine, asked, request.scope["dsv4.salt"], record)
    if asked.stream:
        return sse.EventStream(completion.stream(), lambda: sse.COMMENT, completion.runs.cancel)
    return await unless_gone(request, completion.whole(), completion.runs)
