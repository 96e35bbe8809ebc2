"""What a GPU session has in its caches, handed to a session of the reference.

So the reference goes on after a context that it would take minutes to read by itself. FP8 rows and
FP4 keys are dequantised, which is exact; rings are copied by position, as both have their own
lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.kernels.core.contract import Buffers
from dsv4.kernels.ops.attention.reference import dequantize
from dsv4.kernels.ops.indexer.reference import key_values
from dsv4.runtime.cache import CompressedCache
from dsv4.runtime.gpu.session import GpuSession
from dsv4.runtime.session import Session

AT_ONCE = 1 << 16  # rows that are dequantised together


def take_over(session: Session, source: GpuSession) -> None:
    """`session`, empty and on the same device, gets what `source` remembers."""
    position, config = source.position, source.model.config
    for layer, cache in enumerate(session.caches):
        own = f"layers.{layer}."
        given = {n.removeprefix(own): t[0] for n, t in source.caches.items() if n.startswith(own)}
        ring = cache.window.ring
        places = _last(position, ring.shape[0], ring.device)
        rows = places % given["window_kv"].shape[0]
        ring[places % ring.shape[0]] = dequantize(
            given["window_kv"][rows], given["window_scales"][rows]
        ).to(ring.dtype)
        blocks = position // (config.compress_ratio(layer) or position + 1)
        for prefix, target in (("c", cache.compressed), ("i", cache.index_keys)):
            if target is not None:
                _take_compressed(target, given, prefix, position, blocks)
    session.skip_to(position)


def _take_compressed(
    target: CompressedCache, given: Buffers, prefix: str, position: int, blocks: int
) -> None:
    values = dequantize if prefix == "c" else key_values
    for first in range(0, blocks, AT_ONCE):
        part = slice(first, min(first + AT_ONCE, blocks))
        entries = values(given[f"{prefix}_entries"][part], given[f"{prefix}_scales"][part])
        target.entries[part] = entries.to(target.entries.dtype)
    places = _last(position, target.ring_kv.shape[0], target.ring_kv.device)
    for name, ring in (("ring_kv", target.ring_kv), ("ring_gate", target.ring_gate)):
        source = given[f"{prefix}_{name}"]
        ring[places % ring.shape[0]] = source[places % source.shape[0]]


def _last(position: int, count: int, device: torch.device) -> Tensor:
    """The last `count` positions before `position`."""
    return torch.arange(max(0, position - count), position, device=device)
