"""What the files of a source add up to: its config, its tensors, and what was left unread."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dsv4.convert.sources.base import CONFIG_FILE, INDEX_FILE, MAX_CONFIG_BYTES, MAX_INDEX_BYTES
from dsv4.convert.sources.files import SourceFiles
from dsv4.convert.sources.index import (
    check_index,
    first_names,
    merge_headers,
    parse_index,
    parse_json,
)
from dsv4.formats.errors import ConfigError, NetworkError, SourceError
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.dialects import group
from dsv4.formats.model.inventory import detect_draft, parameters
from dsv4.formats.model.safetensors_header import TensorEntry
from dsv4.formats.model.source_inventory import is_vision

Header = Mapping[str, TensorEntry]
Headers = Callable[[Sequence[str]], Iterable[Header]]


@dataclasses.dataclass(frozen=True)
class Contents:
    """config: the parsed config.json. shards: the files that are read, sorted. entries: their
    tensors, by name. notices: whole sentences on files that are there and are not read.
    """

    config: dict[str, Any]
    shards: tuple[str, ...]
    entries: Mapping[str, TensorEntry]
    notices: tuple[str, ...]


def read_contents(
    files: SourceFiles,
    document: Callable[[str, int], bytes],
    headers: Headers,
    *,
    download: str,
    stale: str,
) -> Contents:
    """Read config.json, the index, and every header, those of unlisted files included.

    document: a small file of at most so many bytes. headers: of each file, in order.
    download, stale: what to do about a missing file, and about an index that lacks a needed one.
    Raises SourceError when anything is missing, contradicts itself, or is not what it is named.
    """
    config = _json(files, document, CONFIG_FILE, MAX_CONFIG_BYTES)
    index = None
    if INDEX_FILE in files.documents:
        raw = document(INDEX_FILE, MAX_INDEX_BYTES)
        index = parse_index(raw, f"{files.where}/{INDEX_FILE}")
    shards = files.checkpoint(index, download)
    entries = merge_headers(list(headers(shards)))
    notices = files.notices(shards)
    if index is not None:
        check_index(index, entries)
        unlisted = sorted({*files.shards} - {*shards})
        notices += _unlisted(unlisted, headers, entries, config, stale)
    return Contents(config, tuple(shards), entries, tuple(notices))


def _json(
    files: SourceFiles, document: Callable[[str, int], bytes], name: str, limit: int
) -> dict[str, Any]:
    return parse_json(document(name, limit), f"{files.where}/{name}")


def _unlisted(
    names: Sequence[str],
    headers: Headers,
    listed: Header,
    config: Mapping[str, Any],
    remedy: str,
) -> list[str]:
    """A sentence on each file that the index does not list. Raises SourceError for a needed one."""
    extra: dict[str, Header] = {}
    why: dict[str, str] = {}
    for name in names:
        try:
            (found,) = headers([name])
        except NetworkError:
            raise
        except SourceError as error:
            why[name] = str(error)
            continue
        new = {tensor: entry for tensor, entry in found.items() if tensor not in listed}
        extra[name] = new
        why[name] = "all of its tensors are in files that are listed"
        if new:
            why[name] = f"the model does not need its tensors ({first_names(sorted(new))})"
    _refuse_needed(extra, listed, config, remedy)
    return [f"{INDEX_FILE} does not list {n}, which is not read: {why[n]}" for n in names]


def _refuse_needed(
    extra: Mapping[str, Header], listed: Header, config: Mapping[str, Any], remedy: str
) -> None:
    new = {tensor: entry for header in extra.values() for tensor, entry in header.items()}
    if not new:
        return
    missing = _missing(listed, config)
    needed = sorted(missing - _missing({**listed, **new}, config)) if missing else []
    if needed:
        holders = sorted({entry.file for entry in new.values()})
        raise SourceError(
            f"{INDEX_FILE} does not list {first_names(holders)}, but {len(needed)} of the tensors "
            f"that the model needs are only there ({first_names(needed)}); {remedy}"
        )


def _missing(entries: Header, config: Mapping[str, Any]) -> set[str]:
    """Tensors of the model that `entries` do not hold; none where the config is not a model's."""
    try:
        model = ModelConfig.from_hf(dict(config))
    except ConfigError:
        return set()
    found = group({n: entry for n, entry in entries.items() if not is_vision(n)})
    draft, stages = detect_draft([*found.tensors, *found.problems])
    return {p.name for p in parameters(model, draft, stages)} - found.tensors.keys()
