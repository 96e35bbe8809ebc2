"""Chat: what is fed, what is said, what survives an interruption.

The parting of reasoning from answer is checked with deepseek-recipe's stream parser.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Sequence

import deepseek_recipe as recipe
import pytest
import torch

from dsv4.formats.errors import RuntimeRefusal
from dsv4.runtime.text.chat import Chat, ConversationFull, Template, Turn
from dsv4.runtime.text.drafting import Drafter, PromptLookup
from dsv4.runtime.text.sampling import Sampler
from tests.runtime.text.text_fixtures import (
    ASSISTANT,
    BOS,
    EOS,
    PAD,
    TEXT,
    THINK,
    THINK_END,
    TOKENIZERS,
    USER,
    FakeSession,
    chat_with,
    one,
)


def test_half_a_surrogate_pair_is_refused_and_the_chat_goes_on() -> None:
    chat, _ = chat_with("ok")
    with pytest.raises(RuntimeRefusal, match="not valid Unicode"):
        list(chat.send("\udce4"))
    assert "".join(chat.send("hi")) == "ok"


def test_an_answer_streams_and_is_remembered() -> None:
    chat, session = chat_with("Hello, 世界 👩‍👩‍👧‍👦!")
    pieces = list(chat.send("hi"))
    assert "".join(pieces) == "Hello, 世界 👩‍👩‍👧‍👦!"
    assert len(pieces) > 3 and all(pieces)
    assert not any("\ufffd" in piece for piece in pieces)
    assert chat.finish == "stop"
    assert chat.turns == [
        Turn("hi", "Hello, 世界 👩‍👩‍👧‍👦!", "", tuple(TEXT.encode("Hello, 世界 👩‍👩‍👧‍👦!")))
    ]
    assert session.prompts == [TEXT.encode(f"{BOS}{USER}hi{ASSISTANT}{THINK_END}")]
    assert chat.timings.prompt_tokens == len(session.prompts[0])
    assert chat.timings.generated_tokens == len(TEXT.encode("Hello, 世界 👩‍👩‍👧‍👦!"))


def test_a_chat_that_drafts_says_and_feeds_the_same() -> None:
    """Answers that are broken off, too, leave the session where the next turn goes on."""
    said = []
    for drafts in (0, 4):
        chat, session = chat_with("one two one two one two", "two one two one")
        if drafts:
            chat._drafter = Drafter("prompt lookup", PromptLookup, drafts, auto=False)
        answer = chat.send("a")
        first = "".join(next(answer) for _ in range(4))
        answer.close()
        said.append((first, list(chat.send("b")), session.resets, session.consumed))
        assert (chat.timings.drafts is not None) == bool(drafts)
    assert said[0] == said[1]


def test_later_turns_feed_only_what_is_new() -> None:
    chat, session = chat_with("one", "two", "three")
    for said, expected in (("a", "one"), ("b", "two"), ("c", "three")):
        assert "".join(chat.send(said)) == expected
    assert session.resets == 1, "once, to start"
    new = [f"{EOS}{USER}{said}{ASSISTANT}{THINK_END}" for said in "bc"]
    assert session.prompts[1:] == [TEXT.encode(prompt) for prompt in new]
    whole = "".join(
        f"{USER}{said}{ASSISTANT}{THINK_END}{answer}{EOS}"
        for said, answer in (("a", "one"), ("b", "two"), ("c", "three"))
    )
    assert session.consumed == TEXT.encode(BOS + whole)[:-1]


def test_an_answer_keeps_the_ids_that_were_drawn() -> None:
    """A model may spell "Hello" letter by letter; its text encodes to fewer tokens."""
    letters = [TEXT.encode(letter)[0] for letter in "Hello"]
    assert TEXT.encode("Hello") != letters
    chat, session = chat_with(letters, "ok")
    assert "".join(chat.send("a")) == "Hello"
    assert "".join(chat.send("b")) == "ok"
    assert session.resets == 1
    # The check can fail: without the ids the prefix differs and all is fed again.
    chat, session = chat_with(letters, "ok")
    list(chat.send("a"))
    chat.turns[0] = Turn("a", "Hello")
    assert "".join(chat.send("b")) == "ok"
    assert session.resets == 2


def test_an_edited_answer_is_not_taken_for_what_was_drawn() -> None:
    chat, session = chat_with("one", "two")
    list(chat.send("a"))
    chat.turns[0] = dataclasses.replace(chat.turns[0], answer="uno")
    assert "".join(chat.send("b")) == "two"
    expected = f"{BOS}{USER}a{ASSISTANT}{THINK_END}uno{EOS}{USER}b{ASSISTANT}{THINK_END}"
    assert session.prompts == [TEXT.encode(expected)]


def test_tokens_without_text_are_remembered_too() -> None:
    drawn = [*TEXT.encode("Hello"), one(PAD)]
    chat, session = chat_with(drawn, "ok")
    assert "".join(chat.send("a")) == "Hello"
    assert chat.turns[0].answer_ids == tuple(drawn)
    assert "".join(chat.send("b")) == "ok"
    assert session.resets == 1


def test_an_unfinished_character_is_shown_as_such() -> None:
    half = TEXT.encode_plain("\U0001d518")[:2]
    chat, session = chat_with([*TEXT.encode("Hello"), *half], "ok")
    assert "".join(chat.send("a")) == "Hello\ufffd"
    assert "".join(chat.send("b")) == "ok"
    assert session.resets == 1
    thinking, _ = chat_with(
        [*half, *TEXT.encode(f"{THINK_END}ok")], template=Template(thinking=True)
    )
    assert "".join(thinking.send("a")) == "ok"
    assert thinking.turns[0].reasoning == "\ufffd"


def test_an_edited_history_is_fed_anew() -> None:
    chat, session = chat_with("one", "two")
    list(chat.send("a"))
    chat.turns[0] = Turn("other", "one")
    assert "".join(chat.send("b")) == "two"
    expected = f"{BOS}{USER}other{ASSISTANT}{THINK_END}one{EOS}{USER}b{ASSISTANT}{THINK_END}"
    assert session.prompts == [TEXT.encode(expected)]


def noise(ids: Sequence[int]) -> int:
    """Any token of the vocabulary, marks and broken bytes included; ends now and then."""
    draw = zlib.crc32(repr(list(ids)).encode())
    return one(EOS) if draw % 13 == 0 else draw % TEXT.vocab_size


def test_whatever_the_model_says_is_never_fed_twice() -> None:
    session = FakeSession(noise, max_seq_len=20_000)
    chat = Chat(session, TEXT, Sampler(), max_new_tokens=30)
    finishes = set()
    for i in range(60):
        said = "".join(chat.send(f"message {i}"))
        finishes.add(chat.finish)
        assert said == chat.turns[-1].answer
        # A model that is a function of all ids answers alike when it is fed from the start.
        fresh = Chat(FakeSession(noise, max_seq_len=20_000), TEXT, Sampler(), max_new_tokens=30)
        fresh.turns = chat.turns[:-1]
        assert "".join(fresh.send(f"message {i}")) == said
    assert session.resets == 1
    assert finishes == {"stop", "length"}


def test_a_session_that_was_used_elsewhere_is_not_trusted() -> None:
    chat, session = chat_with("one", "two")
    session.forward(torch.tensor([5, 6]))
    assert "".join(chat.send("a")) == "one"
    session.forward(torch.tensor([5, 6]))
    assert "".join(chat.send("b")) == "two"
    assert session.resets == 2


def parsed_by_recipe(ids: list[int]) -> tuple[str, str]:
    """-> (reasoning, answer) as recipe's stream parser tells them apart."""
    request = recipe.ConversationRequest(
        recipe.Conversation([recipe.UserMessage("hi")]), recipe.ModelVersion.DeepseekV4Pro
    )
    processor = recipe.StreamProcessor(
        recipe.ChatCompletionRequest.chunk_generator(request, "id", "model"),
        recipe.ParsingOptions(
            thinking_initial_stage=recipe.ThinkingInitialStage.ReasoningStart,
            parse_tool_calls=False,
        ),
        recipe.Tokenizer.from_str(TOKENIZERS[False].to_str()),
    )
    response = recipe.ChatCompletionResponse("id", "model", 0, 0, 0)
    chunks = processor.push(recipe.InferenceChunk.ready())
    for token in ids:
        chunks += processor.push(recipe.InferenceChunk.tokens([token]))
    chunks += processor.push(recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop))
    for chunk in chunks + processor.finish():
        assert isinstance(chunk, recipe.ChatCompletionChunk)
        response.accumulate(chunk)
    message = json.loads(response.to_json())["choices"][0]["message"]
    return message["reasoning_content"], message["content"]


