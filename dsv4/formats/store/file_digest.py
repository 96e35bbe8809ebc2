"""Hashes of a file's content: XXH3 per chunk for load time, BLAKE3 of all of it for proof.

Load time needs speed (XXH3-64: 20 GB/s a core from memory), publishing needs collision resistance:
BLAKE3, 6.4 GB/s where SHA-256 gives 1.8 on the same core. They stay two, since a chunk is checked
by itself when it is first used, and beside BLAKE3 an XXH3 costs a tenth. Whoever only loads chunks
imports neither this module nor blake3.
"""

from __future__ import annotations

import base64

import xxhash
from blake3 import blake3

from dsv4.formats.store.digest import XXH3_BYTES


def blake3_hex(data: bytes) -> str:
    """BLAKE3 of `data`, 256 bits in hex."""
    return blake3(data).hexdigest()


class ChunkDigests:
    """XXH3-64 of each chunk of a file's payload, fed with pieces of any length."""

    def __init__(self, chunk_nbytes: int) -> None:
        self._chunk_nbytes = chunk_nbytes
        self._xxh3 = xxhash.xxh3_64()
        self._filled = 0
        self._digests = bytearray()

    def payload(self, piece: memoryview) -> None:
        """Account for bytes of chunks."""
        begin = 0
        while begin < len(piece):
            end = min(len(piece), begin + self._chunk_nbytes - self._filled)
            self._xxh3.update(piece[begin:end])
            self._filled += end - begin
            begin = end
            if self._filled == self._chunk_nbytes:
                self._close_chunk()

    def finish(self) -> str:
        """Base64 of the chunks' little-endian XXH3-64 digests."""
        if self._filled or not self._digests:
            self._close_chunk()
        return base64.b64encode(self._digests).decode("ascii")

    def _close_chunk(self) -> None:
        self._digests += self._xxh3.intdigest().to_bytes(XXH3_BYTES, "little")
        self._xxh3.reset()
        self._filled = 0


class FileDigest:
    """BLAKE3 of a file and XXH3-64 of each of its chunks, fed with pieces of any length."""

    def __init__(self, chunk_nbytes: int) -> None:
        self._blake3 = blake3()
        self._chunks = ChunkDigests(chunk_nbytes)

    def payload(self, piece: memoryview) -> None:
        """Account for bytes of chunks."""
        self._blake3.update(piece)
        self._chunks.payload(piece)

    def index(self, piece: bytes) -> None:
        """Account for bytes behind the chunks, which only the BLAKE3 covers."""
        self._blake3.update(piece)

    def finish(self) -> tuple[str, str]:
        """-> (BLAKE3 as hex, base64 of the chunks' little-endian XXH3-64 digests)."""
        return self._blake3.hexdigest(), self._chunks.finish()
