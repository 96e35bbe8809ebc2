"""One pass of consecutive tokens through the model, and what all layers share of it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.reference.rope import inverse_frequencies, rope_table


@dataclasses.dataclass(frozen=True)
class RopeTable:
    """Rotations by position: cos and sin, float32 `[max_seq_len, rotary_dim / 2]`."""

    cos: Tensor
    sin: Tensor

    def at(self, start: int, count: int, stride: int = 1) -> tuple[Tensor, Tensor]:
        """Rows for positions `start, start + stride, ...`, `count` of them."""
        rows = slice(start, start + count * stride, stride)
        return self.cos[rows], self.sin[rows]


@dataclasses.dataclass(frozen=True)
class RopeTables:
    """The two rotations: layers with a window only, and layers with a compressor."""

    sliding: RopeTable
    compressed: RopeTable

    @classmethod
    def build(cls, config: ModelConfig, max_seq_len: int, device: torch.device) -> RopeTables:
        positions = torch.arange(max_seq_len, device=device)
        dim = config.qk_rope_head_dim
        sliding = inverse_frequencies(dim, config.rope_theta, None)
        compressed = inverse_frequencies(dim, config.compress_rope_theta, config.yarn)
        return cls(
            RopeTable(*rope_table(sliding, positions)),
            RopeTable(*rope_table(compressed, positions)),
        )


class Step:
    """Tokens `position ... position + length - 1` of one sequence.

    ids: int64 `[T]` on the model's device.
    """

    def __init__(self, ids: Tensor, position: int, window: int, tables: RopeTables) -> None:
        self.ids = ids
        self.position = position
        self.length = ids.shape[0]
        self.tables = tables
        self.positions = torch.arange(position, position + self.length, device=ids.device)
        self.window_idx = self._window_rows(window)
        self._blocks: dict[int, Tensor] = {}

    def visible_blocks(self, ratio: int) -> Tensor:
        """Blocks of `ratio` tokens each token sees, its own included once complete: int64 `[T]`."""
        return (self.positions + 1) // ratio

    def most_blocks(self, ratio: int) -> int:
        """Blocks the last token sees."""
        return (self.position + self.length) // ratio

    def all_blocks(self, ratio: int) -> Tensor:
        """Every visible block of every token: int64 `[T, most_blocks]`, -1 for the others."""
        if ratio not in self._blocks:
            blocks = torch.arange(self.most_blocks(ratio), device=self.ids.device)
            visible = blocks < self.visible_blocks(ratio)[:, None]
            self._blocks[ratio] = torch.where(visible, blocks, -1)
        return self._blocks[ratio]

    def _window_rows(self, window: int) -> Tensor:
        """Rows of `WindowCache.extend`'s result that each token sees: int64 `[T, <= window]`."""
        history = min(self.position, window - 1)
        width = min(window, history + self.length)
        newest = history + torch.arange(self.length, device=self.ids.device)
        rows = newest[:, None] + torch.arange(1 - width, 1, device=self.ids.device)
        return rows.clamp(min=-1)
