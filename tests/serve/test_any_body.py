"""Whatever JSON comes, the answer is an answer or a refusal, never a fault of the server's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dsv4.runtime.text.tokenizer import Text
from dsv4.serve.knobs import NEUTRAL
from tests.serve.conftest import PARAMETERS, Script
from tests.support.serving import Live, ScriptedEngine, live

VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}]},
}
FIELDS = sorted(
    {
        *NEUTRAL,
        *("messages", "prompt", "input", "model", "max_tokens", "max_completion_tokens", "stream"),
        *("temperature", "top_p", "top_k", "min_p", "n", "stop", "seed", "logprobs", "echo"),
        *("top_logprobs", "logit_bias", "response_format", "tools", "tool_choice", "thinking"),
        *("reasoning", "reasoning_effort", "chat_template_kwargs", "stream_options", "system"),
        *("stop_sequences", "output_config", "text", "instructions", "include", "metadata"),
        *("parallel_tool_calls", "max_output_tokens", "ignore_eos", "min_tokens", "store"),
    }
)
WORDS = st.sampled_from(
    [
        "user",
        "assistant",
        "tool",
        "text",
        "function",
        "json_schema",
        "auto",
        "",
        "\ud800",
        "enabled",
    ]
)
KEYS = st.sampled_from(
    ["role", "content", "type", "text", "name", "tools", "schema", "json_schema", "function", "id"]
)
ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=5)
VALUES = st.recursive(
    ATOMS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4)
)


@pytest.fixture(scope="module")
def anything(text: Text) -> Iterator[Live]:
    with live(ScriptedEngine(Script(text))) as running:
        yield running


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    path=st.sampled_from(sorted(VALID)),
    fields=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3),
    whole=st.booleans(),
)
@example("/v1/chat/completions", {"tools": [{"type": "function", "function": PARAMETERS}]}, True)
@example("/v1/chat/completions", {"tool_choice": {"type": "allowed_tools"}, "tools": [{}]}, True)
@example("/v1/messages", {"system": [None, {"text": 5}]}, True)
@example("/v1/messages", {"messages": [{"role": "user", "content": [None, 5]}]}, True)
@example("/v1/responses", {"input": [{"type": "function_call", "arguments": None}]}, True)
def test_any_json(anything: Live, path: str, fields: dict[str, Any], whole: bool) -> None:
    body = (VALID[path] if whole else {}) | fields
    answer = anything.client.post(anything.url + path, content=json.dumps(body).encode())
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"temperature": 10**400}),
        ("/v1/completions", {"logit_bias": {"9" * 5000: -100}}),
        (
            "/v1/completions",
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"const": "\ud800"}},
                }
            },
        ),
        (
            "/v1/chat/completions",
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": 5}},
        ),
        (
            "/v1/responses",
            {
                "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
                "tool_choice": {"type": "allowed_tools", "allowed_tools": "x"},
            },
        ),
        ("/v1/completions", {"prompt": ["a"] * 65, "max_tokens": 3}),
        ("/v1/completions", {"x": [[]] * 500_001}),
        ("/v1/completions", {"x": {str(name): 0 for name in range(500_001)}}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_once_a_fault_now_a_refusal(anything: Live, path: str, fields: dict[str, Any]) -> None:
    content = json.dumps(VALID[path] | fields, separators=(",", ":")).encode()
    answer = anything.client.post(anything.url + path, content=content)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]
