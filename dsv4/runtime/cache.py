"""What a sequence remembers, layer by layer. All of it is allocated when the session opens.

window      ring of key/value vectors, slot = position mod its length
compressed  one key/value entry per completed block, and the block in progress
index keys  (CSA) one indexer key per completed block, and the block in progress

Appending writes in place and never moves what is there; nothing depends on how long the sequence
already is. Rings hold SLACK tokens more than are needed to go on, so that a sequence may go on from
that many tokens before its last one.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dsv4.formats.model.config import AttentionKind, ModelConfig
from dsv4.kernels.reference.compressor import compress

SLACK = 64


@dataclasses.dataclass(frozen=True)
class WindowCache:
    """The last `window` tokens. ring: `[length, width]` in the model's dtype; what is needed to go
    on, and SLACK tokens more.
    """

    ring: Tensor
    window: int

    def extend(self, kv: Tensor, position: int) -> Tensor:
        """Append `kv [T, head_dim]` at `position`; return the window before it and itself.

        The result `[min(position, window - 1) + T, head_dim]` is in order of position and holds
        every vector that any of the `T` tokens sees.
        """
        visible = torch.cat((self.last(self.window - 1, position), kv))
        self.append(kv, position)
        return visible

    def last(self, count: int, position: int) -> Tensor:
        """The rows of the `count` tokens before `position`, in order; fewer at the beginning."""
        first = max(position - count, 0)
        return self.ring[torch.arange(first, position, device=self.ring.device) % len(self.ring)]

    def append(self, rows: Tensor, position: int) -> None:
        """Write `rows [T, width]` of the tokens from `position` on; the newest, of very many."""
        newest = min(len(self.ring), len(rows))
        end = position + len(rows)
        place = torch.arange(end - newest, end, device=rows.device) % len(self.ring)
        self.ring[place] = rows[-newest:]


@dataclasses.dataclass(frozen=True)
class CompressedCache:
    """Entries `[capacity, d]` in the model's dtype; rings of tokens in float32.

    ring_kv, ring_gate: `[state + SLACK - 1, c·d]`, where `state` tokens are what `compress` needs.
    """

    entries: Tensor
    ring_kv: Tensor
    ring_gate: Tensor
    state: int

    def clear(self) -> None:
        """Forget the block in progress: gates of -inf weigh nothing."""
        self.ring_kv.zero_()
        self.ring_gate.fill_(float("-inf"))

    def compress(self, kv: Tensor, gate: Tensor, ape: Tensor, position: int) -> Tensor:
        """Append a chunk of tokens; return the entries of the blocks it completes.

        See `kernels.reference.compressor.compress`, whose rings are the last `state` tokens before
        `position`: positions below 0 weigh nothing, whatever a ring holds in their place.
        """
        last = torch.arange(position - self.state, position, device=kv.device)
        recent, place = last % self.ring_kv.shape[0], last % self.state
        absent = (last < 0)[:, None]
        ring_kv = torch.empty_like(self.ring_kv[: self.state])
        ring_gate = torch.empty_like(self.ring_gate[: self.state])
        ring_kv[place] = self.ring_kv[recent].masked_fill(absent, 0.0)
        ring_gate[place] = self.ring_gate[recent].masked_fill(absent, float("-inf"))
        entries = compress(kv, gate, ape, ring_kv, ring_gate, position)
        newest = min(kv.shape[0], self.ring_kv.shape[0])
        end = position + kv.shape[0]
        appended = torch.arange(end - newest, end, device=kv.device)
        self.ring_kv[appended % self.ring_kv.shape[0]] = kv[-newest:]
        gates = gate[-newest:] + ape[appended % ape.shape[0]]
        self.ring_gate[appended % self.ring_gate.shape[0]] = gates
        return entries


@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's memory; `compressed` and `index_keys` are absent where the layer has none."""

    window: WindowCache
    compressed: CompressedCache | None
    index_keys: CompressedCache | None

    def clear(self) -> None:
        for part in (self.compressed, self.index_keys):
            if part is not None:
                part.clear()


def allocate(
    config: ModelConfig, max_seq_len: int, dtype: torch.dtype, device: torch.device
) -> tuple[LayerCache, ...]:
    """Empty caches of every layer for up to `max_seq_len` tokens."""

    def compressed(width: int, ratio: int, blocks_per_entry: int) -> CompressedCache:
        state = blocks_per_entry * ratio
        ring = (state + SLACK - 1, blocks_per_entry * width)
        cache = CompressedCache(
            entries=torch.empty((max_seq_len // ratio, width), dtype=dtype, device=device),
            ring_kv=torch.empty(ring, dtype=torch.float32, device=device),
            ring_gate=torch.empty(ring, dtype=torch.float32, device=device),
            state=state,
        )
        cache.clear()
        return cache

    layers = []
    for layer in range(config.num_hidden_layers):
        kind, ratio = config.attention_kind(layer), config.compress_ratio(layer)
        csa = kind is AttentionKind.CSA
        window = config.sliding_window
        ring = (window + SLACK - 1, config.head_dim)
        layers.append(
            LayerCache(
                window=WindowCache(torch.empty(ring, dtype=dtype, device=device), window),
                compressed=compressed(config.head_dim, ratio, 2 if csa else 1) if ratio else None,
                index_keys=compressed(config.index_head_dim, ratio, 2) if csa else None,
            )
        )
    return tuple(layers)
