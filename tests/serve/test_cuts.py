"""However an answer's ids are cut into events, what clients see is the same: a property."""

from __future__ import annotations

import itertools
import json
from typing import Any

from deepseek_recipe import ChatCompletionRequest, Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.runtime.text.tokenizer import Text
from dsv4.serve.answer import Answer
from dsv4.serve.chat import Chat
from dsv4.serve.jobs import Event, Finish
from tests.serve.conftest import PARAMETERS, TOOL_CALL
from tests.support.serving import EOS, TOKENIZER, served_model

MODEL = served_model()
RECIPE = Tokenizer.from_file(str(TOKENIZER))
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]
ANSWERS = [
    f"hm 世界</think>\n\nI look: <b>2>&1</b>.\n\n{TOOL_CALL}",
    f"hm\n\n{TOOL_CALL}",  # a call that ends the reasoning
    "</think>a < b </ c",
    "hm</think>STOP here",
    TOOL_CALL.replace("Paris", "</p> & </｜ 2>&1"),
]


def shown(ids: list[int], cuts: list[int], stop: list[str]) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, "stop": stop}
    read = Chat().read(body | {"thinking": {"type": "enabled"}}, MODEL, "id")
    generator = ChatCompletionRequest.chunk_generator(read.request, "id", "m")
    answer = Answer(read.request, generator, RECIPE, frozenset({EOS}), logprobs=False)
    chunks = answer.open(1, 0, "f")
    edges = [0, *sorted(cuts), len(ids)]
    for begin, end in itertools.pairwise(edges):
        chunks += answer.feed(Event(tuple(ids[begin:end])))
    chunks += answer.feed(Event(finish=Finish.STOP))
    result: dict[str, Any] = {"content": "", "reasoning_content": "", "arguments": "", "finish": ""}
    for chunk in chunks:
        choice = json.loads(chunk.to_json())["choices"][0]
        for name in ("content", "reasoning_content"):
            result[name] += choice["delta"].get(name) or ""
        for call in choice["delta"].get("tool_calls") or ():
            result["arguments"] += call["function"]["arguments"]
        result["finish"] = choice["finish_reason"] or result["finish"]
    return result


@settings(max_examples=60, deadline=None)
@given(data=st.data(), said=st.sampled_from(ANSWERS), stop=st.sampled_from([[], ["STOP"], ["loo"]]))
def test_any_cut_shows_the_same(
    text: Text, data: st.DataObject, said: str, stop: list[str]
) -> None:
    ids = text.encode(said)
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=6))
    one_by_one = shown(ids, list(range(len(ids))), stop)
    assert shown(ids, cuts, stop) == shown(ids, [], stop) == one_by_one
    assert "DSML" not in one_by_one["content"] + one_by_one["reasoning_content"]
    if one_by_one["arguments"]:
        assert json.loads(one_by_one["arguments"])["days"] == 3
        assert one_by_one["finish"] == "tool_calls"
