"""The header parser against the safetensors library: what it writes, and what must be refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from dsv4.formats.errors import SourceError
from dsv4.formats.model.safetensors_header import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    header_length,
    parse_header,
    read_header,
)

U8 = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
DATA = b"abcd"


def file_of(header: object, data: bytes = DATA) -> bytes:
    """A file of a header given as an object or as its very text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def library(raw: bytes) -> list[tuple[str, dict[str, Any]]]:
    """What the safetensors library makes of a file."""
    found: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(raw)  # type: ignore[no-untyped-call]  # its stub has no types
    return found


def entry(**changes: object) -> dict[str, Any]:
    return {"a": U8 | changes}


def pair(second: object) -> dict[str, Any]:
    return {"a": U8, "b": U8 | {"data_offsets": second}}


REFUSED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "is empty, expected a safetensors file"),
    "short file": (b"\x02\0\0\0", "is 4 bytes long, too short"),
    "length zero": (struct.pack("<Q", 0) + b"{}", "declares a header of 0 bytes"),
    "length over the limit": (
        struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}",
        "declares a header of 100000001 bytes",
    ),
    "length with the top bit": (struct.pack("<Q", 1 << 63) + b"{}", "declares a header of 9223"),
    "length beyond the file": (struct.pack("<Q", 100) + b"{}", "is truncated: it is 10 bytes"),
    "no JSON": (file_of(b"[1, 2"), "does not begin with '{'"),
    "a pickle": (file_of(b"\x80\x04\x95"), "does not begin with '{'"),
    "half JSON": (file_of(b'{"a": '), "is not valid JSON"),
    "two JSON objects": (file_of(b"{}{}", b""), "is not valid JSON: Extra data"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "is not valid JSON"),
    "NaN": (file_of(b'{"a": NaN}'), "NaN is no JSON value"),
    "deep nesting": (file_of(b'{"a":' * 100_000), "is not valid JSON"),
    "a huge number": (file_of(b'{"a": ' + b"9" * 5000 + b"}"), "is no 64-bit integer"),
    "negative zero": (
        file_of(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[-0,4]}}'),
        "is no 64-bit integer",
    ),
    "duplicate name": (
        file_of(b'{"a":%b,"a":%b}' % ((json.dumps(U8).encode(),) * 2)),
        "header has 'a' twice",
    ),
    "duplicate field": (
        file_of(b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}'),
        "header has 'dtype' twice",
    ),
    "metadata is null": (file_of({"__metadata__": None, "a": U8}), "no map from text to text"),
    "metadata is a list": (file_of({"__metadata__": [], "a": U8}), "no map from text to text"),
    "metadata holds a number": (file_of({"__metadata__": {"n": 1}, "a": U8}), "no map from text"),
    "entry is a list": (file_of({"a": ["U8", [4], [0, 4]]}), "tensor 'a' has list, expected the"),
    "entry without dtype": (file_of({"a": {"shape": [4], "data_offsets": [0, 4]}}), "expected the"),
    "entry with an extra field": (file_of(entry(strides=[1])), "expected the fields"),
    "unknown dtype": (file_of(entry(dtype="F7")), "tensor 'a' has the unknown dtype 'F7'"),
    "dtype is a number": (file_of(entry(dtype=8)), "has the unknown dtype 8"),
    "dtype in lower case": (file_of(entry(dtype="u8")), "has the unknown dtype 'u8'"),
    "shape is a number": (file_of(entry(shape=4)), "has the shape 4"),
    "shape of a bool": (file_of(entry(shape=[4, True])), r"has the shape \[4, True\]"),
    "shape of a float": (file_of(entry(shape=[4.0])), r"has the shape \[4.0\]"),
    "negative shape": (file_of(entry(shape=[-4])), r"has the shape \[-4\]"),
    "rank 9": (file_of(entry(shape=[1] * 8 + [4])), "expected at most 8"),
    "shape overflow": (file_of(entry(shape=[1 << 40, 1 << 40])), "overflows any file"),
    "shape overflow to zero": (
        file_of(entry(shape=[0, 1 << 63], data_offsets=[0, 0]), b""),
        "overfl",
    ),
    "one offset": (file_of(entry(data_offsets=[4])), r"has the data_offsets \[4\]"),
    "offset is a bool": (file_of(entry(data_offsets=[False, 4])), "has the data_offsets"),
    "negative offset": (file_of(entry(data_offsets=[-4, 0])), r"has the data_offsets \[-4, 0\]"),
    "end before begin": (file_of(entry(data_offsets=[4, 0])), r"has the data_offsets \[4, 0\]"),
    "size mismatch": (file_of(entry(shape=[3])), r"spans 4 bytes, expected 3 for U8 \[3\]"),
    "size mismatch of a scalar": (file_of(entry(shape=[])), "spans 4 bytes, expected 1"),
    "odd F4": (
        file_of({"a": {"dtype": "F4", "shape": [7], "data_offsets": [0, 4]}}),
        "spans 4 bytes, expected 28 bits",
    ),
    "overlap": (file_of(pair([2, 6]), b"abcdef"), r"tensor 'b' begins at byte \d+ inside"),
    "same bytes twice": (file_of(pair([0, 4])), "inside the tensor before it"),
    "hole": (file_of(pair([5, 9]), b"123456789"), "tensor 'b' begins .* after a hole of 1 bytes"),
    "hole at the start": (file_of(entry(data_offsets=[1, 5]), b"12345"), "after a hole of 1 bytes"),
    "trailing byte": (file_of({"a": U8}, b"abcde"), "has 1 bytes that belong to no tensor"),
    "data without tensors": (file_of({}), "has 4 bytes that belong to no tensor"),
    "one byte short": (file_of({"a": U8}, b"abc"), "tensor 'a' ends at byte .* truncated"),
    "path as name": (file_of({"../../etc/x": U8}), "tensor '../../etc/x' has a name"),
    "NUL in a name": (file_of({"a\0b": U8}), "has a name that is not"),
    "empty name": (file_of({"": U8}), "tensor '' has a name"),
    "empty component": (file_of({"a..b": U8}), "non-empty parts"),
    "leading dot": (file_of({".a": U8}), "non-empty parts"),
    "newline after a name": (file_of({"a\n": U8}), "has a name that is not"),
    "name of 257 letters": (file_of({"a" * 257: U8}), "1 to 256 letters"),
}

