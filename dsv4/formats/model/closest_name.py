"""The known name that is nearest to one that nobody knows: what a refusal shows beside it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator

from dsv4.formats.model.dialects import TRANSFORMERS_BLOCK, TRANSFORMERS_EXPERT, TRANSFORMERS_TOP

CUTOFF = 0.6  # of difflib's ratio: what is further away is no help

_BLOCK = re.compile(r"(?:layers|mtp)\.\d+\.")
_EXPERTS = ".experts."
_THEIRS: dict[str, list[str]] = {}  # hub stem -> transformers' names of it
for _name, _stem in (TRANSFORMERS_BLOCK | TRANSFORMERS_TOP).items():
    _THEIRS.setdefault(_stem, []).append(_name)
_LEAVES = {hub: theirs for theirs, hub in TRANSFORMERS_EXPERT.items()}


def closest_name(name: str, known: Iterable[str]) -> str | None:
    """The spelling of a tensor in `known` (hub names) that is nearest to the stored `name`.

    Spelt as the hub or as transformers does, whichever is nearer, in the same block as `name`;
    None when nothing is near.
    """
    prefixed = name.startswith("model.")
    bare = name.removeprefix("model.")
    block = _BLOCK.match(bare)
    prefix = block[0] if block else ""
    spellings = [
        spelling
        for hub in known
        if hub.startswith(prefix)
        and (prefix or not _BLOCK.match(hub))
        and (_EXPERTS in hub) <= (_EXPERTS in bare)
        for spelling in _spellings(prefix, hub.removeprefix(prefix))
    ]
    near = difflib.get_close_matches(bare, spellings, 1, CUTOFF)
    return ("model." if prefixed else "") + near[0] if near else None


def _spellings(prefix: str, rest: str) -> Iterator[str]:
    """A hub name behind its block, as the hub and as transformers write it."""
    yield prefix + rest
    stem = rest.removesuffix(".weight")
    leaf = rest[len(stem) :]
    head, _, projection = stem.rpartition(".")
    if head.startswith("ffn.experts."):
        theirs = [f"mlp{head.removeprefix('ffn')}.{_LEAVES[projection]}"]
    else:
        theirs = _THEIRS.get(stem, [])
    for spelling in theirs:
        yield f"{prefix}{spelling}{leaf}"
