"""What a sequence remembers, as bytes: taken out of its caches, and put back into others.

At a multiple of a block of tokens no compressor has a block in progress. What goes on from there
needs the window, the last rows of rings whose blocks overlap, and all entries before. So a sequence
is saved as a *state* at such a position, which has a fixed size, and *blocks* of entries, one for
each block of tokens, which sequences with the same beginning share.

    state   window rows, ring rows: of the last tokens before the position, layer by layer
    block   entries and keys that the tokens of one block completed, layer by layer

The same code serves the CPU's caches and the GPU's: both are tensors whose first dimension is a
place in a ring (`position mod length`) or the number of an entry.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dsv4.formats.model.config import AttentionKind, ModelConfig
from dsv4.runtime.cache import LayerCache, WindowCache
from dsv4.runtime.gpu.caches import LayerCaches

BLOCK = 128  # tokens: the window's length, and a multiple of both ratios

_ALIGN = 16  # bytes, so that every part may be looked at in its own type


@dataclasses.dataclass(frozen=True, eq=False)
class Ring:
    """rows `[length, ...]` by position mod length, of which the last `kept` are needed."""

    rows: Tensor
    kept: int


@dataclasses.dataclass(frozen=True, eq=False)
class Entries:
    """rows `[capacity, ...]`: one for each block of `ratio` tokens."""

    rows: Tensor
    ratio: int


def block_tokens(config: ModelConfig) -> int:
    """Tokens of a block: BLOCK, or the least multiple of it that every ratio divides."""
    ratios = (config.compress_ratio(layer) for layer in range(config.num_hidden_layers))
    return math.lcm(BLOCK, *(ratio for ratio in ratios if ratio))


class SlotMemory:
    """The caches of one sequence, to be saved and loaded. block: tokens of a block.

    state_bytes, block_bytes: what a state and a block take; 0 where there is nothing to keep.
    """

    def __init__(
        self, rings: Sequence[Ring], entries: Sequence[Entries], block: int = BLOCK
    ) -> None:
        self.block = block
        self._rings, self._entries = tuple(rings), tuple(entries)
        sizes = [_aligned(one.kept * _row_bytes(one.rows)) for one in rings]
        self._ring_places = _running(sizes)
        self.state_bytes = sum(sizes)
        sizes = [_aligned(block // one.ratio * _row_bytes(one.rows)) for one in entries]
        self._entry_places = _running(sizes)
        self.block_bytes = sum(sizes)

    def save_state(self, position: int, state: Tensor) -> None:
        """At `position`, a multiple of a block, of which rings still hold the last rows.

        state: uint8 `[state_bytes]` where the caches are.
        """
        for one, start, rows in self._ring_rows(position):
            found = one.rows.index_select(0, rows).view(torch.uint8).flatten()
            state[start : start + len(found)] = found

    def load_state(self, position: int, state: Tensor) -> None:
        """What `save_state` saved at `position`. Rows of rings beside it are left as they are."""
        for one, start, rows in self._ring_rows(position):
            part = state[start : start + one.kept * _row_bytes(one.rows)]
            one.rows.index_copy_(
                0, rows, part.view(one.rows.dtype).view(one.kept, *one.rows.shape[1:])
            )

    def save_blocks(self, first: int, blocks: Tensor) -> None:
        """Blocks from number `first` on -> uint8 `[count, block_bytes]` where the caches are."""
        for part, rows in self._entry_rows(first, blocks):
            part.copy_(rows)

    def load_blocks(self, first: int, blocks: Tensor) -> None:
        """What `save_blocks` saved, into the same places."""
        for part, rows in self._entry_rows(first, blocks):
            rows.copy_(part)

    def _ring_rows(self, position: int) -> Iterator[tuple[Ring, int, Tensor]]:
        places: dict[tuple[int, int], Tensor] = {}
        for one, start in zip(self._rings, self._ring_places, strict=True):
            key = one.kept, one.rows.shape[0]
            if key not in places:
                last = torch.arange(position - one.kept, position, device=one.rows.device)
                places[key] = last % one.rows.shape[0]
            yield one, start, places[key]

    def _entry_rows(self, first: int, blocks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        count = blocks.shape[0]
        for one, start in zip(self._entries, self._entry_places, strict=True):
            each = self.block // one.ratio
            rows = one.rows[first * each : (first + count) * each].view(torch.uint8)
            width = each * _row_bytes(one.rows)
            yield blocks[:, start : start + width], rows.view(count, width)


def cpu_memory(
    config: ModelConfig,
    caches: Sequence[LayerCache],
    block: int,
    context: Sequence[WindowCache] = (),
) -> SlotMemory:
    """Of a session of the CPU. context: what its draft layers keep."""
    rings = [Ring(one.ring, one.window) for one in context]
    entries: list[Entries] = []
    for layer, cache in enumerate(caches):
        rings.append(Ring(cache.window.ring, config.sliding_window))
        ratio = config.compress_ratio(layer)
        overlap = config.attention_kind(layer) is AttentionKind.CSA
        for part in (cache.compressed, cache.index_keys):
            if part is not None:
                entries.append(Entries(part.entries, ratio))
                if overlap:
                    rings += [Ring(part.ring_kv, ratio), Ring(part.ring_gate, ratio)]
    return SlotMemory(rings, entries, block)


def gpu_memory(
    config: ModelConfig, caches: Sequence[LayerCaches], slot: int, block: int
) -> SlotMemory:
    """Of a slot of the GPU's caches."""
    rings: list[Ring] = []
    entries: list[Entries] = []
    for layer, cache in enumerate(caches):
        rings += [
            Ring(part[slot], config.sliding_window)
            for part in (cache.window_kv, cache.window_scales)
        ]
        ratio = config.compress_ratio(layer)
        overlap = config.attention_kind(layer) is AttentionKind.CSA
        for own in (cache.entries, cache.keys):
            if own is not None:
                entries += [Entries(part[slot], ratio) for part in (own.entries, own.scales)]
                if overlap:
                    rings += [Ring(part[slot], ratio) for part in (own.ring_kv, own.ring_gate)]
    return SlotMemory(rings, entries, block)


def _row_bytes(rows: Tensor) -> int:
    return math.prod(rows.shape[1:]) * rows.element_size()


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _running(sizes: Sequence[int]) -> list[int]:
    """Where each begins."""
    places = [0]
    for size in sizes:
        places.append(places[-1] + size)
    return places[:-1]
