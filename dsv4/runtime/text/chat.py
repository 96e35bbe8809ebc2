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
from collections.abc import Collection, Generator, Sequence
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

from dsv4.formats.errors import RuntimeRefusal
from dsv4.runtime.text.drafting import Drafter
from dsv4.runtime.text.generate import Timings, TokenSession, generate
from dsv4.runtime.text.pieces import Part, Reader
from dsv4.runtime.text.sampling import Sampler
from dsv4.runtime.text.tokenizer import Text, check_unicode

Effort = Literal["low", "high", "max"]
Finish = Literal["stop", "length", "interrupted"]

_EOS = SpecialToken.Eos.default_str()


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
            if drawn is not None and text.spoken(drawn) == plain:
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


class ConversationFull(RuntimeRefusal):
    """A conversation has outgrown its session. tokens: of it; capacity: of the session."""

    def __init__(self, tokens: int, capacity: int) -> None:
        super().__init__(
            f"the conversation has {tokens} tokens and the session holds {capacity}; start anew, "
            "or open it with a larger max_seq_len"
        )
        self.tokens, self.capacity = tokens, capacity


class ResettableSession(TokenSession, Protocol):
    """A session that can be emptied, which also makes an interrupted one usable again."""

    def reset(self) -> None:
        """Empty the sequence: position 0."""


class Chat:
    """A conversation with one model, held by one session, which is the chat's alone from here.

    `max_new_tokens` bounds an answer besides the session's room, each string of `stop` ends it;
    `drafter` is one for the session.
    `template` may be replaced between answers. After an answer, `finish` says what ended it, `full`
    whether that was the session's room, and `timings` what it cost.
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
        stop: Sequence[str] = (),
        drafter: Drafter | None = None,
    ) -> None:
        self.template = template or Template()
        self.turns: list[Turn] = []
        self.timings = Timings()
        self.finish: Finish | None = None
        self.full = False
        self._session = session
        self._text = text
        self._sampler = sampler
        self._stop_ids = stop_ids(eos_token_ids, text)
        self._max_new_tokens = max_new_tokens
        self._stop = tuple(stop)
        self._drafter = drafter
        self._consumed: list[int] | None = None  # the ids in the session, None if unknown
        self._answering: weakref.ref[Generator[Part, None, None]] | None = None

    def reset(self) -> None:
        """Forget the conversation."""
        self._end_answer()
        self.turns.clear()

    def send(self, message: str) -> Generator[str, None, None]:
        """Say `message` and stream the answer; like `parts`, without the reasoning."""
        with contextlib.closing(self.parts(message)) as parts:
            for part in parts:
                if not part.reasoning:
                    yield part.text

    def parts(self, message: str) -> Generator[Part, None, None]:
        """Say `message` and stream the answer, reasoning and answer told apart.

        Closing the iterator, or a KeyboardInterrupt while it works, ends the answer: what was
        said by then stays in `turns`, with the message; if nothing was said, neither stays.
        An answer still open when the next message is sent is closed first.

        Raises ConversationFull during the iteration when the conversation no longer fits into
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
        self.finish, self.full, self.timings = None, False, Timings()
        prompt = self.template.encode([*self.turns, Turn(message)], self._text)
        room = self._session.max_seq_len - len(prompt)
        limit = room if self._max_new_tokens is None else min(room, self._max_new_tokens)
        if room < 1:
            raise ConversationFull(len(prompt), self._session.max_seq_len)
        answer = Reader(self._text, thinking=self.template.thinking, stop=self._stop)
        held = self._follow(prompt)
        tokens = generate(
            self._session,
            prompt[held:],
            limit,
            self._sampler,
            self._stop_ids,
            self.timings,
            history=prompt[:held],
            drafter=self._drafter,
        )
        finish: Finish = "interrupted"
        try:
            yield from answer.read(tokens)
            cut = self.timings.generated_tokens == limit and not answer.stopped
            self.full = cut and limit == room
            finish = "length" if cut else "stop"
        except GeneratorExit:
            raise
        except BaseException:
            # The forward pass may have been cut short, its caches half written.
            self._consumed = None
            raise
        finally:
            tokens.close()
            self._conclude(message, prompt, answer, finish)

    def _conclude(self, message: str, prompt: list[int], answer: Reader, finish: Finish) -> None:
        self.finish = finish
        if self._consumed is not None:
            self._consumed = (prompt + answer.drawn)[: self._session.position]
        if finish != "interrupted" or answer.said:
            self.turns.append(Turn(message, answer.answer, answer.reasoning, answer.answer_ids))

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
