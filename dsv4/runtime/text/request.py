"""What is asked of a store, made ready and checked before a weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.store.text_files import stored_text_files
from dsv4.runtime.session import check_ids
from dsv4.runtime.text.chat import Template, Turn, stop_ids
from dsv4.runtime.text.oneshot import answer_limit
from dsv4.runtime.text.sampling import Sampler
from dsv4.runtime.text.tokenizer import Text

RUN_MAX_SEQ_LEN = 8192


@dataclasses.dataclass(frozen=True)
class Request:
    """ids: the prompt; None for a chat. max_new_tokens: most tokens of an answer; None in a chat
    whose only bound is the room. max_seq_len: of the session. stop_ids: tokens that end an answer;
    stop: texts that do. cut: what allows a longer answer than `max_new_tokens`. notices: sentences.
    """

    text: Text | None
    template: Template
    sampler: Sampler
    stop_ids: frozenset[int]
    stop: tuple[str, ...]
    ids: list[int] | None
    max_new_tokens: int | None
    max_seq_len: int
    cut: str
    notices: tuple[str, ...]

    @property
    def needed_text(self) -> Text:
        """The tokenizer. Raises RuntimeRefusal where the store has none."""
        return _needed(self.text)


def make_request(
    packed: PackedCheckpoint,
    *,
    prompt: str | None,
    tokens: Sequence[int] | None,
    raw: bool,
    template: Template,
    stop: Sequence[str],
    max_new_tokens: int | None,
    max_seq_len: int | None,
    sampling: Mapping[str, Any],
) -> Request:
    """Read the store's text files, encode the prompt, and see that it fits; reads no weight.

    sampling: keywords of `Sampler.from_settings`; None is the checkpoint's own. Raises StoreError
    for a text file that cannot be used, RuntimeRefusal for everything that will not do.
    """
    found, config = stored_text_files(packed), packed.config
    settings = found.settings
    text = None if found.tokenizer is None else Text(found.tokenizer)
    allowed = config.vocab_size if text is None else text.vocab_size
    sampler = Sampler.from_settings(settings, **sampling, allowed=allowed)
    room = _room(max_seq_len, config.max_position_embeddings)
    ends = frozenset(settings.eos_token_ids)
    request = Request(
        text,
        template,
        sampler,
        ends if text is None else stop_ids(ends, text),
        tuple(stop),
        None,
        max_new_tokens or settings.max_new_tokens,
        room,
        "",
        (*found.tokenizer_notices, *settings.notices(greedy=sampler.greedy)),
    )
    if prompt is None and tokens is None:
        _needed(text)
        return request
    if stop:
        _needed(text)
    ids = (
        list(tokens) if tokens is not None else _encode(prompt or "", _needed(text), template, raw)
    )
    if len(ids) >= room:
        raise RuntimeRefusal(
            f"the prompt has {len(ids)} tokens, and --max-seq-len {room} leaves no room for an "
            f"answer; the model takes up to {config.max_position_embeddings}"
        )
    check_ids(torch.tensor(ids, dtype=torch.int64), 0, room, config.vocab_size)
    limit = max_new_tokens or answer_limit(settings, len(ids), room)
    cut = "--max-new-tokens N raises the limit"
    if limit > room - len(ids):
        limit, cut = room - len(ids), f"--max-seq-len N makes room, which is {room} now"
    return dataclasses.replace(
        request, ids=ids, max_new_tokens=limit, max_seq_len=len(ids) + limit, cut=cut
    )


def _room(asked: int | None, most: int) -> int:
    if asked is not None and asked > most:
        raise RuntimeRefusal(
            f"--max-seq-len is {asked}, expected 1 to {most} (the model's max_position_embeddings)"
        )
    return min(RUN_MAX_SEQ_LEN, most) if asked is None else asked


def _encode(prompt: str, text: Text, template: Template, raw: bool) -> list[int]:
    """Token ids of `prompt`: as it stands when `raw`, else as the user's turn of a chat."""
    return text.encode(prompt) if raw else template.encode([Turn(prompt)], text)


def _needed(text: Text | None) -> Text:
    if text is None:
        raise RuntimeRefusal(
            "the store carries no tokenizer.json; give --tokens, or convert a source that has one"
        )
    return text
