"""One prompt, one answer: what `dsv4 run` does when it is not a chat."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsv4.formats.errors import RuntimeRefusal, StoreError
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


def sampling_defaults(path: Path | None) -> tuple[float, float]:
    """-> (temperature, top_p) of a `generation_config.json`; (1, 1) when there is none."""
    if path is None:
        return 1.0, 1.0
    try:
        raw = json.loads(path.read_text())
        sampled = bool(raw.get("do_sample", True))
        return (float(raw.get("temperature", 1.0)) if sampled else 0.0), float(
            raw.get("top_p", 1.0)
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{path.name}: not a generation config ({error}); copy it again from the source"
        ) from None
