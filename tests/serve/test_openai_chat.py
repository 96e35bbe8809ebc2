"""Chat completions, read by OpenAI's own client, and the bytes that other clients stumbled over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serve.conftest import PARAMETERS, TOOL_CALL, Script
from tests.support.serving import Live, events

TOOLS: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]
ASK: Any = [{"role": "user", "content": "weather?"}]


@pytest.fixture
def client(served: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as made:
        yield made


def chunks(served: Live, **fields: Any) -> list[dict[str, Any]]:
    raw = served.raw("/v1/chat/completions", {"model": "tiny", "messages": ASK} | fields)
    assert raw.endswith("data: [DONE]\n\n")
    return [data for _, data in events(raw) if isinstance(data, dict)]


def test_an_answer_in_one_piece_and_as_a_stream(client: openai.OpenAI, script: Script) -> None:
    script.say("Hello there.")
    whole = client.chat.completions.create(model="tiny", messages=ASK)
    assert whole.choices[0].message.content == "Hello there."
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None and whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens == 2
    with client.chat.completions.stream(model="tiny", messages=ASK) as stream:
        assert stream.get_final_completion().choices[0].message.content == "Hello there."


def test_reasoning_comes_apart_and_under_both_names(client: openai.OpenAI, script: Script) -> None:
    script.say("think hard</think>\n\nDone.")
    thinking: Any = {"thinking": {"type": "enabled"}}
    stream = client.chat.completions.create(
        model="tiny", messages=ASK, stream=True, extra_body=thinking
    )
    deltas = [chunk.choices[0].delta.model_dump() for chunk in stream]
    assert "".join(d.get("reasoning_content") or "" for d in deltas) == "think hard"
    assert [d.get("reasoning") for d in deltas] == [d.get("reasoning_content") for d in deltas]
    assert "".join(d.get("content") or "" for d in deltas) == "Done."
    whole = client.chat.completions.create(model="tiny", messages=ASK, extra_body=thinking)
    message = whole.choices[0].message.model_dump()
    assert message["reasoning"] == message["reasoning_content"] == "think hard"
    assert whole.usage is not None and whole.usage.completion_tokens_details is not None
    assert whole.usage.completion_tokens_details.reasoning_tokens == 3


def test_a_tool_call_round_trip(client: openai.OpenAI, served: Live, script: Script) -> None:
    script.say(f"I look.\n\n{TOOL_CALL}", "It rains.")
    with client.chat.completions.stream(model="tiny", messages=ASK, tools=TOOLS) as stream:
        first = stream.get_final_completion().choices[0]
    assert first.finish_reason == "tool_calls" and first.message.tool_calls
    call = first.message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Paris", "days": 3}
    history: Any = [
        *ASK,
        first.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    second = client.chat.completions.create(model="tiny", messages=history, tools=TOOLS)
    assert second.choices[0].message.content == "It rains."
    drawn = served.text.encode(f"I look.\n\n{TOOL_CALL}")
    before, after = list(served.engine.jobs[0].ids), list(served.engine.jobs[1].ids)
    # The next prompt goes on with the very ids that were drawn: a prefix of a cache fits.
    assert after[: len(before) + len(drawn)] == before + drawn


def test_names_and_ids_come_once_and_indices_always(served: Live, script: Script) -> None:
    script.say(TOOL_CALL)
    calls = [
        call
        for chunk in chunks(served, tools=TOOLS)
        for call in chunk["choices"][0]["delta"].get("tool_calls") or ()
    ]
    assert [("id" in call, "name" in call["function"]) for call in calls] == [
        (True, True),
        *[(False, False)] * (len(calls) - 1),
    ]
    assert {call["index"] for call in calls} == {0} and len(calls) > 3


def test_usage_comes_once_and_only_when_asked_for(served: Live) -> None:
    quiet = chunks(served)
    assert all("usage" not in chunk for chunk in quiet)
    told = chunks(served, stream_options={"include_usage": True})
    assert [chunk["choices"] for chunk in told if chunk["usage"]] == [[]]
    assert told[-1]["usage"]["total_tokens"] == sum(
        told[-1]["usage"][key] for key in ("prompt_tokens", "completion_tokens")
    )
    assert all(isinstance(chunk["choices"], list) for chunk in told)
    roles = [c["choices"][0]["delta"].get("role") for c in quiet]
    assert roles[0] == "assistant" and set(roles[1:]) == {None}


def test_every_cut_of_the_stream_is_the_whole_answer(served: Live, script: Script) -> None:
    script.say(f"Höre 世界 <b>.\n\n{TOOL_CALL}")
    streamed = chunks(served, tools=TOOLS)
    said = "".join(c["choices"][0]["delta"].get("content") or "" for c in streamed)
    whole = served.post(
        "/v1/chat/completions", {"model": "tiny", "messages": ASK, "tools": TOOLS}
    ).json()
    assert said == whole["choices"][0]["message"]["content"] == "Höre 世界 <b>."


def test_logprobs_and_several_choices(client: openai.OpenAI, served: Live, script: Script) -> None:
    script.say("one", "two")
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, n=2, logprobs=True, top_logprobs=2, seed=7
    )
    assert sorted(choice.message.content or "" for choice in answer.choices) == ["one", "two"]
    assert [choice.index for choice in answer.choices] == [0, 1]
    content = answer.choices[0].logprobs and answer.choices[0].logprobs.content
    assert content and len(content[0].top_logprobs) == 2
    assert content[0].logprob == content[0].top_logprobs[0].logprob
    seeds = [job.sampler.seed for job in served.engine.jobs]
    assert seeds == [7, 8]


def test_stop_strings_end_the_job_too(client: openai.OpenAI, served: Live, script: Script) -> None:
    script.say("one two three four five")
    served.engine.step = 0.01
    answer = client.chat.completions.create(model="tiny", messages=ASK, stop=["three"])
    assert answer.choices[0].message.content == "one two "
    assert answer.choices[0].finish_reason == "stop"
    assert served.engine.cancels.get(timeout=5) is served.engine.jobs[0]


def test_what_clients_send_in_other_words(served: Live) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "hmm",
            "tool_calls": [
                {
                    "id": "c",
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": {"city": "Rome"}},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "sun"},
    ]
    body = {
        "messages": messages,
        "tools": TOOLS,
        "max_completion_tokens": 5,
        "chat_template_kwargs": {"thinking": True},
        "repetition_penalty": 1.0,
        "stop": None,
        "ignore_eos": True,
        "min_tokens": 1,
        "parallel_tool_calls": True,
        "unknown_field": {"a": 1},
    }
    assert served.post("/v1/chat/completions", body).status_code == 200
    job = served.engine.jobs[0]
    prompt = served.text.decode(job.ids, show_special=True)
    assert "Be brief." in prompt and "<think>hmm</think>" in prompt and ">Rome</" in prompt
    assert prompt.endswith("<think>") and job.max_new_tokens == 5 and not job.stop_ids


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 3),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_k", -2),
        ("min_p", 2),
        ("presence_penalty", 5),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("n", 9),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("max_tokens", 0),
        ("top_logprobs", 2),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": -100.5}),
        ("logit_bias", {"5": True}),
        ("logit_bias", [5]),
        ("logit_bias", {"x": -100}),
        ("best_of", 2),
        ("guided_json", {}),
        ("suffix", "x"),
        ("stop_token_ids", [5]),
        ("tool_choice", "required"),
        ("messages", "hi"),
        ("stream_options", 1),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(
    client: openai.OpenAI, field: str, value: Any
) -> None:
    body = {"model": "tiny", "messages": ASK} | {field: value}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    assert caught.value.param == field, caught.value.message


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": ASK}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/messages", {"messages": ASK, "max_tokens": 5}),
    ],
)
def test_biases_reach_the_draw(served: Live, path: str, body: dict[str, Any]) -> None:
    """Wherever they are said; -100 is a ban, which nothing outweighs."""
    bias = {"5": 3, "7": -100, "9": -99.5, "11": 0, "12": 100}
    assert served.post(path, body | {"logit_bias": bias}).status_code == 200
    job = served.engine.jobs[-1]
    assert job.sampler.bias == {5: 3.0, 9: -99.5, 12: 100.0}
    assert job.constraint is not None
    mask = job.constraint.mask()
    assert mask is not None and (~mask).nonzero().flatten().tolist() == [7]


def test_neutral_values_pass(served: Live) -> None:
    body = {
        "messages": ASK,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "n": 1,
        "best_of": 1,
        "suffix": None,
        "top_k": -1,
        "min_p": 0,
        "use_beam_search": False,
        "skip_special_tokens": True,
        "seed": None,
    }
    assert served.post("/v1/chat/completions", body).status_code == 200


def test_errors_are_what_the_client_raises(client: openai.OpenAI, served: Live) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=ASK)
    assert missing.value.code == "model_not_found"
    long: Any = [{"role": "user", "content": "word " * 5000}]
    with pytest.raises(openai.BadRequestError) as full:
        client.chat.completions.create(model="tiny", messages=long)
    assert full.value.code == "context_length_exceeded" and "4096" in full.value.message
    served.engine.most = 0
    with pytest.raises(openai.RateLimitError) as busy:
        client.chat.completions.create(model="tiny", messages=ASK)
    assert busy.value.response.headers["retry-after"] == "1"


def test_a_failure_in_the_middle_of_a_stream(client: openai.OpenAI, script: Script) -> None:
    script.failure = "the model's logits hold NaN"
    stream = client.chat.completions.create(model="tiny", messages=ASK, stream=True)
    with pytest.raises(openai.APIError, match="NaN"):
        list(stream)
    with pytest.raises(openai.InternalServerError) as whole:
        client.chat.completions.create(model="tiny", messages=ASK)
    # A library would pay for the prompt twice more.
    assert whole.value.response.headers["x-should-retry"] == "false"


def test_sampling_is_the_checkpoints_unless_asked_for(served: Live) -> None:
    for fields in ({}, {"temperature": 0}, {"temperature": 0.5, "top_k": 4, "min_p": 0.1}):
        served.post("/v1/chat/completions", {"messages": ASK} | fields)
    drawn = [(j.sampler.temperature, j.sampler.top_k, j.sampler.min_p) for j in served.engine.jobs]
    assert drawn == [(1.0, None, 0.0), (0.0, None, 0.0), (0.5, 4, 0.1)]
