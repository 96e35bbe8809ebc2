"""Messages, read by Anthropic's own client; what Claude Code sends; the order of events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.serve.conftest import PARAMETERS, TOOL_CALL, Script
from tests.support.serving import Live, events

TOOLS: Any = [{"name": "get_weather", "input_schema": PARAMETERS}]
ASK: Any = [{"role": "user", "content": "weather?"}]
THINK: Any = {"type": "enabled", "budget_tokens": 1024}


@pytest.fixture
def client(served: Live) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key="any", max_retries=0) as made:
        yield made


def test_thinking_text_and_usage(client: anthropic.Anthropic, script: Script) -> None:
    script.say("think hard</think>\n\nDone.")
    whole = client.messages.create(model="tiny", max_tokens=2048, messages=ASK, thinking=THINK)
    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert whole.stop_reason == "end_turn" and whole.usage.cache_read_input_tokens == 2
    with client.messages.stream(
        model="tiny", max_tokens=2048, messages=ASK, thinking=THINK
    ) as stream:
        streamed = stream.get_final_message()
    assert [block.type for block in streamed.content] == ["thinking", "text"]
    assert streamed.usage.input_tokens == whole.usage.input_tokens
    assert streamed.usage.output_tokens == whole.usage.output_tokens > 0


def test_a_tool_call_round_trip(client: anthropic.Anthropic, served: Live, script: Script) -> None:
    script.say(f"hmm</think>I look.\n\n{TOOL_CALL}", "ok</think>It rains.")
    tell: Any = {"model": "tiny", "max_tokens": 2048, "thinking": THINK, "tools": TOOLS}
    with client.messages.stream(messages=ASK, **tell) as stream:
        first = stream.get_final_message()
    call = first.content[-1]
    assert call.type == "tool_use" and call.input == {"city": "Paris", "days": 3}
    assert first.stop_reason == "tool_use"
    # A client that lost the reasoning, and whose user speaks before the result of the call.
    kept = [block.model_dump() for block in first.content if block.type != "thinking"]
    results: Any = [
        {"type": "text", "text": "and?"},
        {"type": "tool_result", "tool_use_id": call.id, "content": "gone", "is_error": True},
    ]
    history: Any = [
        *ASK,
        {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}, *kept]},
        {"role": "user", "content": results},
    ]
    second = client.messages.create(messages=history, **tell)
    assert second.content[-1].type == "text" and second.content[-1].text == "It rains."
    before, after = (list(job.ids) for job in served.engine.jobs)
    drawn = served.text.encode(f"hmm</think>I look.\n\n{TOOL_CALL}")
    assert after[: len(before) + len(drawn)] == before + drawn  # the reasoning is back
    assert "Error: gone" in served.text.decode(after)


def test_the_order_of_events(served: Live, script: Script) -> None:
    script.say(f"I look.\n\n{TOOL_CALL}")
    body = {"model": "tiny", "max_tokens": 500, "messages": ASK, "tools": TOOLS}
    found = events(served.raw("/v1/messages", body | {"thinking": {"type": "disabled"}}))
    assert all(isinstance(data, dict) and name == data["type"] for name, data in found)
    kinds = [name for name, _ in found if name not in ("ping", "content_block_delta")]
    block = ["content_block_start", "content_block_stop"]
    assert kinds == ["message_start", *block, *block, "message_delta", "message_stop"]
    start = found[0][1]
    assert isinstance(start, dict)
    message: Any = start["message"]
    assert message["type"] == "message" and message["role"] == "assistant"
    assert message["content"] == [] and message["stop_reason"] is None
    assert message["usage"]["cache_read_input_tokens"] == 2


def test_an_empty_answer_has_a_block(client: anthropic.Anthropic, script: Script) -> None:
    script.say("")
    assert [
        block.type
        for block in client.messages.create(model="tiny", max_tokens=5, messages=ASK).content
    ] == ["text"]
    with client.messages.stream(model="tiny", max_tokens=5, messages=ASK) as stream:
        assert [block.type for block in stream.get_final_message().content] == ["text"]


def test_why_an_answer_stopped(client: anthropic.Anthropic, script: Script) -> None:
    script.say("one two three four")
    cut = client.messages.create(model="tiny", max_tokens=1, messages=ASK)
    assert cut.stop_reason == "max_tokens"
    stopped = client.messages.create(
        model="tiny", max_tokens=50, messages=ASK, stop_sequences=["three"]
    )
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == "three"


def test_tokens_are_counted_as_they_are_read(client: anthropic.Anthropic, served: Live) -> None:
    counted = client.messages.count_tokens(model="tiny", messages=ASK, system="S", tools=TOOLS)
    client.messages.create(model="tiny", max_tokens=5, messages=ASK, system="S", tools=TOOLS)
    assert counted.input_tokens == len(served.engine.jobs[0].ids)


def test_claude_codes_request(served: Live) -> None:
    body = {
        "model": "tiny[1m]",
        "max_tokens": 32000,
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=ab12c;"},
            {"type": "text", "text": "You help.", "cache_control": {"type": "ephemeral"}},
        ],
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}],
            }
        ],
        "metadata": {"user_id": "u"},
        "context_management": {"edits": []},
        "output_config": {"effort": "low"},
        "thinking": {"type": "adaptive"},
        "tools": TOOLS,
        "stream": True,
    }
    headers = {"anthropic-beta": "future-2030-01-01,x", "anthropic-version": "2023-06-01"}
    done = served.post("/v1/messages?beta=true", body, **headers)
    assert done.status_code == 200, done.text
    prompt = served.text.decode(served.engine.jobs[0].ids)
    assert "billing" not in prompt and "You help." in prompt
    # 32,000 tokens do not fit: the room that there is counts.
    assert served.engine.jobs[0].max_new_tokens == 4096 - len(served.engine.jobs[0].ids)
    body |= {"stream": False}
    assert served.post("/v1/messages/count_tokens?beta=true", body).json()["input_tokens"] > 0


def test_errors_are_what_the_client_raises(client: anthropic.Anthropic, script: Script) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="other", max_tokens=5, messages=ASK)
    assert missing.value.body == {
        "type": "error",
        "error": {
            "type": "not_found_error",
            "message": "model: the model 'other' does not exist here, expected tiny",
        },
    }
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.post("/v1/messages", body={"messages": ASK}, cast_to=object)
    script.failure = "the model's logits hold NaN"
    with (
        pytest.raises(anthropic.APIStatusError, match="NaN"),
        client.messages.stream(model="tiny", max_tokens=5, messages=ASK) as stream,
    ):
        stream.get_final_message()


def test_the_reasoning_has_a_budget(client: anthropic.Anthropic, served: Live) -> None:
    budget: Any = {"type": "enabled", "budget_tokens": 1}
    answer = client.messages.create(model="tiny", max_tokens=30, messages=ASK, thinking=budget)
    assert [block.type for block in answer.content] == ["thinking", "text"]
    think_end = served.text.token_id("</think>")
    assert [allowed for _, allowed in served.engine.swerved] == [think_end]


def test_models(client: anthropic.Anthropic) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


@pytest.mark.parametrize(
    "field",
    [
        {"stop": ["x"]},
        {"response_format": {"type": "json_object"}},
        {"n": 2},
        {"guided_json": {}},
        {"stop_token_ids": [5]},
    ],
    ids=str,
)
def test_a_field_of_another_interface_is_refused_by_name(
    served: Live, field: dict[str, Any]
) -> None:
    body = {"model": "tiny", "max_tokens": 5, "messages": ASK}
    answer = served.client.post(f"{served.url}/v1/messages", json=body | field)
    assert answer.status_code == 400
    assert next(iter(field)) in answer.json()["error"]["message"]
    assert served.client.post(f"{served.url}/v1/messages", json=body).status_code == 200
