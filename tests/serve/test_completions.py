"""Completions as OpenAI's client and lm-eval read them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serve.conftest import Script
from tests.support.serving import Live, events


@pytest.fixture
def client(served: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as made:
        yield made


def test_text_ids_and_lists_of_both(client: openai.OpenAI, served: Live) -> None:
    ids = served.text.encode("def f")
    prompts: list[Any] = ["def f", ids, ["def f", "x"], [ids, ids[:1]]]
    for prompt in prompts:
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=50, n=2)
        several = 2 if prompt in prompts[:2] else 4
        assert [choice.index for choice in answer.choices] == list(range(several))
        assert {choice.text for choice in answer.choices} == {"Hello."}
    assert all(list(job.ids) == ids for job in served.engine.jobs[:6])


def test_a_stream_is_the_whole(client: openai.OpenAI, served: Live, script: Script) -> None:
    script.say("Höre 世界.")
    body = {"model": "tiny", "prompt": "x", "max_tokens": 50}
    stream = client.completions.create(model="tiny", prompt="x", max_tokens=50, stream=True)
    assert "".join(part.choices[0].text for part in stream) == "Höre 世界."
    raw = served.raw("/v1/completions", body | {"stream_options": {"include_usage": True}})
    found: list[Any] = events(raw)
    assert found[-1][1] == "[DONE]" and found[-2][1]["choices"] == []
    assert found[-2][1]["usage"]["completion_tokens"] == len(served.text.encode("Höre 世界."))


def test_what_lm_eval_asks_and_reads(served: Live) -> None:
    context, continuation = served.text.encode("def f"), served.text.encode("(x):")
    body = {
        "model": "tiny",
        "prompt": [context + continuation],
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    choice = served.post("/v1/completions", body).json()["choices"][0]
    logprobs = choice["logprobs"]
    # lm_eval/models/openai_completions.py, parse_logprobs: [ctxlen:-1] of both lists.
    told = logprobs["token_logprobs"][len(context) : -1]
    assert told == [-token / 1000 for token in continuation]
    tops = logprobs["top_logprobs"][len(context) : -1]
    assert [max(top.values()) for top in tops] == told  # what the script holds likeliest
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert all(len(logprobs[key]) == len(context + continuation) + 1 for key in logprobs)
    assert choice["text"].startswith("def f(x):")
    assert served.engine.jobs[0].prompt_logprobs


def test_an_echo_alone(served: Live) -> None:
    body = {"prompt": "def f", "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = served.post("/v1/completions", body).json()
    assert answer["choices"][0]["text"] == "def f"
    assert answer["usage"]["completion_tokens"] == 0


def test_stop_strings(client: openai.OpenAI, served: Live, script: Script) -> None:
    script.say("one two three")
    served.engine.step = 0.01
    answer = client.completions.create(model="tiny", prompt="x", max_tokens=50, stop="two")
    assert answer.choices[0].text == "one " and answer.choices[0].finish_reason == "stop"
    assert served.engine.cancels.get(timeout=5) is served.engine.jobs[0]


def test_the_end_of_an_answer_can_be_ignored(served: Live, script: Script) -> None:
    script.say("one<｜end▁of▁sentence｜>two")
    body = {"prompt": "x", "max_tokens": 4, "ignore_eos": True, "min_tokens": 4}
    answer = served.post("/v1/completions", body).json()
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", []),
        ("prompt", [5000]),
        ("prompt", [["x"]]),
        ("prompt", ""),
        ("suffix", "x"),
        ("best_of", 3),
        ("logprobs", 21),
        ("max_tokens", -1),
        ("echo", "yes"),
        ("response_format", {"type": "xml"}),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(
    client: openai.OpenAI, field: str, value: Any
) -> None:
    body = {"model": "tiny", "prompt": "x"} | {field: value}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", body=body, cast_to=object)
    assert caught.value.param == field, caught.value.message
