"""A model that follows a script: for schedulers and servers, without weights.

Its sessions check and count tokens as every session does, and have no caches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.runtime.session import SequenceBase, capacity_of
from tests.runtime.small_models import TRANSFORMERS_TINY

CPU = torch.device("cpu")
Script = Callable[[Sequence[int]], int]
"""All tokens of a sequence so far -> the next one; negative for logits that are not finite."""


def following(answer: Sequence[int], after: int, otherwise: int) -> Script:
    """`answer`, behind the last token `after` of a sequence; `otherwise` behind its end."""

    def script(tokens: Sequence[int]) -> int:
        said = list(tokens[::-1]).index(after)
        return answer[said] if said < len(answer) else otherwise

    return script


def sums(vocab: int) -> Script:
    """A token that depends on all that came before, so that no mistake goes unnoticed."""

    def script(tokens: Sequence[int]) -> int:
        found = 7
        for token in tokens:
            found = (found * 31 + token + 1) % 1_000_003
        return found % vocab

    return script


@dataclasses.dataclass(eq=False)
class ScriptedModel:
    """vocab: ids. ran: is called with the number of tokens of each run, as a clock or to fail."""

    script: Script
    vocab: int = 64
    max_position_embeddings: int = 1 << 16
    ran: Callable[[int], None] = lambda rows: None
    device: torch.device = CPU

    @property
    def config(self) -> ModelConfig:
        """That of a small model, which looks as if it had no layers."""
        return dataclasses.replace(
            TRANSFORMERS_TINY,
            vocab_size=self.vocab,
            max_position_embeddings=self.max_position_embeddings,
        )

    def session(self, max_seq_len: int | None = None) -> Any:
        """An empty sequence."""
        return ScriptedSession(self, max_seq_len)


class ScriptedSession(SequenceBase):
    """The token that the script says has the largest logit; the others are in order."""

    slack = 1 << 30
    caches: tuple[()] = ()
    context: tuple[()] = ()

    def __init__(self, model: ScriptedModel, max_seq_len: int | None = None) -> None:
        config = model.config
        super().__init__(config, capacity_of(config, max_seq_len), model.device)
        self.model = model

    def skip_to(self, position: int) -> None:
        """Refused: it has nothing but its tokens, so that nothing can be put in their place."""
        raise AssertionError("a scripted session was asked to go on from a state")

    def _clear(self) -> None:
        pass

    def _is_chunk(self, left: int) -> bool:
        return False

    def _most_rows(self, chunk: bool) -> int:
        return 512

    def _append(self, ids: Tensor, logits: Tensor, *, chunk: bool) -> None:
        self.model.ran(len(ids))
        end = self._position + len(ids)
        tokens = self._ids[:end].tolist()
        for row, logit in enumerate(logits, end - len(logits) + 1):
            said = self.model.script(tokens[:row])
            logit.copy_(-torch.arange(self.model.vocab) / self.model.vocab)
            logit[said] = 1.0 if said >= 0 else torch.nan
