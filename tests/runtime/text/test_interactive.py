"""The chat loop with a screen made of lists."""

from __future__ import annotations

import pytest

from dsv4.runtime.text.chat import Chat, Template
from dsv4.runtime.text.generate import Timings
from dsv4.runtime.text.pieces import Part
from dsv4.runtime.text.repl import interactive
from tests.runtime.text.text_fixtures import TEXT, THINK_END, chat_with


class ListScreen:
    """Lines to be read, exceptions to be raised in their place, and all that was shown."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self._lines = list(lines)
        self.answers: list[str] = []
        self.reasoning: list[str] = []
        self.notes: list[str] = []
        self.asked_for_more = 0
        self.interrupt_after: int | None = None
        self._said = self._thought = ""

    def read(self, more: bool) -> str:
        self.asked_for_more += more
        line = self._lines.pop(0) if self._lines else EOFError
        if isinstance(line, str):
            return line
        raise line

    def show(self, part: Part) -> None:
        if part.reasoning:
            self._thought += part.text
            return
        self._said += part.text
        if self.interrupt_after is not None and len(self._said) >= self.interrupt_after:
            self.interrupt_after = None
            raise KeyboardInterrupt

    def end(self, timings: Timings | None) -> None:
        self.answers.append(self._said)
        self.reasoning.append(self._thought)
        self._said = self._thought = ""

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    def talk(self, chat: Chat) -> None:
        interactive(chat, self)


def test_interactive_answers_until_the_end_of_input() -> None:
    chat, _ = chat_with("one", "two")
    screen = ListScreen("a", "  ", "b")
    screen.talk(chat)
    assert (screen.answers, screen.notes) == (["one", "two"], [])


@pytest.mark.parametrize("word", ["/exit", "/quit", "/bye", "exit", "quit"])
def test_every_word_for_leaving_leaves(word: str) -> None:
    chat, _ = chat_with("one", "two")
    screen = ListScreen("a", word, "b")
    screen.talk(chat)
    assert screen.answers == ["one"]
    assert screen.read(more=False) == "b"


@pytest.mark.parametrize("reset", ["/reset", "/clear"])
def test_the_conversation_is_forgotten(reset: str) -> None:
    chat, session = chat_with("one", "two")
    screen = ListScreen("/help", "a", reset, "a")
    screen.talk(chat)
    assert screen.answers == ["one", "one"]
    assert "/reset" in screen.notes[0] and "forgotten" in screen.notes[1]
    assert len(chat.turns) == 1 and session.resets == 2


@pytest.mark.parametrize("line", ["/rest", "/", "/think-hard", "/Reset"])
def test_an_unknown_command_never_reaches_the_model(line: str) -> None:
    chat, session = chat_with("one")
    screen = ListScreen(line)
    screen.talk(chat)
    assert screen.notes == [f"{line} is not a command; /help lists them"]
    assert (chat.turns, session.consumed) == ([], [])


def test_system_prompt_thinking_and_effort_are_set() -> None:
    chat, _ = chat_with("one", f"why{THINK_END}two")
    screen = ListScreen(
        "a", "/system Be  brief.", "/think on", "/effort max", "b", "/think perhaps"
    )
    screen.talk(chat)
    assert chat.template == Template(system="Be  brief.", thinking=True, effort="max")
    assert screen.answers == ["one", "two"]
    assert screen.reasoning == ["", "why"]
    assert screen.notes[-1] == "/think perhaps: expected on or off"
    ListScreen("/system", "/think off", "/effort high", "/effort huge").talk(chat)
    assert chat.template == Template(effort="high")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("def f():\\", "    return 1",), "def f():\n    return 1"),
        (('"""', "  one", "", "/exit", '"""'), "  one\n\n/exit"),
        (('"""one', 'two"""'), "one\ntwo"),
        (('"""one"""',), "one"),
        (("/not a command\nin a paste",), "/not a command\nin a paste"),
        (("    indented",), "    indented"),
    ],
)  # fmt: skip
def test_a_message_of_several_lines_is_one_turn(lines: tuple[str, ...], message: str) -> None:
    chat, _ = chat_with("one")
    screen = ListScreen(*lines)
    screen.talk(chat)
    assert [turn.user for turn in chat.turns] == [message]
    assert screen.asked_for_more == len(lines) - 1


def test_ctrl_c_ends_the_answer_not_the_program() -> None:
    chat, session = chat_with("Hello again, world.", "ok", interrupt_at=2)
    screen = ListScreen(KeyboardInterrupt, "a", "b")
    screen.talk(chat)
    said = TEXT.decode(TEXT.encode("Hello again, world.")[:2])
    assert screen.answers == [said, "ok"]
    assert screen.notes == ["/exit or Ctrl-D leaves", "(interrupted)"]
    assert [turn.answer for turn in chat.turns] == [said, "ok"]
    assert session.resets == 2


def test_ctrl_c_while_showing_ends_the_answer_and_keeps_the_session() -> None:
    chat, session = chat_with("Hello again, world.", "ok")
    screen = ListScreen("a", "b")
    screen.interrupt_after = 6
    screen.talk(chat)
    assert screen.answers[1] == "ok"
    assert chat.turns[0].answer == screen.answers[0] != "Hello again, world."
    assert session.resets == 1


def test_refusals_and_cuts_are_noted_and_the_loop_goes_on() -> None:
    chat, _ = chat_with("Hello again, world.", "ok", max_new_tokens=2)
    screen = ListScreen("\udce4", "a")
    screen.talk(chat)
    assert "not valid Unicode" in screen.notes[0]
    assert screen.notes[1] == "cut after 2 tokens; --max-new-tokens N allows more"


def test_a_full_conversation_names_the_ways_out() -> None:
    chat, _ = chat_with("Hello again, world.", "ok", max_seq_len=7)
    screen = ListScreen("a", "b", "/reset", "a")
    screen.talk(chat)
    assert "/reset" in screen.notes[0] and "--max-seq-len" in screen.notes[0]
    assert "the conversation has" in screen.notes[1] and "7 fit; /reset" in screen.notes[1]
    assert "--max-seq-len" in screen.notes[1]
    assert screen.answers[0] == screen.answers[2] != ""
