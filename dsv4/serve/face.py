"""What a protocol of conversations has to say, so that one exchange serves them all.

A `Face` reads a body; a `Wire` writes what the recipe's generator makes of the answer.
"""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from deepseek_recipe import ConversationRequest

from dsv4.serve.knobs import Knobs
from dsv4.serve.model import ServedModel
from dsv4.serve.refusal import Refusal, invalid

Body = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ToolWish:
    """Which tools an answer may or must call. must: whether it has to call one. only: the names it
    may call, None for all. several: whether it may call more than one.
    """

    must: bool = False
    only: frozenset[str] | None = None
    several: bool = True


@dataclasses.dataclass(frozen=True)
class Read:
    """A body that was read. generator: makes the recipe's writer of one choice.

    max_tokens: as asked, None for unsaid. cuts: whether an answer that has less room than
    `max_tokens` is cut, not refused. fills: whether an unsaid bound is all the room. budget: most
    tokens of the reasoning. usage: whether a stream tells it.
    """

    request: ConversationRequest
    generator: Callable[[], Any]
    knobs: Knobs
    max_tokens: int | None
    stream: bool
    tools: ToolWish = ToolWish()
    cuts: bool = False
    fills: bool = False
    budget: int | None = None
    usage: bool = True


@dataclasses.dataclass
class Usage:
    """Tokens of a request. generated: of each choice."""

    prompt: int
    cached: int
    generated: list[int]


class Wire(abc.ABC):
    """Writes one request's answer. call_ids: of each choice's tool calls, as they were told."""

    response: Any  # the recipe's class that joins what its generator made
    early = True  # whether it may begin before the engine has said anything

    def __init__(self, read: Read, model: str, id: str, created: int) -> None:
        self.read, self.model, self.id, self.created = read, model, id, created
        self.call_ids: dict[int, list[str]] = {}

    @abc.abstractmethod
    def events(self, index: int, name: str | None, data: Body, usage: Usage) -> Iterator[bytes]:
        """One thing of the generator, of the `index`-th choice."""

    @abc.abstractmethod
    def end(self, usage: Usage) -> Iterator[bytes]:
        """After the last choice has ended."""

    @abc.abstractmethod
    def whole(self, choices: list[Body], usage: Usage) -> Body:
        """The answer in one piece, from what `response` made of each choice."""

    @abc.abstractmethod
    def error(self, refusal: Refusal) -> bytes:
        """A failure in the middle of a stream."""

    @abc.abstractmethod
    def keep_alive(self) -> bytes:
        """What resets the client's timer and says nothing."""

    def note_call(self, index: int, call_id: str) -> None:
        """A tool call was told."""
        self.call_ids.setdefault(index, []).append(call_id)


class Face(abc.ABC):
    """One protocol. id_prefix: of its answers' ids."""

    id_prefix: str
    wire: type[Wire]

    @abc.abstractmethod
    def read(self, body: Body, model: ServedModel, id: str) -> Read:
        """Raises Refusal, ConversionError, ValueError or TypeError for what cannot be read."""

    def refusal_body(self, refusal: Refusal) -> Body:
        """A refusal in the protocol's shape."""
        return refusal.openai()


def without_nulls(body: Mapping[str, Any]) -> Body:
    """A copy; null is unsaid."""
    return {key: value for key, value in body.items() if value is not None}


def as_text(arguments: Any) -> str:
    """Arguments of a call as the JSON text that the recipe wants; some clients send the object."""
    if isinstance(arguments, str):
        return arguments
    return json.dumps({} if arguments is None else arguments, ensure_ascii=False)


def objects(value: Any, name: str) -> list[Body]:
    """A list of objects. Raises Refusal 400."""
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise invalid(name, f"{name} is not a list of objects")
    return value


def openai_tool_wish(body: Body) -> ToolWish:
    """What `tool_choice` and `parallel_tool_calls` say; leaves "auto" or "none" in `body`.

    The recipe refuses a forced call while the model reasons; here a grammar forces it afterwards.
    """
    choice, several = body.get("tool_choice"), body.get("parallel_tool_calls") is not False
    if choice is None or choice in ("auto", "none"):
        return ToolWish(several=several)
    if not body.get("tools"):
        raise invalid("tool_choice", "tool_choice asks for a tool, and the request has no tools")
    body["tool_choice"] = "auto"
    if choice == "required":
        return ToolWish(must=True, several=several)
    if isinstance(choice, dict):
        if choice.get("type") == "allowed_tools":
            inner = choice.get("allowed_tools", choice)
            if not isinstance(inner, dict):
                raise invalid("tool_choice", "tool_choice.allowed_tools is not an object")
            names = frozenset(map(_name, objects(inner.get("tools"), "tool_choice.tools")))
            return ToolWish(inner.get("mode") == "required", names, several)
        if choice.get("type") in ("function", "custom"):
            return ToolWish(True, frozenset([_name(choice)]), several=False)
    raise invalid("tool_choice", "tool_choice is not auto, none, required, or a function by name")


def _name(tool: Body) -> str:
    inner = tool.get(tool.get("type", "function"), tool)
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str):
        raise invalid("tool_choice", "tool_choice names no tool")
    return name
