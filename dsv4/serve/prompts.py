"""A conversation becomes token ids: rendered by deepseek-recipe, answers as they were drawn.

What a client wrote is encoded as mere characters, so that no message can forge a turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from deepseek_recipe import Conversation, DeepseekV4Encoding, SpecialToken

from dsv4.formats.errors import RuntimeRefusal
from dsv4.runtime.text.tokenizer import Text
from dsv4.serve.replay import Memory, Said, message_keys

_ASSISTANT = SpecialToken.Assistant.default_str()
_EOS = SpecialToken.Eos.default_str()
THINK = SpecialToken.ThinkingStart.default_str()
THINK_END = SpecialToken.ThinkingEnd.default_str()


@dataclasses.dataclass(frozen=True)
class Prompt:
    """ids: of the whole prompt. before: its text up to the answer's mark, where an answer is new;
    None where an unfinished one is continued.
    """

    ids: list[int]
    before: str | None


def encode(conversation: Conversation, text: Text, memory: Memory, salt: bytes) -> Prompt:
    """Token ids of a conversation. Raises RuntimeRefusal where the tokenizer lacks a mark."""
    rendered = DeepseekV4Encoding().render_conversation(conversation)
    prompt, ranges = rendered.prompt, rendered.special_ranges
    marks = [prompt[begin:end] for begin, end in ranges]
    turns = _turns(marks)
    messages = [one for one in conversation.messages if one.role == "assistant"]
    ids: list[int] = []
    done = index = 0
    while index < len(ranges):
        begin, end = ranges[index]
        ids += text.encode_plain(prompt[done:begin]) if begin > done else []
        ids.append(_special_id(text, marks[index]))
        done = end
        turn = turns.get(index)
        if turn is not None and turn.number < len(messages):
            before = prompt[: ranges[index - 1][1]]
            message = messages[turn.number]
            said = memory.find(message_keys(salt, before, message), message)
            drawn = None if said is None else _drawn(said, marks[index], text)
            if drawn is not None:
                ids += drawn
                index, done = turn.end - 1, ranges[turn.end][0]
        index += 1
    ids += text.encode_plain(prompt[done:]) if done < len(prompt) else []
    fresh = len(marks) >= 2 and marks[-2] == _ASSISTANT and done == len(prompt)
    return Prompt(ids, prompt[: ranges[-2][1]] if fresh else None)


@dataclasses.dataclass(frozen=True)
class _Turn:
    """The number-th answer; end: index of the mark that ends it."""

    number: int
    end: int


def _turns(marks: Sequence[str]) -> dict[int, _Turn]:
    """Index of the mark after which an answer begins, <think> or </think> -> the answer."""
    turns: dict[int, _Turn] = {}
    begin: int | None = None
    for index, mark in enumerate(marks):
        if mark == _ASSISTANT and index + 1 < len(marks) and marks[index + 1] in (THINK, THINK_END):
            begin = index + 1
        elif mark == _EOS and begin is not None:
            turns[begin] = _Turn(len(turns), index)
            begin = None
    return turns


def _drawn(said: Said, mark: str, text: Text) -> Sequence[int] | None:
    """The ids that follow `mark`; None where the answer was not drawn after such a one."""
    if mark == THINK:
        return said.ids if said.thinking else None
    if not said.thinking:
        return said.ids
    end = text.token_id(THINK_END)
    if end is None or end not in said.ids:
        return None
    return said.ids[said.ids.index(end) + 1 :]


def _special_id(text: Text, spelling: str) -> int:
    token = text.token_id(spelling)
    if token is None:
        raise RuntimeRefusal(
            f"the tokenizer has no token {spelling}, expected DeepSeek-V4's special tokens; "
            "/v1/completions takes prompts as they are"
        )
    return token
