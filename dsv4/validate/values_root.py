"""The root of values: one name for what a store's tensors are worth, however they are stored.

The root of a store commits to its bytes, and to what it was made from. Two stores of the same model
may differ in both and hold the same numbers: packed from DeepSeek's MXFP4, from NVIDIA's NVFP4, or
from an export of either. This root is theirs: the Merkle tree hash of RFC 6962 over one leaf a
tensor in order of the names, canonical JSON of [name, shape, BLAKE3 of its values], these being
little-endian float32, or int64 of a table, row by row. The sign of a zero counts.
"""

from __future__ import annotations

import math

from blake3 import blake3
from torch import Tensor

from dsv4.formats.checkpoint import PackedCheckpoint, values_of
from dsv4.formats.numeric.operands import SF_ROWS
from dsv4.formats.store.digest import canonical_json, merkle_root
from dsv4.formats.threads import one_torch_thread
from dsv4.validate.checks.content import default_workers, in_parallel
from dsv4.validate.watch import Progress, Watch

TILE_BYTES = 8 << 20  # of float32


def values_root(
    packed: PackedCheckpoint, *, workers: int | None = None, progress: Progress | None = None
) -> str:
    """64 hex digits. Reads every weight, compared with its checksum. Raises StoreError."""
    watch = Watch(progress)
    names = sorted(packed.names())
    watch.expect(sum(map(packed.nbytes, names)))

    def leaf(name: str) -> bytes:
        watch.read(name, packed.nbytes(name))
        return canonical_json([name, list(packed.shape(name)), _hash(packed, name)])

    with one_torch_thread():
        leaves = list(in_parallel(leaf, names, workers or default_workers(), watch))
    packed.store.forget()
    return merkle_root(leaves).hex()


def _hash(packed: PackedCheckpoint, name: str) -> str:
    shape = packed.shape(name)
    digest = blake3()
    if not shape:
        digest.update(_bytes(packed.dequantize(name)))
        return digest.hexdigest()
    rows, row_bytes = shape[0], math.prod(shape[1:]) * 4
    step = max(TILE_BYTES // max(row_bytes, 1) // SF_ROWS, 1) * SF_ROWS
    for start in range(0, rows, step):
        stored = packed.stored_rows(name, start, min(start + step, rows))
        table = isinstance(stored, Tensor) and not stored.is_floating_point()
        digest.update(_bytes(stored if table and isinstance(stored, Tensor) else values_of(stored)))
    return digest.hexdigest()


def _bytes(values: Tensor) -> memoryview:
    return values.contiguous().numpy().data.cast("B")