def test_reasoning_and_answer_part_where_recipes_parser_parts_them() -> None:
    spoken = f"推理 step by step{THINK_END}答案 is 42"
    chat, _ = chat_with(spoken, template=Template(thinking=True))
    parts = list(chat.parts("hi"))
    said = {
        reasoning: "".join(p.text for p in parts if p.reasoning == reasoning)
        for reasoning in (False, True)
    }
    reasoning, answer = parsed_by_recipe(TEXT.encode(spoken))
    assert said == {True: reasoning, False: answer}
    assert chat.turns == [Turn("hi", answer, reasoning, tuple(TEXT.encode(answer)))]


def test_thinking_turns_drop_earlier_reasoning_and_start_afresh() -> None:
    chat, session = chat_with(
        f"why{THINK_END}one", f"how{THINK_END}two", template=Template(thinking=True)
    )
    assert "".join(chat.send("a")) == "one"
    assert "".join(chat.send("b")) == "two"
    expected = f"{BOS}{USER}a{ASSISTANT}{THINK_END}one{EOS}{USER}b{ASSISTANT}{THINK}"
    assert session.resets == 2
    assert session.prompts == [TEXT.encode(expected)]


def test_closing_ends_the_answer_and_keeps_what_was_said() -> None:
    chat, session = chat_with("Hello again, world.", "ok")
    answer = chat.send("a")
    said = next(answer) + next(answer)
    answer.close()
    assert chat.finish == "interrupted"
    assert chat.turns[0].answer == said
    assert "".join(chat.send("b")) == "ok"
    assert session.resets == 1
    prompt = f"{BOS}{USER}a{ASSISTANT}{THINK_END}{said}{EOS}{USER}b{ASSISTANT}{THINK_END}ok"
    assert session.consumed == TEXT.encode(prompt)


