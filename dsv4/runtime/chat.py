"""A conversation: history, its rendering into token ids, and one session that follows it.

Prompts are rendered by deepseek-recipe, DeepSeek's own encoder; nothing is spelt by hand here.
It says which ranges of the prompt are special tokens (`special_ranges`), all else is encoded
as mere characters, so no message can forge a turn.

The session is only ever appended to. Before each turn the whole conversation is rendered and
encoded again; when the ids begin with what the session has consumed, only the rest is fed,
otherwise the session is reset and fed the whole. To make the former the common case, an answer
keeps the ids the model drew: encoding its text again need not give them back. In thinking mode
the template drops the reasoning of earlier turns, so there each turn is fed from the start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Collection, Generator, Sequence
from typing import Literal, Protocol

from deepseek_recipe import (
    AssistantMessage,
    Conversation,
    DeepseekV4Encoding,
    Message,
    RenderedPrompt,
    SpecialToken,
    SystemMessage,
    UserMessage,
)

from dsv4.formats.errors import Dsv4Error, RuntimeRefusal
from dsv4.runtime.generate import Timings, TokenSession, generate
from dsv4.runtime.sampling import Sampler
from dsv4.runtime.text import Text, check_unicode

Effort = Literal["low", "high", "max"]
Finish = Literal["stop", "length", "interrupted"]

_EOS = SpecialToken.Eos.default_str()
_THINK = SpecialToken.ThinkingStart.default_str()
_THINK_END = SpecialToken.ThinkingEnd.default_str()


@dataclasses.dataclass(frozen=True)
class Turn:
    """What the user said and, once there is one, the answer.

    `answer_ids` are the ids the model drew for `answer`; `Template.encode` prefers them to its
    own as long as they decode to it.
    """

    user: str
    answer: str | None = None
    reasoning: str = ""
    answer_ids: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Template:
    """How a conversation becomes a prompt.

    `effort` acts in thinking mode. "low", the default, adds no text and so is the one level that
    every revision of the checkpoint renders alike; "high" and "max" are those of the 0731
    revision (the preview's "max" is the 0731's "high").
    """

    system: str | None = None
    thinking: bool = False
    effort: Effort = "low"

    def render(self, turns: Sequence[Turn]) -> RenderedPrompt:
        """The prompt's text, ending where the model is to speak, and its special ranges."""
        messages: list[Message] = [] if self.system is None else [SystemMessage(self.system)]
        for turn in turns:
            messages.append(UserMessage(turn.user))
            if turn.answer is not None:
                messages.append(AssistantMessage(turn.answer, turn.reasoning or None))
        conversation = Conversation(
            messages, thinking_mode=self.thinking, reasoning_effort=self.effort
        )
        return DeepseekV4Encoding().render_conversation(conversation)

    def encode(self, turns: Sequence[Turn], text: Text) -> list[int]:
        """Token ids of the rendered prompt.

        Raises RuntimeRefusal when a message is not valid Unicode, or the tokenizer lacks a
        special token of the template.
        """
        check_unicode(self.system or "")
        for turn in turns:
            check_unicode(turn.user + turn.reasoning + (turn.answer or ""))
        rendered = self.render(turns)
        answers = iter([turn for turn in turns if turn.answer is not None])
        ids: list[int] = []
        done = 0
        for begin, end in rendered.special_ranges:
            plain, spelling = rendered.prompt[done:begin], rendered.prompt[begin:end]
            # An EOS ends an answer and nothing else, so the n-th one ends the n-th answer.
            answered = next(answers, None) if spelling == _EOS else None
            drawn = answered.answer_ids if answered is not None else None
            if drawn is not None and text.decode(drawn) == plain:
                ids += drawn
            else:
                ids += text.encode_plain(plain)
            ids.append(_special_id(text, spelling))
            done = end
        return ids + text.encode_plain(rendered.prompt[done:])


