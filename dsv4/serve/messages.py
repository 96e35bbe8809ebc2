"""Anthropic's Messages, as its SDK and Claude Code speak them.

Claude Code puts a hash that differs in every request before its system prompt; it is dropped, or no
prefix would ever be found again. Blocks that only Anthropic can read are dropped too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepseek_recipe import MessagesRequest, MessagesResponse

from dsv4.serve import sse
from dsv4.serve.face import Body, Face, Read, ToolWish, Usage, Wire, objects, without_nulls
from dsv4.serve.knobs import KNOBS, MAX_TOKENS, flag, integer, read_knobs, read_stops
from dsv4.serve.model import ServedModel
from dsv4.serve.refusal import Refusal, invalid, unsupported

BILLING = "x-anthropic-billing-header"
ASKED_TOKENS = 1 << 31  # more than the room is cut to it: Claude Code always asks for 32,000
_OPENAI = ("stop", "response_format", "logprobs", "top_logprobs", "max_completion_tokens")
_PING = sse.event({"type": "ping"}, "ping")


class MessagesWire(Wire):
    """Events, each with its name; and the message in one piece."""

    response = MessagesResponse
    early = False  # the first event tells what the cache had

    _blocks = 0

    def events(self, index: int, name: str | None, data: Body, usage: Usage) -> Iterator[bytes]:
        """One event of the recipe."""
        if data["type"] == "content_block_start":
            self._blocks += 1
            block = data["content_block"]
            if block["type"] == "tool_use":
                self.note_call(index, block["id"])
        if data["type"] == "message_delta":
            if not self._blocks:
                # Clients take the first block of an answer without looking whether there is one.
                block = {"type": "text", "text": ""}
                start = {"type": "content_block_start", "index": 0, "content_block": block}
                yield sse.event(start, "content_block_start")
                yield sse.event({"type": "content_block_stop", "index": 0}, "content_block_stop")
            data["usage"] = data.get("usage", {}) | _usage(usage)
        yield sse.event(data, name)

    def end(self, usage: Usage) -> Iterator[bytes]:
        """Nothing: `message_stop` has come."""
        yield from ()

    def whole(self, choices: list[Body], usage: Usage) -> Body:
        """The message."""
        message = choices[0]
        for block in message["content"]:
            if block["type"] == "tool_use":
                self.note_call(0, block["id"])
        if not message["content"]:
            message["content"] = [{"type": "text", "text": ""}]
        message["usage"] |= _usage(usage)
        return message

    def error(self, refusal: Refusal) -> bytes:
        """What anthropic's client raises."""
        return sse.event(refusal.anthropic(), "error")

    def keep_alive(self) -> bytes:
        """An event that clients drop."""
        return _PING


def _usage(usage: Usage) -> Body:
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": sum(usage.generated),
    }


class Messages(Face):
    """`POST /v1/messages`."""

    id_prefix = "msg_"
    wire = MessagesWire

    def read(self, body: Body, model: ServedModel, id: str) -> Read:
        """As the class says."""
        body = without_nulls(body)
        if integer(body, "max_tokens", 1, ASKED_TOKENS) is None:
            raise invalid("max_tokens", "max_tokens is missing, expected an integer from 1 up")
        return self._read(body, model, id)

    def count(self, body: Body, model: ServedModel) -> Read:
        """The same for `/v1/messages/count_tokens`, where nothing is answered."""
        body = without_nulls(body)
        flag(body, "stream")
        body |= {"max_tokens": 1, "stream": False}
        return self._read(body, model, self.id_prefix)

    def refusal_body(self, refusal: Refusal) -> Body:
        """In Anthropic's shape."""
        return refusal.anthropic()

    def _read(self, body: Body, model: ServedModel, id: str) -> Read:
        knobs = read_knobs(body, model.vocab)
        for name in _OPENAI:
            if name in body:
                raise unsupported(name, f"{name} is not a field of messages; leave it out")
        if knobs.n > 1:
            raise unsupported("n", f"n is {knobs.n}, and messages have one answer; leave it out")
        max_tokens = integer(body, "max_tokens", 1, ASKED_TOKENS)
        stream = bool(flag(body, "stream"))
        if stops := read_stops(body.pop("stop_sequences", None), "stop_sequences"):
            body["stop_sequences"] = list(stops)
        tools = _tool_wish(body)
        budget = _think(body, model)
        if "system" in body:
            body["system"] = _system(body["system"])
        body["messages"] = [_message(one) for one in objects(body.get("messages"), "messages")]
        for handled in KNOBS:
            body.pop(handled, None)
        body["max_tokens"] = min(max_tokens or 1, model.max_positions, MAX_TOKENS)
        request = MessagesRequest(body | {"model": model.names[0]}).convert(model.options)
        return Read(
            request,
            lambda: MessagesRequest.chunk_generator(request, id, model.names[0]),
            knobs,
            max_tokens,
            stream,
            tools,
            cuts=True,
            budget=budget,
        )


def _tool_wish(body: Body) -> ToolWish:
    choice = body.get("tool_choice")
    if choice is None:
        return ToolWish()
    if not isinstance(choice, dict):
        raise invalid("tool_choice", "tool_choice is not an object")
    kind, several = choice.get("type"), choice.get("disable_parallel_tool_use") is not True
    if kind in ("any", "tool"):
        body["tool_choice"] = {"type": "auto"}
        if not body.get("tools"):
            raise invalid("tool_choice", "tool_choice asks for a tool, and there are no tools")
    if kind == "any":
        return ToolWish(must=True, several=several)
    if kind == "tool":
        if not isinstance(choice.get("name"), str):
            raise invalid("tool_choice", "tool_choice names no tool")
        return ToolWish(True, frozenset([choice["name"]]), several=False)
    return ToolWish(several=several)


def _think(body: Body, model: ServedModel) -> int | None:
    """The budget of the reasoning, and an effort where none is asked for."""
    config = body.get("output_config", {})
    if not isinstance(config, dict):
        raise invalid("output_config", "output_config is not an object")
    if model.thinks and config.get("effort") is None:
        body["output_config"] = config | {"effort": model.effort}
    thinking = body.get("thinking")
    if thinking is not None and not isinstance(thinking, dict):
        raise invalid("thinking", "thinking is not an object")
    return integer(thinking or {}, "budget_tokens", 1, ASKED_TOKENS)


def _system(system: Any) -> Any:
    if not isinstance(system, list):
        return system
    return [
        block
        for block in system
        if not (isinstance(block, dict) and str(block.get("text", "")).startswith(BILLING))
    ]


def _message(message: Body) -> Body:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    blocks = [_block(one) for one in content if _kind(one) != "redacted_thinking"]
    # The recipe wants the results of calls first, the API takes them anywhere in the message.
    blocks.sort(key=lambda one: _kind(one) != "tool_result")
    return message | {"content": blocks}


def _kind(block: Any) -> Any:
    return block.get("type") if isinstance(block, dict) else None


def _block(block: Any) -> Any:
    """A block; a result that is an error says so, for the recipe does not."""
    if _kind(block) != "tool_result" or block.get("is_error") is not True:
        return block
    content = block.get("content") or ""
    if isinstance(content, str):
        return block | {"content": f"Error: {content}"}
    return block | {"content": [{"type": "text", "text": "Error:"}, *content]}