def test_an_answer_left_open_is_closed_by_the_next_message() -> None:
    chat, _ = chat_with("Hello again, world.", "ok")
    first = chat.parts("a")
    said = next(first).text
    assert "".join(chat.send("b")) == "ok"
    assert [turn.answer for turn in chat.turns] == [said, "ok"]
    assert list(first) == []


def test_an_answer_dropped_by_a_break_is_concluded() -> None:
    chat, _ = chat_with("Hello again, world.", "ok")
    said = []
    for piece in chat.send("a"):
        said.append(piece)
        break
    assert [turn.answer for turn in chat.turns] == said
    for part in chat.parts("b"):
        said.append(part.text)
        break
    assert [turn.answer for turn in chat.turns] == said


@pytest.mark.parametrize("interrupt_at", [0, 1, 3])
def test_an_interrupt_in_a_forward_pass_leaves_the_chat_usable(interrupt_at: int) -> None:
    chat, session = chat_with("Hello again, world.", "ok", interrupt_at=interrupt_at)
    said = ""
    with pytest.raises(KeyboardInterrupt):
        for piece in chat.send("a"):
            said += piece
    assert chat.finish == "interrupted"
    # Cut in the prompt, nothing was said: the message goes, too.
    assert [turn.answer for turn in chat.turns] == ([said] if interrupt_at else [])
    chat.turns = chat.turns or [Turn("a", "")]
    assert "".join(chat.send("b")) == "ok"
    assert session.resets == 2, "a session cut short is not trusted"


