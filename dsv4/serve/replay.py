"""What was said, as the ids that were drawn: found again when a client sends the text back.

A client returns an answer as text, without the white space that parsing drops, with numbers written
anew, often without its reasoning. Encoded again that is not what the model drew, so no prefix of
the cache fits, and the reasoning is lost. So answers are kept by the ids of their tool calls and by
what was said before them, and their ids take the place of the text where it is what was said.
Bounded: the answers that were not used for the longest time go first.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from deepseek_recipe import AssistantMessage, Message

MAX_IDS = 16_000_000  # 64 MB
_ENTRY_IDS = 64  # what an entry costs besides its ids, in ids


@dataclasses.dataclass(frozen=True)
class Call:
    """A tool call: arguments as JSON."""

    name: str
    arguments: str

    def same(self, other: Call) -> bool:
        """Whether both say the same, however their arguments are written."""
        return self.name == other.name and _value(self.arguments) == _value(other.arguments)


@dataclasses.dataclass(frozen=True)
class Said:
    """An answer. ids: all that were drawn, without the one that ended it. thinking: they begin
    inside the reasoning.
    """

    content: str
    reasoning: str
    calls: tuple[Call, ...]
    ids: array[int]
    thinking: bool

    def is_what(self, message: Message) -> bool:
        """Whether `message` is this answer, its reasoning possibly lost."""
        sent = tuple(Call(call.name, call.arguments) for call in message.tool_calls or ())
        return (
            message.content == self.content
            and (message.reasoning_content or self.reasoning) == self.reasoning
            and len(sent) == len(self.calls)
            and all(one.same(other) for one, other in zip(sent, self.calls, strict=True))
        )


class Memory:
    """Answers by key. May be used from any thread. max_ids: of all answers together."""

    def __init__(self, max_ids: int = MAX_IDS) -> None:
        self._max_ids = max_ids
        self._lock = threading.Lock()
        self._answers: OrderedDict[bytes, Said] = OrderedDict()
        self._held = 0

    def keep(self, keys: Iterable[bytes], said: Said) -> None:
        """Remember `said` under all `keys`."""
        with self._lock:
            for key in keys:
                self._drop(key)
                self._answers[key] = said
                self._held += len(said.ids) + _ENTRY_IDS
            while self._held > self._max_ids:
                self._drop(next(iter(self._answers)))

    def find(self, keys: Iterable[bytes], message: Message) -> Said | None:
        """The answer under the first of `keys` that is what `message` says."""
        with self._lock:
            for key in keys:
                said = self._answers.get(key)
                if said is not None and said.is_what(message):
                    self._answers.move_to_end(key)
                    return said
        return None

    def __len__(self) -> int:
        return len(self._answers)

    def _drop(self, key: bytes) -> None:
        if (said := self._answers.pop(key, None)) is not None:
            self._held -= len(said.ids) + _ENTRY_IDS


def keys(salt: bytes, before: str, content: str, call_ids: Sequence[str]) -> list[bytes]:
    """Where an answer is found. salt: of whoever asked, for nobody finds another's answers.

    before: the rendered prompt up to the answer.
    """
    by_call = [_key(salt, "call", one) for one in call_ids]
    return [*by_call, _key(salt, "text", before, content)]


def message_keys(salt: bytes, before: str, message: AssistantMessage | Message) -> list[bytes]:
    """The same of a message that a client sent."""
    call_ids = [call.id for call in message.tool_calls or ()]
    return keys(salt, before, message.content, call_ids)


def _key(salt: bytes, *parts: str) -> bytes:
    digest = hashlib.blake2b(salt, digest_size=16)
    for part in parts:
        raw = part.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.digest()


def _value(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments
