"""OpenAI's Responses, as its library and Codex speak them. Nothing is stored between requests.

Codex resets its timer by events, not by comments, so what keeps a stream alive is an event; it
drops a turn whose usage lacks one of five integers, and waits for the body to end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepseek_recipe import ResponsesRequest, ResponsesResponse

from dsv4.serve import sse
from dsv4.serve.face import Body, Face, Read, Usage, Wire, as_text, openai_tool_wish, without_nulls
from dsv4.serve.knobs import MAX_TOKENS, MAX_TOP_LOGPROBS, flag, integer, read_knobs
from dsv4.serve.model import ServedModel
from dsv4.serve.refusal import Refusal, invalid, unsupported

_KNOWN = frozenset(
    {
        "message",
        "reasoning",
        "function_call",
        "function_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
    }
)
"""Kinds of input that mean something to this model. Others are what remote tools did."""

_REFUSED: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "conversation": (),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "store": (False,),
    "truncation": ("disabled",),
}
"""Fields that are not honoured -> the values, besides null, that change nothing."""


class ResponsesWire(Wire):
    """Events, numbered anew; and the response in one piece."""

    response = ResponsesResponse

    def __init__(self, read: Read, model: str, id: str, created: int) -> None:
        super().__init__(read, model, id, created)
        self._sent = 0
        self._begun: Body = {"id": id, "object": "response", "model": model}

    def events(self, index: int, name: str | None, data: Body, usage: Usage) -> Iterator[bytes]:
        """One event of the recipe."""
        item = data.get("item") or {}
        if data["type"] == "response.output_item.added" and "call_id" in item:
            self.note_call(index, item["call_id"])
        if "response" in data:
            self._begun = data["response"] if data["type"] == "response.created" else self._begun
            if data["response"].get("usage"):
                _count(data["response"]["usage"], usage)
        yield self._numbered(data, name)

    def end(self, usage: Usage) -> Iterator[bytes]:
        """Nothing: `response.completed` has come, and the body ends."""
        yield from ()

    def whole(self, choices: list[Body], usage: Usage) -> Body:
        """The response."""
        response = choices[0]
        for item in response["output"]:
            if "call_id" in item:
                self.note_call(0, item["call_id"])
        _count(response["usage"], usage)
        return response

    def error(self, refusal: Refusal) -> bytes:
        """`response.failed`, by which clients end."""
        error = {"code": refusal.code or "server_error", "message": refusal.message}
        failed = self._begun | {"status": "failed", "error": error}
        return self._numbered({"type": "response.failed", "response": failed}, "response.failed")

    def keep_alive(self) -> bytes:
        """`response.in_progress` again."""
        name = "response.in_progress"
        return self._numbered({"type": name, "response": self._begun}, name)

    def _numbered(self, data: Body, name: str | None) -> bytes:
        data["sequence_number"] = self._sent
        self._sent += 1
        return sse.event(data, name)


def _count(told: Body, usage: Usage) -> None:
    generated = sum(usage.generated)
    told |= {
        "input_tokens": usage.prompt,
        "output_tokens": generated,
        "total_tokens": usage.prompt + generated,
    }
    told.setdefault("input_tokens_details", {})["cached_tokens"] = usage.cached
    details = told.setdefault("output_tokens_details", {})
    details["reasoning_tokens"] = details.get("reasoning_tokens") or 0


class Responses(Face):
    """`POST /v1/responses`."""

    id_prefix = "resp_"
    wire = ResponsesWire

    def read(self, body: Body, model: ServedModel, id: str) -> Read:
        """As the class says."""
        body = without_nulls(body)
        for name, neutral in _REFUSED.items():
            if name in body and body[name] not in neutral:
                hint = "; send the whole conversation as input" if "id" in name else ""
                raise unsupported(name, f"{name} is not supported by this server{hint}")
        most = integer(body, "top_logprobs", 0, MAX_TOP_LOGPROBS)
        knobs = read_knobs(body, model.vocab, logprobs=most or None)
        if knobs.n != 1:
            raise unsupported("n", "n is not a field of responses")
        max_tokens = integer(body, "max_output_tokens", 1, MAX_TOKENS)
        stream = bool(flag(body, "stream"))
        tools = openai_tool_wish(body)
        _think(body, model)
        if isinstance(body.get("input"), list):
            body["input"] = [_item(one) for one in body["input"] if _is_known(one)]
        for handled in ("temperature", "top_p"):
            body.pop(handled, None)
        asked = ResponsesRequest(body | {"model": model.names[0]})
        echo, namespaces = asked.echo(), asked.namespace_tool_map(model.options)
        request = asked.convert(model.options)

        def generator() -> Any:
            made = ResponsesRequest.chunk_generator(request, id, model.names[0])
            return made.with_namespace_tool_map(namespaces).with_echo(echo)

        return Read(request, generator, knobs, max_tokens, stream, tools, fills=True)


def _think(body: Body, model: ServedModel) -> None:
    reasoning = body.get("reasoning", {})
    if not isinstance(reasoning, dict):
        raise invalid("reasoning", "reasoning is not an object")
    if model.thinks and reasoning.get("effort") is None:
        body["reasoning"] = reasoning | {"effort": model.effort}


def _is_known(item: Any) -> bool:
    if not isinstance(item, dict):
        raise invalid("input", "input is not a text or a list of objects")
    if item.get("type") == "item_reference":
        raise unsupported("input", "input has an item_reference, and this server stores no items")
    return item.get("type", "message") in _KNOWN


def _item(item: Body) -> Body:
    if item.get("type") == "function_call":
        return item | {"arguments": as_text(item.get("arguments"))}
    return item
