"""Checksums against published vectors and other implementations."""

from __future__ import annotations

import hashlib
import json

import google_crc32c
import numpy as np
import pytest
import xxhash
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from dsv4.formats.store import digest
from dsv4.formats.store.file_digest import FileDigest, blake3_hex

# Inputs and roots of the Certificate Transparency reference implementation's own tests (RFC 6962).
CT_LEAVES = [
    "",
    "00",
    "10",
    "2021",
    "3031",
    "40414243",
    "5051525354555657",
    "606162636465666768696a6b6c6d6e6f",
]
CT_ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]

# test_vectors.json of the BLAKE3 team's repository: the first 32 bytes for 0, 1, ... 250, 0, 1, ...
BLAKE3_VECTORS = {
    0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    1: "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
    1023: "10108970eeda3eb932baac1428c7a2163b0e924c9a9e25b35bba72b28f70bd11",
    1024: "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7",
    1025: "d00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444",
    2049: "5f4d72f40d7a5f82b15ca2b2e44b1de3c2ef86c426c95c1af0b6879522563030",
}


@pytest.mark.parametrize("length", BLAKE3_VECTORS)
def test_blake3_of_its_authors(length: int) -> None:
    data = bytes(i % 251 for i in range(length))
    assert blake3_hex(data) == BLAKE3_VECTORS[length]
    checksums = FileDigest(max(length, 1))
    for i in range(0, length, 100):
        checksums.payload(memoryview(data[i : i + 100]))
    assert checksums.finish()[0] == BLAKE3_VECTORS[length]


@pytest.mark.parametrize("count", range(1, 9))
def test_merkle_root_of_rfc_6962(count: int) -> None:
    leaves = [bytes.fromhex(leaf) for leaf in CT_LEAVES[:count]]
    assert digest.merkle_root(leaves).hex() == CT_ROOTS[count - 1]


def test_merkle_root_of_nothing() -> None:
    assert digest.merkle_root([]) == hashlib.sha256(b"").digest()


def test_crc32c_of_rfc_3720() -> None:
    assert digest.crc32c(bytes(32)) == 0x8A9136AA
    assert digest.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert digest.crc32c(bytes(range(32))) == 0x46DD794E


@given(st.binary(max_size=300))
def test_crc32c_is_googles(data: bytes) -> None:
    assert digest.crc32c(data) == google_crc32c.value(data)


@given(st.binary(min_size=1, max_size=200), st.integers(1, 32), st.data())
def test_pieces_do_not_matter(payload: bytes, chunk: int, data: st.DataObject) -> None:
    payload = payload * chunk  # a whole number of chunks
    checksums = FileDigest(chunk)
    rest = memoryview(payload)
    while rest:
        taken = data.draw(st.integers(1, len(rest)))
        checksums.payload(rest[:taken])
        rest = rest[taken:]
    checksums.index(b"index")
    whole, xxh3 = checksums.finish()
    assert whole == blake3(payload + b"index").hexdigest()
    chunks = [payload[i : i + chunk] for i in range(0, len(payload), chunk)]
    expected = [xxhash.xxh3_64_intdigest(c) for c in chunks]
    assert digest.decode_digests(xxh3, len(chunks)).tolist() == expected
    assert len(xxh3) == digest.encoded_digests_length(len(chunks))


@pytest.mark.parametrize("text", ["AAAA", "AAAAAAAAAAA", "AAAAAAAAAA!=", "", "é" * 12])
def test_malformed_digests_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"digests|ASCII"):
        digest.decode_digests(text, 1)


def test_dense_index() -> None:
    raw = digest.dense_index(3, 4096)
    entries = np.frombuffer(raw[:-4], dtype="<u8").reshape(3, 2)
    assert entries.tolist() == [[0, 4096], [4096, 4096], [8192, 4096]]
    assert int.from_bytes(raw[-4:], "little") == google_crc32c.value(raw[:-4])


def test_canonical_json_is_one_encoding() -> None:
    a = {"b": [1, 2.5, None, True], "a": {"ü": "x", "c": -0.1}}
    b = json.loads(json.dumps(dict(reversed(a.items()))))
    assert digest.canonical_json(a) == digest.canonical_json(b)
    assert b" " not in digest.canonical_json(a)
    with pytest.raises(ValueError, match="JSON compliant"):
        digest.canonical_json(float("nan"))