# The library reads these; a name given twice or a path as a name is where it is too generous.
LIBRARY_ACCEPTS = {
    "duplicate name",
    "metadata is null",
    "entry is a list",
    "entry with an extra field",
    "rank 9",
    "shape overflow to zero",
    "path as name",
    "NUL in a name",
    "empty name",
    "empty component",
    "leading dot",
    "newline after a name",
    "name of 257 letters",
}


@pytest.mark.parametrize("case", REFUSED)
def test_each_malformed_header_is_refused_with_its_sentence(case: str) -> None:
    raw, sentence = REFUSED[case]
    with pytest.raises(SourceError, match=sentence) as refusal:
        parse_header(raw, len(raw), "model-00001-of-00002.safetensors")
    assert str(refusal.value).startswith("model-00001-of-00002.safetensors")
    assert len(str(refusal.value)) < 800


@pytest.mark.parametrize("case", REFUSED)
def test_the_library_refuses_them_too_but_for_the_known_ones(case: str) -> None:
    raw, _ = REFUSED[case]
    if case in LIBRARY_ACCEPTS:
        library(raw)
        return
    with pytest.raises(safetensors.SafetensorError):
        library(raw)


@pytest.mark.parametrize(
    ("header", "data", "names"),
    [
        ({}, b"", []),
        ({"__metadata__": {}, "a": U8}, DATA, ["a"]),
        (json.dumps({"a": U8}).encode() + b" " * 57, DATA, ["a"]),
        ({"a": U8 | {"data_offsets": [4, 8]}, "b": U8}, DATA * 2, ["b", "a"]),
        (
            {"e": {"dtype": "F32", "shape": [0, 3], "data_offsets": [4, 4]}, "a": U8},
            DATA,
            ["a", "e"],
        ),
        ({"s": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, DATA, ["s"]),
        ({"f": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}}, DATA, ["f"]),
        ({"layers.0.ffn.gate.bias_vl": U8}, DATA, ["layers.0.ffn.gate.bias_vl"]),
    ],
)
def test_what_is_well_formed_is_read_in_file_order(
    header: object, data: bytes, names: list[str]
) -> None:
    raw = file_of(header, data)
    entries = parse_header(raw, len(raw), "x.safetensors")
    assert list(entries) == names
    assert sorted(names) == sorted(name for name, _ in library(raw))


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_of_the_library_has_its_size(dtype: str) -> None:
    size = DTYPE_BITS[dtype]  # bytes of 8 elements
    raw = file_of({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}, b"\0" * size)
    assert parse_header(raw, len(raw), "x")["a"].nbytes == size
    library(raw)


