"""All experts of a model, wherever they lie: tables that steps and prompts find them by.

A step's kernels read records of the GPU alone. One launch a layer copies what is absent into spare
records and notes it in the table, which is on the GPU as well: the host is not asked, and a graph
stays valid (`kernels.ops.experts.fetch`). A prompt needs nearly all experts of a layer: its cold
ones are copied into half of the spare records while the layer before is computed with the other.

What is computed does not depend on places, so every placement gives the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dsv4.runtime.load.placement import Counts, Placement

LayerCopy = tuple[int, int, int, int]
"""layer, its first record in host memory, how many, their place on the device"""


@dataclasses.dataclass(eq=False)
class ExpertMemory:
    """placement: of all experts. records: uint8 `[R, nbytes]`, on the device; host: `[C, nbytes]`.

    table: int32 `[L, E]`, places of the records now, -1 for none; hot_table: with nothing cached;
    prompt_table: when a prompt is at the layer; cold: the host's records. host_address: int64
    `[1]`; owners, used: int32 `[S]`, of the spare records, from `first_spare` on; state: int32
    `[2]`; counts, prompt_counts: `[L, E]`, how often an expert was chosen; fetched: int32 `[L]`.
    counting: also where nothing is cold.
    """

    placement: Placement
    records: Tensor
    host: Tensor
    table: Tensor
    hot_table: Tensor
    prompt_table: Tensor
    cold: Tensor
    host_address: Tensor
    owners: Tensor
    used: Tensor
    state: Tensor
    counts: Tensor
    prompt_counts: Tensor
    fetched: Tensor
    first_spare: int
    counting: bool
    keep: object = None

    @classmethod
    def make(
        cls,
        placement: Placement,
        records: Tensor,
        host: Tensor,
        host_address: int,
        *,
        counting: bool = False,
        keep: object = None,
    ) -> ExpertMemory:
        """records: with the hot experts in place; host: with the cold ones; keep: for as long."""
        device = records.device

        def number(values: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> Tensor:
            return torch.from_numpy(values).to(device)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        hot = number(placement.places())
        spare = max(placement.spare, 1)
        return cls(
            placement,
            records,
            host,
            hot.clone(),
            hot,
            number(placement.prompt_places()),
            number(placement.host_rows()),
            torch.tensor([host_address], dtype=torch.int64, device=device),
            zeros(spare) - 1,
            zeros(spare),
            zeros(2),
            zeros(*hot.shape),
            zeros(*hot.shape),
            zeros(len(hot)),
            int(placement.hot.sum()),
            counting,
            keep,
        )

    def __post_init__(self) -> None:
        self.prompt_copies = PromptCopies(self) if self.fetches else None

    @property
    def fetches(self) -> bool:
        """Whether a step has to look for experts, or to count them."""
        return self.counting or self.placement.cold > 0

    def arguments(self) -> dict[str, Tensor | int]:
        """By the names of `fetch_contract.fetch`, but for topk_idx and layer."""
        return {
            "table": self.table.view(-1),
            "cold": self.cold.view(-1),
            "host": self.host_address,
            "owners": self.owners,
            "used": self.used,
            "state": self.state,
            "counts": self.counts.view(-1),
            "fetched": self.fetched,
            "records": self.records,
            "first_spare": self.first_spare,
        }

    def forget(self) -> None:
        """Nothing is cached: spare records are free for something else."""
        self.table.copy_(self.hot_table)
        self.owners.fill_(-1)

    def counted(self) -> tuple[Counts, Counts]:
        """Of decode and of prompts since the last call; waits for the device."""
        found = [one.cpu().numpy().astype(np.float64) for one in (self.counts, self.prompt_counts)]
        self.counts.zero_()
        self.prompt_counts.zero_()
        return found[0], found[1]


class PromptCopies:
    """Cold experts of a prompt's layers, a layer ahead, on a stream of their own."""

    def __init__(self, memory: ExpertMemory) -> None:
        self.memory = memory
        self._layers: Sequence[LayerCopy] = tuple(memory.placement.staged())
        self._turns = {layer: turn for turn, (layer, *_) in enumerate(self._layers)}
        device = memory.records.device
        self._stream: torch.cuda.Stream | None = None
        self._copied: list[torch.cuda.Event] = []
        if device.type == "cuda" and self._layers:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._copied = [torch.cuda.Event() for _ in self._layers]  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """A chunk begins: the first two layers' experts are on their way."""
        if not self._layers:
            return
        self.memory.forget()
        for turn in range(min(2, len(self._layers))):
            self._copy(turn)

    def arrive(self, layer: int, topk_idx: Tensor) -> None:
        """What follows reads the experts of `layer`, of which the tokens chose topk_idx."""
        counts = self.memory.prompt_counts[layer]
        chosen = topk_idx.flatten().to(torch.int64)
        counts.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=torch.int32))
        turn = self._turns.get(layer)
        if turn is not None and self._stream is not None:
            torch.cuda.current_stream().wait_event(self._copied[turn])

    def leave(self, layer: int) -> None:
        """The experts of `layer` have been read: their records take those of a layer ahead."""
        turn = self._turns.get(layer)
        if turn is not None and turn + 2 < len(self._layers):
            self._copy(turn + 2)

    def _copy(self, turn: int) -> None:
        """Behind what the device has been told to do so far."""
        _, row, count, place = self._layers[turn]
        target, source = self.memory.records[place : place + count], self.memory.host
        if self._stream is None:
            target.copy_(source[row : row + count])
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            target.copy_(source[row : row + count], non_blocking=True)
            self._copied[turn].record(self._stream)
