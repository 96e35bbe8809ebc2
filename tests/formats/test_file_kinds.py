"""Files told by their first bytes: each written by the program that writes such files."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from dsv4.formats.file_kinds import HEAD_BYTES, kind_of, misfit
from dsv4.formats.model.safetensors_header import MAX_HEADER_BYTES

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 5368709120\n" % (
    b"a" * 64
)


def _torch_saved(*, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(3)}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


KINDS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "empty"),
    "zeros": (bytes(5000), "a file that begins with zeros"),
    "LFS": (POINTER, "a Git LFS pointer"),
    "GGUF": (b"GGUF" + struct.pack("<IQQ", 3, 100, 20), "a GGUF file"),
    "torch.save": (_torch_saved(zipped=True), "a zip archive, as torch.save writes pickles"),
    "torch.save of old": (_torch_saved(zipped=False), "a pickle, which is never opened"),
    **{
        f"pickle {protocol}": (
            pickle.dumps({"a": [1]}, protocol),
            "a pickle, which is never opened",
        )
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
    "gzip": (gzip.compress(save({})), "a gzip archive"),
    "xz": (lzma.compress(save({})), "an xz archive"),
    "bzip2": (bz2.compress(save({})), "a bzip2 archive"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00", "a zstd archive"),
    "a program": (Path(sys.executable).read_bytes()[:4096], "a Linux program"),
    "a program elsewhere": (b"MZ\x90\0\3\0\0\0\4\0\0\0\xff\xff", "a Windows program"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\0\0", "an HDF5 file"),
    "HTML": (b'<!DOCTYPE html>\n<html class="">\n<head>', "an HTML page"),
    "HTML, later": (b"\xef\xbb\xbf\n <!-- a\nb --><HTML>", "an HTML page"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "an XML document"),
    "an error": (
        b'{"error":"Repository not found"}',
        'JSON that begins with \'{"error":"Repository not found"}\'',
    ),
    "words": (b"Entry not found", "text that begins with 'Entry not found'"),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("as_json", [False, True])
def test_each_kind_is_told(name: str, as_json: bool) -> None:
    content, kind = KINDS[name]
    assert kind_of(content, json=as_json) == kind
    assert kind_of(content[:HEAD_BYTES], json=as_json) == kind
    sentence = misfit("model.safetensors", content, json=as_json)
    expected = "a JSON document" if as_json else "a safetensors file"
    assert sentence is not None
    assert sentence.startswith(f"model.safetensors is {kind}, expected {expected}; ")
    assert "\n" not in sentence


@given(st.integers(2, MAX_HEADER_BYTES), st.binary(max_size=100))
def test_no_safetensors_file_is_taken_for_another(length: int, rest: bytes) -> None:
    """A header's length may be the first bytes of anything: 640 is a pickle's, 23117 MZ."""
    assert kind_of(length.to_bytes(8, "little") + b"{" + rest) is None


@pytest.mark.parametrize("magic", [b"\x80\x02", b"\x80\x04", b"\x1f\x8b", b"MZ", b"BZh", b"PK\3\4"])
def test_lengths_that_look_like_another_file(magic: bytes) -> None:
    prefix = magic.ljust(8, b"\0")
    assert kind_of(prefix + b'{"a":') is None
    assert kind_of(prefix) is None  # its first eight bytes, read alone
    assert kind_of(magic + b"\xff" * 20 + b"{") is not None


@given(
    st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.integers())), st.booleans()
)
def test_no_json_document_is_taken_for_another(value: dict[str, object], plain: bool) -> None:
    errors = {"error", "errors", "message", "detail"}
    kept = {key: part for key, part in value.items() if key not in errors}
    raw = json.dumps(kept, ensure_ascii=plain, indent=None if plain else 2).encode(
        errors="surrogatepass"
    )
    assert kind_of(raw, json=True) is None
    shards = kind_of(raw)
    assert shards is None or shards.startswith("JSON that begins with '{")


def test_an_error_as_a_number_is_a_document() -> None:
    assert kind_of(b'{"error": 5}', json=True) is None
    assert kind_of(b'{"error": {"code": 404}}', json=True) is not None


def test_long_words_are_cut_and_a_letter_cut_in_two_is_left_out() -> None:
    kind = kind_of(("雪" * 400).encode())
    assert kind == "text that begins with '" + "雪" * 100 + "...'"