def test_an_interrupt_inside_a_character_leaves_no_half_of_it() -> None:
    bytes_of_ni = TEXT.encode_plain("\U0001d518")
    assert len(bytes_of_ni) > 2
    hello = TEXT.encode("Hello")
    chat, _ = chat_with(hello + bytes_of_ni, "ok", interrupt_at=len(hello) + 2)
    with pytest.raises(KeyboardInterrupt):
        list(chat.send("a"))
    assert chat.turns == [Turn("a", "Hello", "", tuple(hello))]
    assert "".join(chat.send("b")) == "ok"


def test_an_interrupt_while_reasoning_leaves_an_empty_answer() -> None:
    chat, _ = chat_with(
        f"long thoughts{THINK_END}one", f"x{THINK_END}two", template=Template(thinking=True)
    )
    answer = chat.parts("a")
    said = next(answer)
    answer.close()
    assert said.reasoning and chat.turns == [Turn("a", "", said.text, None)]
    assert "".join(chat.send("b")) == "two"


def test_an_answer_is_cut_at_its_limit_and_at_the_sessions_end() -> None:
    chat, session = chat_with("Hello again, world.", max_new_tokens=2)
    assert "".join(chat.send("a")) == TEXT.decode(TEXT.encode("Hello again, world.")[:2])
    assert chat.finish == "length"
    prompt = TEXT.encode(f"{BOS}{USER}a{ASSISTANT}{THINK_END}")
    chat, session = chat_with("Hello again, world.", max_seq_len=len(prompt) + 3)
    list(chat.send("a"))
    assert chat.finish == "length" and chat.timings.generated_tokens == 3
    assert chat.full
    with pytest.raises(ConversationFull, match=r"has \d+ tokens and the session holds") as full:
        list(chat.send("b"))
    assert full.value.capacity == len(prompt) + 3 < full.value.tokens
    assert len(chat.turns) == 1, "a message that does not fit is not remembered"
    chat.reset()
    assert chat.turns == []
    assert len("".join(chat.send("a"))) > 0
    assert session.resets == 2


@pytest.mark.parametrize("spelling", ["<｜image｜>", THINK, THINK_END, "｜DSML｜", PAD])
def test_special_tokens_are_no_text_and_are_remembered(spelling: str) -> None:
    hello, again = TEXT.encode("Hello"), TEXT.encode(" again")
    drawn = [*hello, one(spelling), *again]
    chat, session = chat_with(drawn)
    assert "".join(chat.send("a")) == "Hello again"
    assert chat.turns == [Turn("a", "Hello again", "", tuple(drawn))]
    # What the model is shown next is what it said, special tokens included.
    assert Template().encode([*chat.turns, Turn("b")], TEXT)[: len(session.consumed)] == (
        session.consumed
    )


def test_a_stop_string_ends_the_answer_before_it_begins() -> None:
    letters = [TEXT.encode(letter)[0] for letter in "one, two, three"]
    chat, session = chat_with(letters, "ok", stop=("wo,", "never"))
    assert "".join(chat.send("a")) == "one, t"
    assert (chat.finish, chat.turns[0].answer) == ("stop", "one, t")
    assert len(session.consumed) < len(letters) + 4, "nothing is drawn past it"
    assert "".join(chat.send("b")) == "ok"


def test_reasoning_is_not_searched_for_stop_strings() -> None:
    spoken = f"a STOP b{THINK_END}c STOP d"
    chat, _ = chat_with(spoken, template=Template(thinking=True), stop=("STOP",))
    assert "".join(chat.send("a")) == "c "
    assert chat.turns[0].reasoning == "a STOP b"


def test_the_template_may_change_between_answers() -> None:
    chat, session = chat_with("one", f"why{THINK_END}two")
    list(chat.send("a"))
    chat.template = Template(system="Be brief.", thinking=True)
    assert "".join(chat.send("b")) == "two"
    expected = f"{BOS}Be brief.{USER}a{ASSISTANT}{THINK_END}one{EOS}{USER}b{ASSISTANT}{THINK}"
    assert session.prompts == [TEXT.encode(expected)]
