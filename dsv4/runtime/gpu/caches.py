"""What sequences remember on the GPU, layer by layer: each sequence has one slot of every tensor.

Rings are longer than what is seen by the most rows that are written at once, so that these hide
nothing from their own first token; a place in a ring is `position mod length`. Entries and keys are
stored by the number of their block. Layouts: `ops.kv_cache`, `ops.attention`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dsv4.formats.model.config import AttentionKind, ModelConfig
from dsv4.kernels.ops.kv_cache.contract import KV_SCALES, Layer


@dataclasses.dataclass(frozen=True, eq=False)
class CompressorCache:
    """ring_kv, ring_gate: float32 `[slots, ring, c·d]`, of the last tokens. entries, scales: uint8
    `[slots, capacity, bytes]`, one for each block that is complete.
    """

    ring_kv: Tensor
    ring_gate: Tensor
    entries: Tensor
    scales: Tensor

    def clear(self, slot: int) -> None:
        """Forget the block in progress: gates of -inf weigh nothing."""
        self.ring_kv[slot].zero_()
        self.ring_gate[slot].fill_(float("-inf"))

    def arguments(self, prefix: str) -> dict[str, Tensor]:
        """The tensors by the names that `append` gives them."""
        return {
            f"{prefix}_ring_kv": self.ring_kv,
            f"{prefix}_ring_gate": self.ring_gate,
            f"{prefix}_entries": self.entries,
            f"{prefix}_scales": self.scales,
        }


@dataclasses.dataclass(frozen=True, eq=False)
class LayerCaches:
    """window_kv, window_scales: uint8 `[slots, ring, bytes]`. entries: of CSA and HCA; keys: the
    indexer's, of CSA.
    """

    window_kv: Tensor
    window_scales: Tensor
    entries: CompressorCache | None
    keys: CompressorCache | None

    def clear(self, slot: int) -> None:
        """Forget a sequence: what is not cleared is never looked at before it is written."""
        for part in (self.entries, self.keys):
            if part is not None:
                part.clear(slot)


def entry_capacity(capacity: int, ratio: int) -> int:
    """Blocks of `ratio` tokens for `capacity` tokens: a multiple of 4."""
    return max(1, -(-capacity // ratio // 4) * 4)


def allocate_caches(
    config: ModelConfig,
    slots: int,
    capacity: int,
    rows: int,
    device: torch.device,
    *,
    drafts: int = 0,
) -> tuple[LayerCaches, ...]:
    """Empty caches of `slots` sequences of up to `capacity` tokens, written `rows` at once.

    drafts: draft layers behind those of the backbone. Their rings have room besides for the row
    that a proposal reads more than a token does, and for the rows that it writes ahead.
    """

    def bytes_(*shape: int) -> Tensor:
        return torch.zeros((slots, *shape), dtype=torch.uint8, device=device)

    def compressor(layer: Layer, channels: int, row: int, scales: int) -> CompressorCache:
        both = 2 if layer.overlap else 1
        ring = (slots, both * layer.ratio + rows - 1, both * channels)
        blocks = entry_capacity(capacity, layer.ratio)
        return CompressorCache(
            torch.zeros(ring, device=device),
            torch.full(ring, float("-inf"), device=device),
            bytes_(blocks, row),
            bytes_(blocks, scales),
        )

    def of(kind: AttentionKind, ahead: int = 0) -> LayerCaches:
        layer, keys = Layer.of(config, kind), config.index_head_dim
        sliding, csa = kind is AttentionKind.SLIDING, kind is AttentionKind.CSA
        ring = layer.window + rows - 1 + ahead
        return LayerCaches(
            bytes_(ring, layer.row_bytes),
            bytes_(ring, KV_SCALES),
            None if sliding else compressor(layer, layer.width, layer.row_bytes, KV_SCALES),
            compressor(layer, keys, keys // 2, keys // 32) if csa else None,
        )

    backbone = (of(config.attention_kind(layer)) for layer in range(config.num_hidden_layers))
    ahead = 1 + (config.dspark_block_size or 0)
    return (*backbone, *(of(AttentionKind.SLIDING, ahead) for _ in range(drafts)))


def read_nbytes(config: ModelConfig, context: int, rows: int) -> int:
    """What a step of `rows` tokens reads of a sequence that has `context`: window, compressed
    entries and index keys, each once for all rows.
    """
    total = 0
    for layer in range(config.num_hidden_layers):
        kind, ratio = config.attention_kind(layer), config.compress_ratio(layer)
        row = Layer.of(config, kind).row_bytes + KV_SCALES
        total += min(context, config.sliding_window + rows) * row
        if kind is AttentionKind.HCA:
            total += context // ratio * row
        elif kind is AttentionKind.CSA:
            keys = context // ratio
            total += min(keys, config.index_topk * rows) * row
            total += keys * (config.index_head_dim // 2 + config.index_head_dim // 32)
    return total
