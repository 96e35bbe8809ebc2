"""What the metadata of a store is hashed with: one encoding, one root, and indices of shards.

A chunk has an XXH3 for load time, a file a BLAKE3 for proof (see `file_digest`), and all of the
metadata one root: the Merkle tree hash of RFC 6962, section 2.1, over the leaves in order: leaf =
SHA256(0x00 || data), node = SHA256(0x01 || left || right), split at the largest power of two below
the count. The domain prefixes keep a node from passing as a leaf. The leaves of Flash are a few
megabytes, so being the published standard is worth more here than a faster hash.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

XXH3_BYTES = 8
_CRC32C_POLYNOMIAL = 0x82F63B78  # Castagnoli, reflected

Digests = npt.NDArray[np.uint64]


def canonical_json(value: Any) -> bytes:
    """The one encoding of a JSON value that is hashed: sorted keys, no spaces, ASCII.

    Raises ValueError for NaN and infinities, TypeError for what is no JSON type.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """Merkle tree hash (32 bytes) of `leaves` in their order, RFC 6962 section 2.1."""
    if not leaves:
        return hashlib.sha256().digest()
    return _subtree([hashlib.sha256(b"\x00" + leaf).digest() for leaf in leaves])


def _subtree(hashes: list[bytes]) -> bytes:
    if len(hashes) == 1:
        return hashes[0]
    split = 1 << ((len(hashes) - 1).bit_length() - 1)
    pair = _subtree(hashes[:split]) + _subtree(hashes[split:])
    return hashlib.sha256(b"\x01" + pair).digest()


def decode_digests(text: str, chunks: int) -> Digests:
    """The inverse of `ChunkDigests.finish`: uint64 `[chunks]`.

    Raises ValueError when `text` is not base64 of exactly that many digests.
    """
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"chunk digests are no base64: {error}") from None
    if len(raw) != chunks * XXH3_BYTES:
        raise ValueError(f"{len(raw)} bytes of chunk digests, expected {chunks * XXH3_BYTES}")
    return np.frombuffer(raw, dtype="<u8")


def encoded_digests_length(chunks: int) -> int:
    """Characters of the base64 text of `chunks` digests."""
    return -(-chunks * XXH3_BYTES // 3) * 4


@functools.lru_cache(maxsize=256)
def dense_index(chunks: int, chunk_nbytes: int) -> bytes:
    """The sharding codec's index of chunks that lie densely in C order (Zarr v3 specification).

    Little-endian uint64 (offset, nbytes) per chunk, then the crc32c of those bytes.
    """
    entries = np.empty((chunks, 2), dtype="<u8")
    entries[:, 0] = np.arange(chunks, dtype=np.uint64) * np.uint64(chunk_nbytes)
    entries[:, 1] = chunk_nbytes
    raw = entries.tobytes()
    return raw + crc32c(raw).to_bytes(4, "little")


def crc32c(data: bytes) -> int:
    """CRC-32C (RFC 3720, appendix B.4); meant for indices, not for payload."""
    table, crc = _crc32c_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@functools.cache
def _crc32c_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (_CRC32C_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)
