"""One prompt, one answer: what `dsv4 run` does when it is not a chat."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.settings import GENERATION_FILE, GenerationSettings
from dsv4.runtime.chat import Template, Turn, stop_ids
from dsv4.runtime.generate import Timings, TokenSession, generate
from dsv4.runtime.sampling import Sampler
from dsv4.runtime.text import Text


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of a prompt. `text` is None when the store carries no tokenizer."""

    prompt_tokens: list[int]
    generated_tokens: list[int]
    text: str | None
    finish: str  # "stop" or "length"
    timings: Timings

    def to_dict(self) -> dict[str, Any]:
        """What `dsv4 run --json` prints."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "text": self.text,
            "finish": self.finish,
            "timings": self.timings.to_dict(),
        }


def encode_prompt(prompt: str, text: Text, *, raw: bool) -> list[int]:
    """Token ids of `prompt`: as it stands when `raw`, else as the user's turn of a chat."""
    return text.encode(prompt) if raw else Template().encode([Turn(prompt)], text)


def parse_tokens(spelling: str) -> list[int]:
    """`1,2,3` -> ids. Raises RuntimeRefusal naming the part that is no token id."""
    ids = []
    for part in spelling.split(","):
        if not part.strip().isdecimal():
            raise RuntimeRefusal(
                f"--tokens holds {part.strip()!r}, expected token ids separated by commas"
            )
        ids.append(int(part))
    return ids


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
    *,
    text: Text | None,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    write: Callable[[str], object],
) -> Answer:
    """Generate, handing whole characters to `write` as they come. Raises RuntimeRefusal."""
    stops = frozenset(eos_token_ids) if text is None else stop_ids(eos_token_ids, text)
    stream = None if text is None else text.stream()
    timings = Timings()
    drawn: list[int] = []
    pieces: list[str] = []
    for token in generate(session, prompt_ids, max_new_tokens, sampler, stops, timings):
        drawn.append(token)
        piece = f"{token}," if stream is None else stream.push(token)
        pieces.append(piece)
        write(piece)
    if stream is not None:
        pieces.append(stream.flush())
        write(pieces[-1])
    return Answer(
        list(prompt_ids),
        drawn,
        None if text is None else "".join(pieces),
        "length" if len(drawn) == max_new_tokens else "stop",
        timings,
    )
