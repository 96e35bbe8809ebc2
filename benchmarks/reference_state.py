"""What a GPU session has in its caches, handed to a session of the reference.

So the reference goes on after a context that it would take minutes to read by itself. FP8 rows and
FP4 keys are dequantised, which is exact; rings are copied by position, as both have their own
lengths.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv4.kernels.ops.attention.reference import dequantize
from dsv4.kernels.ops.indexer.reference import key_values
from dsv4.runtime.cache import CompressedCache
from dsv4.runtime.gpu.caches import CompressorCache
from dsv4.runtime.gpu.session import GpuSession
from dsv4.runtime.session import Session

AT_ONCE = 1 << 16  # rows that are dequantised together


def take_over(session: Session, source: GpuSession) -> None:
    """`session`, empty and on the same device, gets what `source` remembers."""
    position, config, slot = source.position, source.model.config, source.slot
    for layer, cache in enumerate(session.caches):
        given = source.engine.buffers.caches[layer]
        ring, rows = cache.window.ring, given.window_kv[slot]
        places = _last(position, cache.window.window, ring.device)
        found = places % rows.shape[0]
        ring[places % ring.shape[0]] = dequantize(rows[found], given.window_scales[slot][found]).to(
            ring.dtype
        )
        blocks = position // (config.compress_ratio(layer) or position + 1)
        for target, values, compressor in (
            (cache.compressed, dequantize, given.entries),
            (cache.index_keys, key_values, given.keys),
        ):
            if target is not None and compressor is not None:
                _take_entries(target, compressor, slot, blocks, values)
                _take_rings(target, compressor, slot, position)
    session.skip_to(position)


def _take_entries(
    target: CompressedCache,
    source: CompressorCache,
    slot: int,
    blocks: int,
    values: Callable[[Tensor, Tensor], Tensor],
) -> None:
    for first in range(0, blocks, AT_ONCE):
        part = slice(first, min(first + AT_ONCE, blocks))
        entries = values(source.entries[slot, part], source.scales[slot, part])
        target.entries[part] = entries.to(target.entries.dtype)


def _take_rings(target: CompressedCache, source: CompressorCache, slot: int, position: int) -> None:
    places = _last(position, target.state, target.ring_kv.device)
    for ring, given in (
        (target.ring_kv, source.ring_kv[slot]),
        (target.ring_gate, source.ring_gate[slot]),
    ):
        ring[places % ring.shape[0]] = given[places % given.shape[0]]


def _last(position: int, count: int, device: torch.device) -> Tensor:
    """The last `count` positions before `position`."""
    return torch.arange(max(0, position - count), position, device=device)