def test_the_dtypes_are_all_the_library_has() -> None:
    with pytest.raises(safetensors.SafetensorError, match="unknown variant") as refusal:
        library(file_of(entry(dtype="none")))
    known = str(refusal.value).partition("expected one of")[2].partition(" at line")[0]
    assert {name.strip(" `") for name in known.split(",")} == DTYPE_BITS.keys()


def test_offsets_are_those_of_the_file(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(12, dtype=torch.int64).reshape(3, 4),
        "b": torch.full((5,), 0.5).to(torch.float8_e4m3fn),
        "c": torch.full((7,), 4.0).to(torch.float8_e8m0fnu),
        "d": torch.tensor(3.0),
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(tensors, metadata={"format": "pt"}))
    raw, entries = path.read_bytes(), read_header(path)
    for name, tensor in tensors.items():
        found = entries[name]
        assert found.file == "x.safetensors"
        assert found.shape == tuple(tensor.shape)
        flat = tensor.reshape(-1).view(torch.uint8)
        assert raw[found.begin : found.end] == flat.numpy().tobytes()


def test_a_prefix_tells_the_header_length() -> None:
    raw = file_of({"a": U8})
    length = header_length(raw[:8], len(raw), "x")
    assert list(parse_header(raw[: 8 + length], len(raw), "x")) == ["a"]
    with pytest.raises(SourceError, match=f"header ends after {length - 1} of {length} bytes"):
        parse_header(raw[: 7 + length], len(raw), "x")


VALID = file_of(
    {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "I8", "shape": [2, 3], "data_offsets": [0, 6]},
        "a.scale": {"dtype": "F8_E8M0", "shape": [2, 1], "data_offsets": [6, 8]},
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [8, 12]},
    },
    b"0123456789ab",
)


def _set(at: int, byte: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[: at % len(raw)] + bytes([byte]) + raw[at % len(raw) + 1 :]


def _insert(at: int, byte: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[: at % len(raw)] + bytes([byte]) + raw[at % len(raw) :]


def _delete(at: int, _: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[: at % len(raw)] + raw[at % len(raw) + 1 :]


MUTATIONS = st.lists(
    st.builds(
        lambda kind, at, byte: kind(at, byte),
        st.sampled_from([_set, _insert, _delete]),
        st.integers(0, len(VALID) - 1),
        st.one_of(st.sampled_from(list(b'0123456789-,:[]{}"ab. ')), st.integers(0, 255)),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=1500, deadline=None)
@given(MUTATIONS)
def test_whatever_is_accepted_the_library_reads_the_same(
    mutations: list[Callable[[bytes], bytes]],
) -> None:
    raw = VALID
    for mutate in mutations:
        raw = mutate(raw)
    try:
        entries = parse_header(raw, len(raw), "x")
    except SourceError:
        return
    theirs = dict(library(raw))
    assert theirs.keys() == entries.keys()
    for name, found in entries.items():
        assert theirs[name]["dtype"] == found.dtype
        assert tuple(theirs[name]["shape"]) == found.shape
        assert bytes(theirs[name]["data"]) == raw[found.begin : found.end]
