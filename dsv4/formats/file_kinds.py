"""What a file is that is not what its name says, told by its first bytes alone.

Downloads go wrong in few ways, and each leaves a file of its own kind: a Git LFS pointer, a page
that asks for a login, an error in JSON, a file of zeros, another program's format. Nothing here is
parsed, and no pickle or archive is ever opened: the bytes are only compared.
"""

from __future__ import annotations

import re

HEAD_BYTES = 512  # enough for every kind, and for the words that are quoted
_QUOTED = 100
_MAX_HEADER_BYTES = 100_000_000  # of a safetensors header, by its specification

_FETCH = "download the file itself"
_OTHER_FORMAT = "give a checkpoint of safetensors files"
_UNPACK = "unpack it, or download the file itself"

# What a file is -> what to do about it.
_ADVICE = {
    "a Git LFS pointer": "run `git lfs pull` in its clone, or download the file itself",
    "a GGUF file": _OTHER_FORMAT,
    "an HDF5 file": _OTHER_FORMAT,
    "a pickle, which is never opened": _OTHER_FORMAT,
    "a zip archive, as torch.save writes pickles": _OTHER_FORMAT,
    "an HTML page": f"{_FETCH}; its repository may ask for a login first",
    "an XML document": f"{_FETCH}; a server's answer may have been saved in its place",
    "a gzip archive": _UNPACK,
    "a zstd archive": _UNPACK,
    "an xz archive": _UNPACK,
    "a bzip2 archive": _UNPACK,
    "a Windows program": _FETCH,
    "a Linux program": _FETCH,
    "empty": _FETCH,
    "a file that begins with zeros": f"{_FETCH}; a download that was cut leaves such files",
}
_ANSWER = f"{_FETCH}; a server's answer may have been saved in its place"

_MAGIC = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer"),
    (b"version https://hawser.github.com/spec/", "a Git LFS pointer"),  # as it was called at first
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"PK\x03\x04", "a zip archive, as torch.save writes pickles"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"\xfd7zXZ\0", "an xz archive"),
    (b"BZh", "a bzip2 archive"),
    (b"MZ", "a Windows program"),
    (b"\x7fELF", "a Linux program"),
)
_PICKLE = re.compile(rb"\x80[\x02-\x05][^\0]")  # protocol 2 to 5
_HTML = re.compile(rb"(<!--.*?-->\s*)*<(!doctype\s+html|html|head|body)\b", re.I | re.S)
_ERROR = re.compile(r'\{\s*"(error|errors|message|detail)"\s*:\s*["{[]')


def kind_of(first_bytes: bytes, *, json: bool = False) -> str | None:
    """What a file is, as the end of the sentence "it is ...", told by its first bytes.

    None: nothing speaks against its being a safetensors file or, with `json`, a JSON document. An
    error that a server sent as JSON is named in either case. first_bytes: up to HEAD_BYTES are
    looked at; fewer only where the file is shorter.
    """
    head = first_bytes[:HEAD_BYTES]
    if not head:
        return "empty"
    if not json and _begins_as_safetensors(head):
        return None
    if not head.strip(b"\0"):
        return "a file that begins with zeros"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if _PICKLE.match(head):
        return "a pickle, which is never opened"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _HTML.match(start):
        return "an HTML page"
    if start.startswith(b"<?xml"):
        return "an XML document"
    return _text(start, json=json)


def misfit(name: str, first_bytes: bytes, *, json: bool = False) -> str | None:
    """A whole sentence on a file that is not what it is named, and what to do; else None."""
    kind = kind_of(first_bytes, json=json)
    if kind is None:
        return None
    expected = "a JSON document" if json else "a safetensors file"
    return f"{name} is {kind}, expected {expected}; {_ADVICE.get(kind, _ANSWER)}"


def _begins_as_safetensors(head: bytes) -> bool:
    """Whether a header of a possible length follows: first bytes of lengths look like anything."""
    length = int.from_bytes(head[:8], "little")
    return 2 <= length <= _MAX_HEADER_BYTES and head[8:9] in (b"{", b"") and len(head) >= 8


def _text(start: bytes, *, json: bool) -> str | None:
    try:
        text = start.decode()
    except UnicodeDecodeError as error:
        if error.end < len(start):  # else a letter that HEAD_BYTES cut in two
            return None
        text = start[: error.start].decode()
    if not text or not all(letter.isprintable() or letter in "\t\r\n" for letter in text):
        return None
    is_json = text[0] in "{["
    if json and (not text.strip() or (is_json and not _ERROR.match(text))):
        return None
    words = " ".join(text.split())
    shown = words[:_QUOTED] + ("..." if len(words) > _QUOTED else "")
    return f"{'JSON' if is_json else 'text'} that begins with {shown!r}"
