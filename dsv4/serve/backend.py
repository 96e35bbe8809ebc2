"""What a scheduler needs of a processor: slots that read prompts and go on token by token.

The CPU (`cpu_backend`) and the GPU (`gpu_backend`) implement it; nothing above knows which. A slot
holds a sequence of up to `capacity` tokens. Work is put in order and may not be done when a call
returns; `Drawn.read` and `synchronize` wait. What a row gives does not depend on the rows beside
it, and not on how a prompt was cut, as long as no cut is below `least_chunk`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from dsv4.runtime.text.drafting import Proposer
from dsv4.runtime.text.sampling import Sampler
from dsv4.serve.jobs import TokenLogprob


@dataclasses.dataclass(frozen=True, eq=False)
class Draw:
    """What is wanted of a row of logits.

    mask: bool `[vocab]`, True for ids that may be drawn. logprobs: see `jobs.Job`.
    """

    sampler: Sampler
    mask: Tensor | None = None
    logprobs: int | None = None


class Drawn(Protocol):
    """Tokens that are being drawn."""

    def read(self) -> list[list[tuple[int, TokenLogprob | None]]]:
        """Wait for them: for each slot one, INVALID_TOKEN where logits were not finite; before it
        as many as drafts of the slot were right. What was appended beyond is forgotten.
        """


def right_drafts(drafts: Sequence[int], drawn: Sequence[int]) -> int:
    """How many drafts, from the first one on, are what was drawn in their places."""
    pairs = zip(drafts, drawn, strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


class Backend(Protocol):
    """slots of `capacity` tokens; most_rows: of one step.

    chunk: most tokens of a prompt that are read at once; least_chunk: fewer are read by steps,
    whose bytes differ. slack: how many tokens behind the last one written a slot may go on.
    block: tokens of a block; block_bytes, state_bytes: see `runtime.snapshots`. layout: names
    them: what is saved under one is not for another. most_drafts: what draft layers propose at
    once, 0 where there are none. experts_on_host: whether a step brings experts over the bus.
    """

    slots: int
    capacity: int
    vocab: int
    most_rows: int
    chunk: int
    least_chunk: int
    slack: int
    block: int
    block_bytes: int
    state_bytes: int
    layout: bytes
    most_drafts: int
    experts_on_host: bool

    def reset(self, slot: int) -> None:
        """Empty it."""

    def rewind(self, slot: int, position: int) -> None:
        """Go on at `position`, at most `slack` tokens behind the last one written."""

    def read(
        self,
        slot: int,
        ids: Sequence[int],
        *,
        marks: Sequence[int] = (),
        reached: Callable[[int], None] | None = None,
        logits: Callable[[Tensor], None] | None = None,
    ) -> None:
        """Append a part of a prompt; a draw is then from its last row.

        reached: is called for each position of `marks`, while a state may be saved there. logits:
        is called with the rows of all tokens in order, float32 `[few, vocab]`, to be looked at
        there and then.
        """

    def begin(self, slot: int, sampler: Sampler) -> None:
        """The prompt is read: `sampler` draws from now on."""

    def forward(self, slots: Sequence[int], drafts: Sequence[Sequence[int]] = ()) -> None:
        """Append to each slot the token that was drawn for it last, and its drafts behind it, if
        there are any; `most_rows` in all. With drafts, the draws are read before anything else.
        """

    def draw(self, draws: Sequence[Draw | None]) -> Drawn:
        """A token of each slot of the last `forward`, or the only one of `read`, and those after
        drafts that are right. None: not wanted. A slot with drafts is drawn by its seed alone:
        no mask, no logprobs, nothing that `Sampler.host_reason` names.

        Raises nothing for a row whose logits are not finite.
        """

    def proposer(self, slot: int) -> Proposer:
        """Of its draft layers, for the sequence there. Where there are any."""

    def save_state(self, slot: int, position: int, cells: Sequence[Tensor]) -> None:
        """The state at `position` into `cells`, one after another."""

    def save_blocks(self, slot: int, first: int, cells: Sequence[Tensor]) -> None:
        """The blocks from number `first` on, one into each cell."""

    def load(
        self, slot: int, position: int, blocks: Sequence[Tensor], state: Sequence[Tensor]
    ) -> None:
        """A sequence of `position` tokens: all its blocks, and its state."""

    def cells(self, count: int, size: int) -> Tensor:
        """uint8 `[count, size]` of host memory that is quickly copied from and to."""

    def synchronize(self) -> None:
        """Wait for everything."""
