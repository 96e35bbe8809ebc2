"""One prompt, one answer: what `dsv4 run` does when it is not a chat."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.model.settings import GENERATION_FILE, GenerationSettings
from dsv4.runtime.text.chat import Finish
from dsv4.runtime.text.drafting import Drafter
from dsv4.runtime.text.generate import Timings, TokenSession, generate
from dsv4.runtime.text.pieces import Part, Reader
from dsv4.runtime.text.sampling import Sampler
from dsv4.runtime.text.tokenizer import Text


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of a prompt. `text` is the answer alone; None when the store has no tokenizer.

    reasoning: what the model said before the answer; None when it was not asked to think.
    """

    prompt_tokens: list[int]
    generated_tokens: list[int]
    text: str | None
    reasoning: str | None
    finish: Finish
    timings: Timings

    def to_dict(self) -> dict[str, Any]:
        """What `dsv4 run --json` prints."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "text": self.text,
            "reasoning": self.reasoning,
            "finish": self.finish,
            "timings": self.timings.to_dict(),
        }


def answer_limit(settings: GenerationSettings, prompt_tokens: int, fallback: int) -> int:
    """Most tokens of an answer that nobody bounded: the checkpoint's bound, or `fallback`.

    Raises RuntimeRefusal when the prompt alone reaches the checkpoint's max_length.
    """
    limit = settings.new_tokens(prompt_tokens)
    if limit is not None and limit < 1:
        raise RuntimeRefusal(
            f"the prompt has {prompt_tokens} tokens and {GENERATION_FILE} allows "
            f"{settings.max_length} for prompt and answer together (max_length); "
            "give --max-new-tokens"
        )
    return fallback if limit is None else limit


def answer(
    session: TokenSession,
    prompt_ids: Sequence[int],
    sampler: Sampler,
    write: Callable[[Part], object],
    *,
    text: Text | None,
    max_new_tokens: int,
    stop_ids: Collection[int],
    thinking: bool = False,
    stop: Sequence[str] = (),
    drafter: Drafter | None = None,
) -> Answer:
    """Generate, handing pieces of whole characters to `write` as they come.

    Without `text` a piece is an id and a comma. thinking: the prompt ends where the model is to
    reason. drafter: as in `generate`. A KeyboardInterrupt ends the answer, whose `finish` says so;
    the session is not to be used again then. Raises RuntimeRefusal as `generate` and `Reader` do.
    """
    timings = Timings()
    tokens = generate(
        session, prompt_ids, max_new_tokens, sampler, stop_ids, timings, drafter=drafter
    )
    reader = None if text is None else Reader(text, thinking=thinking, stop=stop)
    drawn: list[int] = [] if reader is None else reader.drawn
    finish: Finish = "stop"
    try:
        if reader is None:
            for token in tokens:
                drawn.append(token)
                write(Part(f"{token},", reasoning=False))
        else:
            for part in reader.read(tokens):
                write(part)
        if len(drawn) == max_new_tokens and not (reader is not None and reader.stopped):
            finish = "length"
    except KeyboardInterrupt:
        finish = "interrupted"
    return Answer(
        list(prompt_ids),
        drawn,
        None if reader is None else reader.answer,
        reader.reasoning if reader is not None and thinking else None,
        finish,
        timings,
    )
