"""OpenAI's Chat Completions, with both spellings of reasoning in and out.

Half of the clients read `reasoning_content`, the others `reasoning`. Usage comes once, in a chunk
of its own without choices; ids and names come in the first delta of a call only, since clients join
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepseek_recipe import ChatCompletionRequest, ChatCompletionResponse

from dsv4.serve import sse
from dsv4.serve.face import (
    Body,
    Face,
    Read,
    Usage,
    Wire,
    as_text,
    objects,
    openai_tool_wish,
    without_nulls,
)
from dsv4.serve.knobs import MAX_TOKENS, MAX_TOP_LOGPROBS, flag, integer, read_knobs, read_stops
from dsv4.serve.model import ServedModel
from dsv4.serve.refusal import Refusal, invalid


class ChatWire(Wire):
    """Chunks, and the completion in one piece."""

    response = ChatCompletionResponse
    _reasoning = 0  # tokens, of all choices

    def events(self, index: int, name: str | None, data: Body, usage: Usage) -> Iterator[bytes]:
        """One chunk of the recipe, in the shape that all clients read."""
        self._reasoning += _reasoning(data.pop("usage", None))
        data["created"], choice = self.created, data["choices"][0]
        choice["index"] = index
        delta = choice["delta"]
        if delta.get("reasoning_content") is not None:
            delta["reasoning"] = delta["reasoning_content"]
        for call in delta.get("tool_calls") or ():
            if "id" in call:
                self.note_call(index, call["id"])
        if self.read.usage:
            data["usage"] = None
        yield sse.event(data)

    def end(self, usage: Usage) -> Iterator[bytes]:
        """The chunk with usage, where it was asked for, and the mark."""
        if self.read.usage:
            head = {"id": self.id, "object": "chat.completion.chunk", "created": self.created}
            yield sse.event(
                head | {"model": self.model, "choices": [], "usage": self._usage(usage)}
            )
        yield sse.DONE

    def whole(self, choices: list[Body], usage: Usage) -> Body:
        """The completion, with the choices of all."""
        result = choices[0]
        self._reasoning = sum(_reasoning(one.get("usage")) for one in choices)
        result["choices"] = [one["choices"][0] | {"index": i} for i, one in enumerate(choices)]
        for choice in result["choices"]:
            message = choice["message"]
            message.setdefault("content", None)
            if message.get("reasoning_content") is not None:
                message["reasoning"] = message["reasoning_content"]
            for call in message.get("tool_calls") or ():
                call.pop("index", None)
                self.note_call(choice["index"], call["id"])
        result["usage"] = self._usage(usage)
        return result

    def error(self, refusal: Refusal) -> bytes:
        """What openai's client raises as an APIError."""
        return sse.event(refusal.openai())

    def keep_alive(self) -> bytes:
        """A comment."""
        return sse.COMMENT

    def _usage(self, usage: Usage) -> Body:
        generated = sum(usage.generated)
        return {
            "prompt_tokens": usage.prompt,
            "completion_tokens": generated,
            "total_tokens": usage.prompt + generated,
            "prompt_tokens_details": {"cached_tokens": usage.cached},
            "completion_tokens_details": {"reasoning_tokens": self._reasoning},
            "prompt_cache_hit_tokens": usage.cached,
            "prompt_cache_miss_tokens": usage.prompt - usage.cached,
        }


def _reasoning(usage: Body | None) -> int:
    details = (usage or {}).get("completion_tokens_details") or {}
    return int(details.get("reasoning_tokens") or 0)


class Chat(Face):
    """`POST /v1/chat/completions`."""

    id_prefix = "chatcmpl-"
    wire = ChatWire

    def read(self, body: Body, model: ServedModel, id: str) -> Read:
        """As the class says."""
        body = without_nulls(body)
        logprobs = flag(body, "logprobs")
        most = integer(body, "top_logprobs", 0, MAX_TOP_LOGPROBS)
        if most is not None and not logprobs:
            raise invalid("top_logprobs", "top_logprobs needs logprobs: true")
        knobs = read_knobs(body, model.vocab, logprobs=(most or 0) if logprobs else None)
        max_tokens = integer(body, "max_tokens", 1, MAX_TOKENS)
        if "max_completion_tokens" in body:
            max_tokens = integer(body, "max_completion_tokens", 1, MAX_TOKENS)
            body["max_tokens"] = body.pop("max_completion_tokens")
        if stops := list(read_stops(body.get("stop"))):
            body["stop"] = stops
        else:
            body.pop("stop", None)
        stream = bool(flag(body, "stream"))
        options = body.get("stream_options") or {}
        if not isinstance(options, dict):
            raise invalid("stream_options", "stream_options is not an object")
        tools = openai_tool_wish(body)
        _think(body, model)
        body["messages"] = [_message(one) for one in objects(body.get("messages"), "messages")]
        for handled in ("n", "temperature", "top_p", "seed"):
            body.pop(handled, None)
        request = ChatCompletionRequest(body | {"model": model.names[0]}).convert(model.options)
        return Read(
            request,
            lambda: ChatCompletionRequest.chunk_generator(request, id, model.names[0]),
            knobs,
            max_tokens,
            stream,
            tools,
            usage=bool(options.get("include_usage")),
        )


def _think(body: Body, model: ServedModel) -> None:
    """The ways in which clients of other servers say how to reason become DeepSeek's own."""
    kwargs = body.pop("chat_template_kwargs", {})
    reasoning = body.pop("reasoning", {})
    if not isinstance(kwargs, dict) or not isinstance(reasoning, dict):
        raise invalid("chat_template_kwargs", "chat_template_kwargs, reasoning: not an object")
    thinking = kwargs.get("thinking", kwargs.get("enable_thinking", reasoning.get("enabled")))
    if isinstance(thinking, bool):
        body.setdefault("thinking", {"type": "enabled" if thinking else "disabled"})
    effort = kwargs.get("reasoning_effort") or reasoning.get("effort") or None
    if effort is not None:
        body.setdefault("reasoning_effort", effort)
    if model.thinks:
        body.setdefault("reasoning_effort", model.effort)


def _message(message: Body) -> Body:
    message = dict(message)
    if message.get("role") == "developer":
        message["role"] = "system"
    if message.get("reasoning_content") is None:
        message.pop("reasoning_content", None)
        if isinstance(message.get("reasoning"), str):
            message["reasoning_content"] = message["reasoning"]
    message.pop("reasoning", None)
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        message["tool_calls"] = [_call(one) for one in calls]
    return message


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    return call | {"function": function | {"arguments": as_text(function.get("arguments"))}}
