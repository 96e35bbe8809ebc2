"""What was said is found again by its calls or by what came before it, and by nobody else."""

from __future__ import annotations

from array import array

import pytest
from deepseek_recipe import (
    AssistantMessage,
    Conversation,
    Message,
    ToolCall,
    ToolDefinition,
    UserMessage,
)

from dsv4.runtime.text.chat import Template, Turn
from dsv4.runtime.text.tokenizer import Text
from dsv4.serve.prompts import encode
from dsv4.serve.replay import Call, Memory, Said, keys, message_keys

SALT = b"me"


def said(ids: list[int], content: str = "a", reasoning: str = "r", *calls: Call) -> Said:
    return Said(content, reasoning, calls, array("i", ids), thinking=True)


def test_what_is_not_used_for_the_longest_time_goes_first() -> None:
    memory = Memory(max_ids=3 * 164)  # three answers of 100 ids
    names = [keys(SALT, "before", str(number), []) for number in range(4)]
    messages = [AssistantMessage(str(number)) for number in range(4)]
    for number in range(3):
        memory.keep(names[number], said([1] * 100, str(number)))
    assert memory.find(names[0], messages[0]) is not None  # used: stays
    memory.keep(names[3], said([1] * 100, "3"))
    found = [memory.find(name, one) is not None for name, one in zip(names, messages, strict=True)]
    assert found == [True, False, True, True] and len(memory) == 3


@pytest.mark.parametrize(
    ("sent", "same"),
    [
        (AssistantMessage("a", "r", [ToolCall("c", "f", '{"x": 1.50}')]), True),
        (AssistantMessage("a", "r", [ToolCall("c", "f", '{ "x":1.5 }')]), True),
        (AssistantMessage("a", None, [ToolCall("c", "f", '{"x": 1.5}')]), True),
        (AssistantMessage("a", "else", [ToolCall("c", "f", '{"x": 1.5}')]), False),
        (AssistantMessage("b", "r", [ToolCall("c", "f", '{"x": 1.5}')]), False),
        (AssistantMessage("a", "r", [ToolCall("c", "f", '{"x": 2}')]), False),
        (AssistantMessage("a", "r", [ToolCall("c", "g", '{"x": 1.5}')]), False),
        (AssistantMessage("a", "r"), False),
    ],
)
def test_only_what_was_said_is_replaced(sent: Message, same: bool) -> None:
    memory = Memory()
    one = said([5], "a", "r", Call("f", '{"x": 1.5}'))
    memory.keep(keys(SALT, "before", "a", ["c"]), one)
    assert (memory.find(message_keys(SALT, "other", sent), sent) is not None) == (
        same and bool(sent.tool_calls)
    )
    assert memory.find(message_keys(b"else", "before", sent), sent) is None


@pytest.mark.parametrize("thinking", [True, False])
def test_a_prompt_without_memories_is_the_templates(text: Text, thinking: bool) -> None:
    """`runtime.text.chat.Template` encodes the same conversation on its own."""
    turns = [Turn("hi <think> there", "Yes.\n", "hm"), Turn("more")]
    messages = [
        UserMessage("hi <think> there"),
        AssistantMessage("Yes.\n", "hm"),
        UserMessage("more"),
    ]
    conversation = Conversation(messages, thinking_mode=thinking, reasoning_effort="low")
    prompt = encode(conversation, text, Memory(), SALT)
    assert prompt.ids == Template(thinking=thinking).encode(turns, text)
    assert prompt.before is not None and prompt.before.endswith("<｜User｜>more<｜Assistant｜>")


def test_reasoning_that_was_lost_comes_back_where_the_template_keeps_it(text: Text) -> None:
    drawn = text.encode("  hm hm</think>\n\nYes.")
    question = [UserMessage("hi")]
    tools = [ToolDefinition("f", "d", {"type": "object"})]
    for kept in (tools, []):
        first = encode(Conversation(question, tools=kept), text, (memory := Memory()), SALT)
        assert first.before is not None
        one = Said("Yes.", "hm hm", (), array("i", drawn), thinking=True)
        memory.keep(keys(SALT, first.before, "Yes.", []), one)
        later = [*question, AssistantMessage("Yes.", ""), UserMessage("more")]
        second = encode(Conversation(later, tools=kept), text, memory, SALT)
        shown = text.decode(second.ids, show_special=True)
        if kept:
            assert second.ids[: len(first.ids) + len(drawn)] == first.ids + drawn
        else:  # without tools the template drops the reasoning of earlier turns
            assert "hm hm" not in shown and "</think>\n\nYes.<" in shown


def test_an_answer_that_is_continued_is_not_a_new_one(text: Text) -> None:
    messages = [UserMessage("hi"), AssistantMessage("The ", None, None, True)]
    prompt = encode(Conversation(messages, thinking_mode=False), text, Memory(), SALT)
    assert prompt.before is None
    assert text.decode(prompt.ids, show_special=True).endswith("</think>The ")
