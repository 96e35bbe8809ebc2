"""What a sequence remembers, layer by layer. All of it is allocated when the session opens.

window      ring of the last `sliding_window` key/value vectors, slot = position mod window
compressed  one key/value entry per completed block, and the block in progress
index keys  (CSA) one indexer key per completed block, and the block in progress

Appending writes in place and never moves what is there; nothing depends on how long the sequence
already is.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dsv4.formats.model.config import AttentionKind, ModelConfig


@dataclasses.dataclass(frozen=True)
class WindowCache:
    """The sliding window. ring: `[window, head_dim]` in the model's dtype."""

    ring: Tensor

    def extend(self, kv: Tensor, position: int) -> Tensor:
        """Append `kv [T, head_dim]` at `position`; return the window before it and itself.

        The result `[min(position, window - 1) + T, head_dim]` is in order of position and holds
        every vector that any of the `T` tokens sees.
        """
        window = self.ring.shape[0]
        first = max(position - window + 1, 0)
        place = torch.arange(first, position + kv.shape[0], device=kv.device) % window
        visible = torch.cat((self.ring[place[: position - first]], kv))
        newest = min(window, kv.shape[0])
        self.ring[place[-newest:]] = kv[-newest:]
        return visible


@dataclasses.dataclass(frozen=True)
class CompressedCache:
    """Entries `[capacity, d]` in the model's dtype; the token ring of `compress` in float32."""

    entries: Tensor
    ring_kv: Tensor
    ring_gate: Tensor

    def clear(self) -> None:
        """Forget the block in progress: gates of -inf weigh nothing."""
        self.ring_kv.zero_()
        self.ring_gate.fill_(float("-inf"))


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
        ring = (blocks_per_entry * ratio, blocks_per_entry * width)
        cache = CompressedCache(
            entries=torch.empty((max_seq_len // ratio, width), dtype=dtype, device=device),
            ring_kv=torch.empty(ring, dtype=torch.float32, device=device),
            ring_gate=torch.empty(ring, dtype=torch.float32, device=device),
        )
        cache.clear()
        return cache

    layers = []
    for layer in range(config.num_hidden_layers):
        kind, ratio = config.attention_kind(layer), config.compress_ratio(layer)
        csa = kind is AttentionKind.CSA
        ring = torch.empty((config.sliding_window, config.head_dim), dtype=dtype, device=device)
        layers.append(
            LayerCache(
                window=WindowCache(ring),
                compressed=compressed(config.head_dim, ratio, 2 if csa else 1) if ratio else None,
                index_keys=compressed(config.index_head_dim, ratio, 2) if csa else None,
            )
        )
    return tuple(layers)
