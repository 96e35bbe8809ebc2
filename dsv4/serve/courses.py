"""What a request's tools and format mean for the tokens of its answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from deepseek_recipe import ToolDefinition

from dsv4.serve.face import Read
from dsv4.serve.grammars import Grammar, Grammars, calls_rule, json_rule
from dsv4.serve.model import ServedModel
from dsv4.serve.prompts import THINK_END
from dsv4.serve.refusal import Refusal, invalid
from dsv4.serve.steering import Course


def course_of(read: Read, model: ServedModel) -> Course:
    """Where the answer may go. Raises Refusal 400 for a schema that cannot be a grammar."""
    request = read.request
    parsing, asked = request.parsing_options, request.inference_options.output_constraint
    stage = parsing.thinking_initial_stage
    thinking = stage is not None and stage.starts_in_reasoning()
    tools = _tools(read)
    body = _format(asked.kind, asked.schema) if asked is not None else None
    think_end = model.text.token_id(THINK_END)
    budget = read.budget if thinking else None
    if body is None and not tools:
        return Course(model.vocab, thinking, think_end, budget=budget)
    grammars = model.grammars
    dsml = grammars.dsml
    if tools and dsml is None:
        raise invalid("tools", "this model's tokenizer has no mark for tool calls")
    answer = calls = None
    several = read.tools.several
    if body is not None and not tools:
        answer = grammars.compile("start: document\n" + body, "response_format")
    elif tools and dsml is not None and (body is not None or read.tools.must):
        start = "start: calls\n" if body is None or read.tools.must else "start: document | calls\n"
        rest = body if body is not None and not read.tools.must else ""
        answer = _calls(grammars, start + rest, tools, dsml, several=several, after_mark=False)
    elif tools and dsml is not None:
        calls = _calls(grammars, "start: calls\n", tools, dsml, several=several, after_mark=True)
    return Course(model.vocab, thinking, think_end, answer, calls, dsml, budget)


def answer_grammar(response_format: Any, model: ServedModel) -> Grammar | None:
    """Of a completion's `response_format`; None for free text. Raises Refusal 400."""
    if response_format is None or response_format == {"type": "text"}:
        return None
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    schema = ""
    if kind == "json_schema":
        inner = response_format.get("json_schema")
        if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
            raise invalid("response_format", "response_format has no json_schema.schema")
        schema = json.dumps(inner["schema"], ensure_ascii=False)
    elif kind != "json_object":
        raise invalid(
            "response_format", "response_format is not of type text, json_object or json_schema"
        )
    start = "start: document\n" + json_rule("document", schema)
    return model.grammars.compile(start, "response_format")


def _tools(read: Read) -> list[ToolDefinition]:
    conversation, only = read.request.conversation, read.tools.only
    if conversation.tool_choice == "none":
        return []
    tools = [tool for tool in conversation.tools if only is None or tool.name in only]
    if only is not None and len(tools) < len(only):
        missing = sorted(only - {tool.name for tool in tools})
        raise invalid("tool_choice", f"tool_choice names {missing[0]!r}, which is not in tools")
    return tools


def _format(kind: str, schema: str) -> str | None:
    if kind == "json":
        return json_rule("document", schema)
    if kind == "regex":
        raise invalid("response_format", "an answer by a regular expression is not supported")
    return None


def _calls(
    grammars: Grammars,
    start: str,
    tools: Sequence[ToolDefinition],
    dsml: int,
    *,
    several: bool,
    after_mark: bool,
) -> Grammar:
    """Calls of `tools`; their parameters are free where a schema is beyond the grammar's means."""
    rules = calls_rule("calls", tools, dsml, several=several, after_mark=after_mark)
    try:
        return grammars.compile(start + rules, "tools")
    except Refusal:
        plain = [ToolDefinition(tool.name) for tool in tools]
        rules = calls_rule("calls", plain, dsml, several=several, after_mark=after_mark)
        return grammars.compile(start + rules, "tools")
