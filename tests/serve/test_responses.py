"""Responses, read by OpenAI's own client, and what Codex needs of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serve.conftest import PARAMETERS, TOOL_CALL, Script
from tests.support.serving import Live, events

TOOLS: Any = [{"type": "function", "name": "get_weather", "parameters": PARAMETERS}]


@pytest.fixture
def client(served: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as made:
        yield made


def test_an_answer_in_one_piece_and_as_a_stream(client: openai.OpenAI, script: Script) -> None:
    script.say("hm</think>Hello there.")
    reasoning: Any = {"effort": "low"}
    whole = client.responses.create(model="tiny", input="hi", reasoning=reasoning)
    assert whole.output_text == "Hello there." and whole.status == "completed"
    assert whole.usage and whole.usage.input_tokens_details.cached_tokens == 2
    assert whole.usage.output_tokens_details.reasoning_tokens > 0
    with client.responses.stream(model="tiny", input="hi", reasoning=reasoning) as stream:
        assert stream.get_final_response().output_text == "Hello there."


def test_what_codex_reads(served: Live, script: Script) -> None:
    script.say(f"I look.\n\n{TOOL_CALL}")
    raw = served.raw("/v1/responses", {"input": "hi", "tools": TOOLS})
    found: list[Any] = events(raw)
    assert "[DONE]" not in raw and all(name == data["type"] for name, data in found)
    names = [name for name, _ in found]
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] == "response.completed"
    assert [data["sequence_number"] for _, data in found] == list(range(len(found)))
    usage = found[-1][1]["response"]["usage"]
    counts = [usage[key] for key in ("input_tokens", "output_tokens", "total_tokens")]
    counts.append(usage["input_tokens_details"]["cached_tokens"])
    counts.append(usage["output_tokens_details"]["reasoning_tokens"])
    assert all(type(count) is int for count in counts) and counts[3] == 2


def test_a_tool_call_round_trip_without_reasoning(
    client: openai.OpenAI, served: Live, script: Script
) -> None:
    said = f"hmm</think>I look.\n\n{TOOL_CALL}"
    script.say(said, "ok</think>It rains.")
    tell: Any = {"model": "tiny", "tools": TOOLS, "reasoning": {"effort": "high"}}
    first = client.responses.create(input="weather?", **tell)
    call = first.output[-1]
    assert call.type == "function_call" and json.loads(call.arguments) == {
        "city": "Paris",
        "days": 3,
    }
    # As Codex does: all that is visible, nothing of the reasoning.
    visible = [item.model_dump(exclude_none=True) for item in first.output[1:]]
    history: Any = [
        {"role": "user", "content": "weather?"},
        *visible,
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    second = client.responses.create(input=history, **tell)
    assert second.output_text == "It rains."
    before, after = (list(job.ids) for job in served.engine.jobs)
    drawn = served.text.encode(said)
    assert after[: len(before) + len(drawn)] == before + drawn


def test_codexs_request(served: Live) -> None:
    body = {
        "model": "tiny",
        "instructions": "You code.",
        "input": [
            {"type": "message", "role": "developer", "content": [_text("rules")]},
            {"type": "tool_search_call", "id": "x"},
            {"type": "local_shell_call", "call_id": "y", "action": {"type": "exec"}},
            {"type": "message", "role": "user", "content": [_text("hi")]},
        ],
        "tools": [
            *TOOLS,
            {"type": "local_shell"},
            {"type": "web_search"},
            {"type": "tool_search"},
            {"type": "custom", "name": "apply_patch", "description": "d"},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k",
        "client_metadata": {"a": "b"},
        "text": {"verbosity": "low"},
    }
    done = served.post("/v1/responses", body)
    assert done.status_code == 200, done.text
    job = served.engine.jobs[0]
    # Codex takes a cut answer for a broken stream, and never says how long one may be.
    assert job.max_new_tokens == 4096 - len(job.ids)


def _text(text: str) -> dict[str, str]:
    return {"type": "input_text", "text": text}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("store", True),
        ("background", True),
        ("conversation", "c"),
        ("max_output_tokens", 0),
        ("temperature", 9),
        ("input", [{"type": "item_reference", "id": "x"}]),
        ("truncation", "auto"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(
    client: openai.OpenAI, field: str, value: Any
) -> None:
    body = {"model": "tiny", "input": "hi"} | {field: value}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/responses", body=body, cast_to=object)
    assert caught.value.param == field


def test_a_failure_in_the_middle_of_a_stream(served: Live, script: Script) -> None:
    script.failure = "the model's logits hold NaN"
    name, data = events(served.raw("/v1/responses", {"input": "hi"}))[-1]
    assert name == "response.failed" and isinstance(data, dict)
    response: Any = data["response"]
    assert response["status"] == "failed" and "NaN" in response["error"]["message"]
