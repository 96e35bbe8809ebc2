"""Answers by a schema and calls by the tools' grammar, judged by jsonschema-rs and by json."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest
from deepseek_recipe import ToolDefinition
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.runtime.text.tokenizer import Text
from dsv4.serve.grammars import Grammars, calls_rule
from dsv4.serve.steering import Course
from tests.serve.conftest import PARAMETERS, TOOL_CALL, Script
from tests.support.serving import EOS, TOKENIZER, VOCAB, Live

ASK: Any = [{"role": "user", "content": "weather as json?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]
FORMAT = {"type": "json_schema", "json_schema": {"name": "w", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def grammars(text: Text) -> Grammars:
    return Grammars(TOKENIZER.read_bytes(), text, VOCAB, [EOS])


def ask(served: Live, **fields: Any) -> dict[str, Any]:
    body = {"messages": ASK} | fields
    answer = served.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def test_a_schema_holds_whatever_the_model_wants(served: Live, script: Script) -> None:
    script.say('{"city": "Berlin", "days": 2} and more')
    choice = ask(served, response_format=FORMAT, max_tokens=300)
    assert served.engine.swerved  # the script wanted something else
    jsonschema_rs.validate(SCHEMA, json.loads(choice["message"]["content"]))
    assert choice["finish_reason"] == "stop"


def test_it_begins_after_the_reasoning(served: Live, script: Script) -> None:
    script.say('not {json} at all</think>{"city": "Rome", "days": 2}')
    choice = ask(served, response_format=FORMAT, thinking={"type": "enabled"})
    assert choice["message"]["reasoning_content"] == "not {json} at all"
    assert json.loads(choice["message"]["content"]) == {"city": "Rome", "days": 2}
    assert not served.engine.swerved


@pytest.mark.parametrize(
    "pattern", [{"type": "strin"}, {"type": "string", "pattern": "(((("}, {"not": {"type": "null"}}]
)
def test_a_schema_that_is_none_is_refused(served: Live, pattern: dict[str, str]) -> None:
    schema = {"type": "object", "properties": {"a": pattern}}
    asked = {"type": "json_schema", "json_schema": {"name": "w", "schema": schema}}
    body = {"messages": ASK, "response_format": asked}
    answer = served.post("/v1/chat/completions", body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert "response_format" in f"{error['param']} {error['message']}", error


def test_a_call_that_begins_cannot_go_wrong(served: Live, script: Script) -> None:
    broken = TOOL_CALL.replace(">3<", ">True<").replace('name="days"', 'name="dayz"')
    script.say(f"Look.\n\n{broken} and more")
    choice = ask(served, tools=TOOLS, max_tokens=400)
    assert served.engine.swerved
    for call in choice["message"]["tool_calls"]:
        assert call["function"]["name"] == "get_weather"
        assert json.loads(call["function"]["arguments"]).keys() <= {"city", "days"}


@pytest.mark.parametrize("thinking", ["enabled", "disabled"])
def test_a_call_can_be_forced(served: Live, script: Script, thinking: str) -> None:
    reasoning = "no tool</think>" if thinking == "enabled" else ""
    script.say(f"{reasoning}I would rather talk.")
    choice = ask(
        served,
        tools=[*TOOLS, {"type": "function", "function": {"name": "other"}}],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        thinking={"type": thinking},
        max_tokens=400,
    )
    names = [call["function"]["name"] for call in choice["message"]["tool_calls"]]
    assert names == ["get_weather"] and choice["finish_reason"] == "tool_calls"


def test_one_call_where_several_are_not_wanted(served: Live, script: Script) -> None:
    invoke = TOOL_CALL.split("tool_calls>\n")[1].rpartition("</｜DSML｜tool")[0]
    script.say(TOOL_CALL.replace(invoke, invoke + invoke))
    assert len(ask(served, tools=TOOLS)["message"]["tool_calls"]) == 2
    alone = ask(served, tools=TOOLS, parallel_tool_calls=False)
    assert len(alone["message"]["tool_calls"]) == 1


def test_a_call_inside_the_reasoning_is_a_call(served: Live, script: Script) -> None:
    script.say(f"I look.\n\n{TOOL_CALL}")
    choice = ask(served, tools=TOOLS, thinking={"type": "enabled"})
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])["days"] == 3
    assert not served.engine.swerved


def test_dsml_is_text_without_tools(served: Live, script: Script) -> None:
    script.say("No call.")
    choice = ask(served, tools=TOOLS, tool_choice="none")
    assert "tool_calls" not in choice["message"] and served.engine.jobs[0].constraint is None


VALUES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=40, deadline=None)
@given(
    city=VALUES | st.sampled_from(["a</b>", "2>&1", "</", "<｜DSML｜", "\n</｜DSML｜parameter>"])
)
def test_every_text_is_a_value_and_no_text_a_tag(grammars: Grammars, text: Text, city: str) -> None:
    dsml = grammars.dsml
    assert dsml is not None
    tool = ToolDefinition("get_weather", None, PARAMETERS)
    rules = calls_rule("calls", [tool], dsml, several=True, after_mark=True)
    course = Course(
        VOCAB, False, calls=grammars.compile("start: calls\n" + rules, "tools"), dsml=dsml
    )
    steering = course.steer(text)
    head, tail = TOOL_CALL.split("Paris")
    # The value as mere characters, however it is spelled; the tags with their marks.
    for token in [*text.encode(head), *text.encode_plain(city), *text.encode(tail)]:
        mask = steering.mask()
        assert mask is None or bool(mask[token]), text.decode([token], show_special=True)
        steering.took(token)
    assert steering.ended


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('string="false">3', 'string="false">three'),
        ('string="false">3', ">3"),
        ("get_weather", "get_wether"),
        ("</｜DSML｜invoke>", "</｜DSML｜invok>"),
        ("parameter name", "parameter  name"),
    ],
)
def test_what_would_be_no_call_cannot_be_drawn(
    grammars: Grammars, text: Text, before: str, after: str
) -> None:
    dsml = grammars.dsml
    assert dsml is not None
    tool = ToolDefinition("get_weather", None, PARAMETERS)
    rules = calls_rule("calls", [tool], dsml, several=True, after_mark=True)
    course = Course(
        VOCAB, False, calls=grammars.compile("start: calls\n" + rules, "tools"), dsml=dsml
    )
    steering = course.steer(text)
    for token in text.encode(TOOL_CALL.replace(before, after)):
        mask = steering.mask()
        if mask is not None and not bool(mask[token]):
            return
        steering.took(token)
    pytest.fail("a broken call passed")
