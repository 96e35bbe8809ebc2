"""Compression of the token stream into one key/value entry per block of tokens.

A token contributes a value `kv` and a gate per channel; an entry is the gate-softmax-weighted
sum over its block's slots, channel by channel. HCA: a block is its own `ratio` tokens. CSA and the
indexer overlap: projections are twice as wide, and the slots are the previous block's tokens with
their first half of channels, then this block's tokens with their second half.

The state between calls is a ring of the last `ratio` (overlap: `2·ratio`) tokens, slot =
`position mod length`, zero values and gates of -inf at the start, so that the block before the
first weighs nothing. Nothing is shifted when a block completes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels.reference.accumulate import WIDE


def compress(
    kv: Tensor, gate: Tensor, ape: Tensor, ring_kv: Tensor, ring_gate: Tensor, position: int
) -> Tensor:
    """Append a chunk of tokens; return the entries of the blocks it completes.

    kv, gate: float32 `[T, c·d]` for tokens `position ... position + T - 1`, `c` = 2 with overlap,
    else 1; ape: float32 `[ratio, c·d]`, added to the gate by place in the block;
    ring_kv, ring_gate: float32 `[c·ratio, c·d]`, updated in place.
    Returns float32 `[n, d]`, `n = (position + T) // ratio - position // ratio`, before norm and
    RoPE.
    """
    tokens, width = kv.shape
    ratio, ring = ape.shape[0], ring_kv.shape[0]
    place = torch.arange(position, position + tokens, device=kv.device)
    gate = gate + ape[place % ratio]
    blocks = (position % ratio + tokens) // ratio
    if blocks:
        history = torch.arange(position - position % ratio - (ring - ratio), position)
        past = (history % ring).to(kv.device)
        entries = _pool(
            torch.cat((ring_kv[past], kv)), torch.cat((ring_gate[past], gate)), blocks, ratio, ring
        )
    else:
        entries = kv.new_empty((0, width * ratio // ring))
    newest = place[-ring:] % ring
    ring_kv[newest] = kv[-ring:]
    ring_gate[newest] = gate[-ring:]
    return entries


def _pool(kv: Tensor, gate: Tensor, blocks: int, ratio: int, ring: int) -> Tensor:
    """Entries of `blocks` blocks from tokens that start at a block (overlap: one block before)."""
    if ring == ratio:
        kv_slots, gate_slots = (
            torch.unflatten(part[: blocks * ratio], 0, (blocks, ratio)) for part in (kv, gate)
        )
    else:
        kv_slots, gate_slots = _overlapping(kv, blocks, ratio), _overlapping(gate, blocks, ratio)
    weights = gate_slots.softmax(1, dtype=WIDE)
    return (weights * kv_slots).sum(1).to(torch.float32)


def _overlapping(tokens: Tensor, blocks: int, ratio: int) -> Tensor:
    """`[(blocks + 1)·ratio + ..., 2d]` -> `[blocks, 2·ratio, d]`: previous block, this block."""
    half = tokens.shape[1] // 2
    previous = tokens[: blocks * ratio, :half]
    current = tokens[ratio : (blocks + 1) * ratio, half:]
    pair = [torch.unflatten(part, 0, (blocks, ratio)) for part in (previous, current)]
    return torch.cat(pair, 1)
