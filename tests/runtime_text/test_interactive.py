"""The chat loop with a terminal made of lists."""

from __future__ import annotations

from dsv4.runtime.chat import Chat, interactive
from tests.runtime_text.text_fixtures import TEXT, chat_with


class Terminal:
    """Lines to be read, exceptions to be raised in their place, and all that was written."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self._lines = list(lines)
        self.written: list[str] = []
        self.noted: list[str] = []

    def read_line(self) -> str:
        line = self._lines.pop(0) if self._lines else EOFError
        if isinstance(line, str):
            return line
        raise line

    def talk(self, chat: Chat) -> None:
        interactive(chat, self.read_line, self.written.append, self.noted.append)


def test_interactive_answers_until_the_end_of_input() -> None:
    chat, _ = chat_with("one", "two")
    terminal = Terminal("a", "  ", "b")
    terminal.talk(chat)
    assert "".join(terminal.written) == "one\ntwo\n"
    assert terminal.noted == []


def test_interactive_commands() -> None:
    chat, session = chat_with("one", "two")
    terminal = Terminal("/help", "a", "/reset", "a", "/exit", "b")
    terminal.talk(chat)
    assert "".join(terminal.written) == "one\none\n"
    assert "/reset" in terminal.noted[0] and "forgotten" in terminal.noted[1]
    assert len(chat.turns) == 1 and session.resets == 2
    assert terminal.read_line() == "b"


def test_ctrl_c_ends_the_answer_not_the_program() -> None:
    chat, session = chat_with("Hello again, world.", "ok", interrupt_at=2)
    terminal = Terminal(KeyboardInterrupt, "a", "b")
    terminal.talk(chat)
    said = TEXT.decode(TEXT.encode("Hello again, world.")[:2])
    assert "".join(terminal.written) == f"{said}ok\n"
    assert "(interrupted)" in "".join(terminal.noted)
    assert [turn.answer for turn in chat.turns] == [said, "ok"]
    assert session.resets == 2


def test_ctrl_c_while_writing_ends_the_answer_and_keeps_the_session() -> None:
    chat, session = chat_with("Hello again, world.", "ok")
    terminal = Terminal("a", "b")
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 2:
            raise KeyboardInterrupt

    interactive(chat, terminal.read_line, write, terminal.noted.append)
    assert "".join(written[2:]) == "ok\n"
    assert chat.turns[0].answer == "".join(written[:2])
    assert session.resets == 1


def test_refusals_and_cuts_are_noted_and_the_loop_goes_on() -> None:
    chat, _ = chat_with("Hello again, world.", "ok", max_new_tokens=2)
    terminal = Terminal("\udce4", "a")
    terminal.talk(chat)
    assert "not valid Unicode" in terminal.noted[0]
    assert "cut after 2 tokens" in terminal.noted[1]
