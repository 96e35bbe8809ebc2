"""The documents around the tensors: config.json, the index, and what the headers add up to.

Both kinds of source check them with the same functions; all of them are the checkpoint author's
words and are taken at none of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsv4.convert.sources.base import INDEX_FILE
from dsv4.formats.errors import SourceError
from dsv4.formats.file_kinds import misfit
from dsv4.formats.model.safetensors_header import TensorEntry
from dsv4.formats.strict_json import DuplicateKeyError, parse_strict

_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,242}\.safetensors")  # 255 bytes: a file name
_NUMBERED = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.safetensors")
MAX_SHARDS = 1 << 12


def is_shard_name(name: str) -> bool:
    """Whether `name` is the plain name of a safetensors file, fit to be asked for."""
    return _SHARD.fullmatch(name) is not None


def first_names(names: Sequence[str], shown: int = 3) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


def parse_json(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object, read strictly; `what` names it in a SourceError."""
    if problem := misfit(what, raw, json=True):
        raise SourceError(problem)
    try:
        value = parse_strict(raw)
    except DuplicateKeyError as error:
        raise SourceError(f"{what} is ambiguous: it has {error} twice in one object") from None
    except ValueError as error:
        raise SourceError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise SourceError(f"{what} is a JSON {type(value).__name__}, expected an object")
    return value


def parse_index(raw: bytes, what: str) -> dict[str, str]:
    """The index's map from tensor name to file name; its metadata is often stale and ignored."""
    weight_map = parse_json(raw, what).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{what} has no weight_map from tensor names to file names")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not is_shard_name(name):
            raise SourceError(
                f"{what}: tensor {tensor[:256]!r} is said to be in {name!r:.256}, expected the "
                "plain name of a .safetensors file in the same directory"
            )
    return weight_map


def numbered_siblings(names: Iterable[str]) -> set[str]:
    """All parts of every numbered set of which one is there."""
    matches = filter(None, map(_NUMBERED.fullmatch, names))
    return {
        f"{stem}-{part:05d}-of-{parts:05d}.safetensors"
        for stem, parts in {(match["stem"], int(match["parts"])) for match in matches}
        if parts <= MAX_SHARDS
        for part in range(1, parts + 1)
    }


def merge_headers(headers: Sequence[Mapping[str, TensorEntry]]) -> dict[str, TensorEntry]:
    """All tensors of all files, by name. Raises SourceError when two files have the same one."""
    merged: dict[str, TensorEntry] = {}
    for header in headers:
        for name, entry in header.items():
            if name in merged:
                raise SourceError(
                    f"tensor {name} is in {merged[name].file} and in {entry.file}; "
                    "remove the file that does not belong to this checkpoint"
                )
            merged[name] = entry
    return merged


def check_index(index: Mapping[str, str], entries: Mapping[str, TensorEntry]) -> None:
    """The index and the headers name the same tensors in the same files."""
    for name, file in index.items():
        if name not in entries or entries[name].file != file:
            found = f"it is in {entries[name].file}" if name in entries else "no file has it"
            raise SourceError(
                f"{INDEX_FILE} puts tensor {name[:256]!r} in {file}, but {found}; download both "
                "again"
            )
    if unlisted := [name for name in entries if name not in index]:
        raise SourceError(
            f"{len(unlisted)} tensors are in no entry of {INDEX_FILE} ({first_names(unlisted)}); "
            "download the index again"
        )
