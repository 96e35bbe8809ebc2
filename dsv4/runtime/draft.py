"""Draft layers: they propose tokens that the model then confirms or rejects, several at a time.

A drafter reads what the backbone computed for each token and keeps rows of it in rings of its own,
the *context*. A row depends on its token's residual streams and ids alone, so bringing the context
up to date is a projection, for any number of tokens at once. A proposal attends to the context and
writes nothing into it: asked twice, a drafter says the same.

Like a session's caches, the rings hold SLACK tokens more than are needed, so that a sequence may go
on from that many tokens before its last one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.model.config import ModelConfig
from dsv4.runtime.cache import SLACK, WindowCache
from dsv4.runtime.layer import embedded
from dsv4.runtime.positions import RopeTable, RopeTables, Step

CHECK_TOKENS = 8  # that the check of a load pretends to have read
CHECK_ANCHORS = 2


@dataclasses.dataclass(frozen=True)
class Draft:
    """Proposals for the tokens that follow one that is drawn and not yet fed.

    ids: int64 `[k]`. logits: float32 `[k, vocab]`, of which each id is the argmax. confidence:
    float32 `[k]`, whose sigmoid estimates that the model accepts a row where it accepted all rows
    before; None of a drafter without a confidence head.
    """

    ids: Tensor
    logits: Tensor
    confidence: Tensor | None


class Drafter(Protocol):
    """Loaded draft layers: `dspark.DSpark` or `mtp.Mtp`.

    most: proposals at once. tapped: backbone layers whose output it reads, ascending.
    """

    @property
    def most(self) -> int: ...

    @property
    def tapped(self) -> tuple[int, ...]: ...

    def empty_context(self) -> tuple[WindowCache, ...]:
        """What it keeps of a sequence, before the first token."""

    def observe(
        self, tapped: Sequence[Tensor], step: Step, context: tuple[WindowCache, ...]
    ) -> None:
        """Bring `context` up to date with a step. tapped: streams `[T, m, D]` by tapped layer."""

    def propose(
        self,
        token: int,
        count: int,
        position: int,
        table: RopeTable,
        context: tuple[WindowCache, ...],
    ) -> Draft:
        """`count` proposals after `token`, which comes at `position`. table: rotations of sliding
        layers, `most` positions farther than `position`.
        """


def ring(window: int, width: int, dtype: torch.dtype, device: torch.device) -> WindowCache:
    """Empty: rows of `width` numbers, of which the last `window` are needed at any position."""
    return WindowCache(torch.zeros((window + SLACK, width), dtype=dtype, device=device), window)


def check_drafter(drafter: Drafter, config: ModelConfig, embed: Tensor, dtype: torch.dtype) -> None:
    """Draft from fixed ids, with their embeddings in place of what the backbone computes.

    embed: the model's `[vocab, D]`; dtype: of activations. Raises RuntimeRefusal where that shows
    layers that cannot draft: logits that are not finite, or the same id whatever is asked.
    """
    ids = torch.arange(1, 1 + CHECK_TOKENS, device=embed.device) * 31 % config.vocab_size
    tables = RopeTables.build(config, CHECK_TOKENS + drafter.most, embed.device)
    context = drafter.empty_context()
    with torch.no_grad():
        tapped = [
            embedded(embed, ids.roll(shift), dtype, config.hc_mult)
            for shift in range(len(drafter.tapped))
        ]
        drafter.observe(tapped, Step(ids, 0, config.sliding_window, tables), context)
        drafts = [
            drafter.propose(token, drafter.most, CHECK_TOKENS, tables.sliding, context)
            for token in ids[:CHECK_ANCHORS].tolist()
        ]
    parts = [part for draft in drafts for part in (draft.logits, draft.confidence)]
    if not all(bool(part.isfinite().all()) for part in parts if part is not None):
        found = "logits that are not finite"
    elif torch.cat([draft.ids for draft in drafts]).eq(drafts[0].ids[0]).all():
        found = f"token {int(drafts[0].ids[0])} whatever is asked"
    else:
        return
    raise RuntimeRefusal(
        f"the draft layers (mtp.*) propose {found}, so they are damaged or not of this model"
    )
