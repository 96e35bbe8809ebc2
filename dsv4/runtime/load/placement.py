"""Which experts live in the GPU's memory, and which in the host's: decided from counts.

An expert is in one of the two. *Hot* ones lie in the GPU's memory and stay there. The *cold* ones
lie in pinned host memory; those that tokens choose are brought into *spare* records of the GPU, and
while a prompt is read these hold the cold experts of two layers, one of which is being copied.

Counts are of decode, mixed with those of prompts where both are known: they choose differently, and
a map of prompts alone misses one in five of what decode wants.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from dsv4.formats.errors import OutOfSpaceError
from dsv4.formats.plain_text import size

DECODE_SHARE = 0.6
Counts = npt.NDArray[np.float64]
"""`[L, E]`, how often tokens chose each expert, in any unit."""
Experts = Literal["auto", "resident"] | int
"""Where experts live: as many on the GPU as fit, all of them, or this many bytes of them."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """hot: bool `[L, E]`. spare: records of the GPU beside those of the hot experts."""

    hot: npt.NDArray[np.bool_]
    spare: int

    @classmethod
    def resident(cls, layers: int, experts: int) -> Placement:
        """All on the GPU."""
        return cls(np.ones((layers, experts), bool), 0)

    def with_resident(self, layers: int) -> Placement:
        """With so many layers more, behind the others, all on the GPU."""
        more = np.ones((layers, self.hot.shape[1]), bool)
        return Placement(np.concatenate((self.hot, more)), self.spare)

    @property
    def records(self) -> int:
        """On the GPU."""
        return int(self.hot.sum()) + self.spare

    @property
    def cold(self) -> int:
        """Experts in host memory."""
        return int((~self.hot).sum())

    @property
    def most_cold(self) -> int:
        """Of a layer."""
        return int((~self.hot).sum(1).max(initial=0))

    def places(self) -> npt.NDArray[np.int32]:
        """`[L, E]`: records of the hot experts in the order of the model, -1 for the cold ones."""
        return _numbered(self.hot)

    def host_rows(self) -> npt.NDArray[np.int32]:
        """`[L, E]`: records in host memory likewise, -1 for the hot ones."""
        return _numbered(~self.hot)

    def staged(self) -> Iterator[tuple[int, int, int, int]]:
        """For a prompt, layers with cold experts: (layer, first host record, how many, place).

        Layers take turns at the two halves of the spare records.
        """
        row, hot = 0, int(self.hot.sum())
        counts = (~self.hot).sum(1).tolist()
        for turn, (layer, count) in enumerate((n, c) for n, c in enumerate(counts) if c):
            yield layer, row, count, hot + turn % 2 * self.most_cold
            row += count

    def prompt_places(self) -> npt.NDArray[np.int32]:
        """`[L, E]`: where each expert lies when a prompt comes to its layer."""
        found = self.places()
        for layer, _, count, place in self.staged():
            found[layer, ~self.hot[layer]] = np.arange(place, place + count)
        return found

    def misses(self, counts: Counts | None, top_k: int) -> float:
        """Of a token, expected with nothing cached: by counts, or where all are alike."""
        if counts is None:
            return float(top_k * self.cold / self.hot.shape[1])
        total = counts.sum(1)
        known = total > 0
        shares = np.where(~self.hot, counts, 0).sum(1)[known] / total[known]
        unknown = (~self.hot[~known]).mean(1).sum()
        return float(top_k * (shares.sum() + unknown))


def place(
    counts: Counts | None,
    shape: tuple[int, int],
    record_nbytes: int,
    budget: int,
) -> Placement:
    """As many hot experts as `budget` bytes of the GPU hold beside the spare records they leave.

    counts: None where nothing is known. shape: (L, E). The experts that were chosen most are hot;
    of equal ones those that leave every layer alike. There are as many spare records as the cold
    experts of two layers: so those of a step have room, too. Raises OutOfSpaceError when the budget
    does not hold them.
    """
    layers, experts = shape
    if counts is not None and counts.shape != shape:
        raise ValueError(f"counts of {counts.shape}, expected {shape}")
    room = budget // record_nbytes
    if room >= layers * experts:
        return Placement.resident(layers, experts)
    flat = np.arange(layers * experts)
    known = np.zeros(layers * experts) if counts is None else counts.ravel()
    order = np.lexsort((flat // experts, flat % experts, -known))
    spare = 2
    while spare <= room:
        hot = np.zeros(layers * experts, bool)
        hot[order[: room - spare]] = True
        found = Placement(hot.reshape(shape), spare)
        if 2 * found.most_cold <= spare:
            return found
        spare = 2 * found.most_cold
    raise OutOfSpaceError(
        f"experts in two places need {size(2 * experts * record_nbytes)} on the GPU at the most "
        f"for those that are in use, there are {size(max(budget, 0))}; a smaller --max-seq-len "
        "(of a server, fewer --slots) leaves more"
    )


def place_as_asked(
    experts: Experts,
    counts: Counts | None,
    shape: tuple[int, int],
    record_nbytes: int,
    room: int,
    name: str,
) -> Placement:
    """Like `place` within `room` bytes of the GPU called `name`, as somebody wants it.

    Raises OutOfSpaceError when what was asked for does not fit, and as `place`.
    """
    everything = shape[0] * shape[1] * record_nbytes
    if experts == "resident" and room < everything:
        raise OutOfSpaceError(
            f"the experts need {size(everything)}, {name} has {size(max(room, 0))} for them beside "
            "the other weights and a session; --experts auto keeps some in host memory"
        )
    if isinstance(experts, int) and min(experts, everything) > room:
        raise OutOfSpaceError(
            f"{size(experts)} of experts were asked for, {name} has {size(max(room, 0))} for them; "
            "give --experts less, or auto"
        )
    return place(
        counts, shape, record_nbytes, min(experts, room) if isinstance(experts, int) else room
    )


def mixed(decode: Counts, prompt: Counts) -> Counts | None:
    """One map of both, each by its share; None where neither counted anything."""
    sums = decode.sum(), prompt.sum()
    if not any(sums):
        return None
    if not all(sums):
        return decode + prompt
    both: Counts = DECODE_SHARE * decode / sums[0] + (1 - DECODE_SHARE) * prompt / sums[1]
    return both


def _numbered(which: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    numbers = np.cumsum(which.ravel()).reshape(which.shape) - 1
    return np.where(which, numbers, -1).astype(np.int32)