def _special_id(text: Text, spelling: str) -> int:
    token = text.token_id(spelling)
    if token is None:
        raise RuntimeRefusal(
            f"the tokenizer has no token {spelling}, expected DeepSeek-V4's special tokens; "
            "feed token ids or raw text instead of a chat"
        )
    return token


def stop_ids(eos_token_ids: Collection[int], text: Text) -> frozenset[int]:
    """The ids that end an answer: the model config's and the tokenizer's own EOS."""
    own = text.token_id(_EOS)
    return frozenset(eos_token_ids) | (frozenset() if own is None else {own})


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of an answer as it comes. The `<think>` marks count as reasoning."""

    text: str
    reasoning: bool


class ResettableSession(TokenSession, Protocol):
    """A session that can be emptied, which also makes an interrupted one usable again."""

    def reset(self) -> None:
        """Empty the sequence: position 0."""


class Chat:
    """A conversation with one model, held by one session, which is the chat's alone from here.

    `max_new_tokens` bounds an answer besides the session's room. After an answer, `finish` says
    what ended it and `timings` what it cost.
    """

    def __init__(
        self,
        session: ResettableSession,
        text: Text,
        sampler: Sampler,
        *,
        template: Template | None = None,
        eos_token_ids: Collection[int] = (),
        max_new_tokens: int | None = None,
    ) -> None:
        self.template = template or Template()
        self.turns: list[Turn] = []
        self.timings = Timings()
        self.finish: Finish | None = None
        self._session = session
        self._text = text
        self._sampler = sampler
        self._stop_ids = stop_ids(eos_token_ids, text)
        self._max_new_tokens = max_new_tokens
        self._consumed: list[int] | None = None  # the ids in the session, None if unknown
        self._answering: weakref.ref[Generator[Part, None, None]] | None = None

    def reset(self) -> None:
        """Forget the conversation."""
        self._end_answer()
        self.turns.clear()

    def send(self, message: str) -> Generator[str, None, None]:
        """Say `message` and stream the answer; like `parts`, text only."""
        with contextlib.closing(self.parts(message)) as parts:
            for part in parts:
                yield part.text

    def parts(self, message: str) -> Generator[Part, None, None]:
        """Say `message` and stream the answer, reasoning and answer told apart.

        Closing the iterator, or a KeyboardInterrupt while it works, ends the answer: what was
        said by then stays in `turns`, with the message; if nothing was said, neither stays.
        An answer still open when the next message is sent is closed first.

        Raises RuntimeRefusal during the iteration when the conversation no longer fits into
        the session; the message is then not part of the conversation.
        """
        self._end_answer()
        answer = self._stream(message)
        self._answering = weakref.ref(answer)
        return answer

    def _end_answer(self) -> None:
        answer = self._answering() if self._answering is not None else None
        if answer is not None:
            answer.close()
        self._answering = None

    def _stream(self, message: str) -> Generator[Part, None, None]:
        self.finish, self.timings = None, Timings()
        prompt = self.template.encode([*self.turns, Turn(message)], self._text)
        room = self._session.max_seq_len - len(prompt)
        limit = room if self._max_new_tokens is None else min(room, self._max_new_tokens)
        if room < 1:
            raise RuntimeRefusal(
                f"the conversation has {len(prompt)} tokens and the session holds "
                f"{self._session.max_seq_len}; start anew, or open it with a larger max_seq_len"
            )
        answer = _Answer(self._text, self.template.thinking)
        held = self._follow(prompt)
        tokens = generate(
            self._session,
            prompt[held:],
            limit,
            self._sampler,
            self._stop_ids,
            self.timings,
            history=prompt[:held],
        )
        finish: Finish = "interrupted"
        try:
            yield from answer.read(tokens)
            finish = "length" if self.timings.generated_tokens == limit else "stop"
        except GeneratorExit:
            raise
        except BaseException:
            # The forward pass may have been cut short, its caches half written.
            self._consumed = None
            raise
        finally:
            tokens.close()
            self._conclude(message, prompt, answer, finish)

    def _conclude(self, message: str, prompt: list[int], answer: _Answer, finish: Finish) -> None:
        self.finish = finish
        if self._consumed is not None:
            self._consumed = (prompt + answer.drawn)[: self._session.position]
        if finish != "interrupted" or answer.said:
            self.turns.append(answer.turn(message))

    def _follow(self, prompt: list[int]) -> int:
        """Bring the session to a true prefix of `prompt`, and say how long that is."""
        held = self._consumed
        if held is None or self._session.position != len(held) or not _extends(prompt, held):
            self._consumed = None  # until the reset is through
            self._session.reset()
            self._consumed = held = []
        return len(held)


def _extends(ids: list[int], prefix: list[int]) -> bool:
    return len(ids) > len(prefix) and ids[: len(prefix)] == prefix


class _Answer:
    """An answer taking shape: drawn ids in, parts out, and what of them was said."""

    def __init__(self, text: Text, thinking: bool) -> None:
        self.drawn: list[int] = []
        self._text = text
        self._thinking = thinking  # from here on: is the model still reasoning?
        self._think_end = _special_id(text, _THINK_END) if thinking else None
        self._said = {True: "", False: ""}
        self._begin = 0  # drawn[_begin:_end] are the ids of the answer as said
        self._end = 0

    @property
    def said(self) -> bool:
        """Whether anything came out yet, marks aside."""
        return any(self._said.values())

    def read(self, tokens: Generator[int, None, None]) -> Generator[Part, None, None]:
        """Turn tokens into parts. `drawn` and `turn` are right at every yield."""
        stream = self._text.stream()
        if self._thinking:
            yield Part(_THINK, reasoning=True)
        for token in tokens:
            self.drawn.append(token)
            if self._thinking and token == self._think_end:
                yield from self._say(stream.flush())
                self._thinking = False
                self._begin = self._end = len(self.drawn)
                yield Part(_THINK_END, reasoning=True)
            else:
                yield from self._say(stream.push(token))
        yield from self._say(stream.flush())
        self._end = len(self.drawn)  # tokens without text, too

    def _say(self, text: str) -> Generator[Part, None, None]:
        if text:
            self._said[self._thinking] += text
            self._end = len(self.drawn)
            yield Part(text, self._thinking)

    def turn(self, message: str) -> Turn:
        """The turn as far as it was said."""
        ids = None if self._thinking else tuple(self.drawn[self._begin : self._end])
        return Turn(message, self._said[False], self._said[True], ids)


HELP = """\
/reset  forget the conversation
/help   show this
/exit   leave; so does Ctrl-D
Ctrl-C  end the answer
"""


def interactive(
    chat: Chat,
    read_line: Callable[[], str],
    write: Callable[[str], object],
    note: Callable[[str], object] | None = None,
) -> None:
    """Talk until `/exit` or the end of input.

    `read_line` gives a line without its newline, raises EOFError at the end and
    KeyboardInterrupt on Ctrl-C. `write` gets the answers as they come, `note` (`write` if
    None) all that is not an answer. Ctrl-C ends an answer, never the loop.
    """
    note = note or write
    while True:
        try:
            line = read_line().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            note("\n/exit or Ctrl-D leaves\n")
            continue
        if line == "/exit":
            return
        if line == "/reset":
            chat.reset()
            note("the conversation is forgotten\n")
        elif line == "/help":
            note(HELP)
        elif line:
            _answer(chat, line, write, note)


def _answer(
    chat: Chat, line: str, write: Callable[[str], object], note: Callable[[str], object]
) -> None:
    try:
        with contextlib.closing(chat.send(line)) as answer:
            for text in answer:
                write(text)
        write("\n")
    except KeyboardInterrupt:
        note("\n(interrupted)\n")
    except Dsv4Error as error:
        note(f"\n{error}\n")
        return
    if chat.finish == "length":
        note(f"(cut after {chat.timings.generated_tokens} tokens)\n")
