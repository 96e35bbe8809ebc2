"""The names a user may give a tensor: the hub's, transformers', either behind `model.`."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping

from dsv4.formats.model.dialects import TRANSFORMERS_BLOCK, TRANSFORMERS_EXPERT, TRANSFORMERS_TOP

_BLOCK = re.compile(r"((?:layers|mtp)\.\d+\.)(.+)")
_EXPERT = re.compile(r"ffn\.experts\.(\d+)\.(w[123])\.weight")


def _inverse(table: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for theirs, ours in table.items():
        found.setdefault(ours, []).append(theirs)
    return found


_TOP, _IN_BLOCK = _inverse(TRANSFORMERS_TOP), _inverse(TRANSFORMERS_BLOCK)
_PROJECTION = {ours: theirs for theirs, ours in TRANSFORMERS_EXPERT.items()}
_FUSED = {"w1": "gate_up_proj", "w2": "down_proj", "w3": "gate_up_proj"}


def names_of(name: str) -> list[str]:
    """All names of the hub-named tensor `name`, its own first."""
    found = [name, *_transformers(name)]
    return found + [f"model.{one}" for one in found]


def matches(glob: str, name: str) -> bool:
    """Whether `glob` matches the hub-named tensor `name` by any of its names."""
    return any(fnmatch.fnmatchcase(one, glob) for one in names_of(name))


def _transformers(name: str) -> list[str]:
    block = _BLOCK.fullmatch(name)
    prefix, rest = block.groups() if block else ("", name)
    if block and (expert := _EXPERT.fullmatch(rest)):
        number, projection = expert.groups()
        experts = f"{prefix}mlp.experts"
        own = f"{experts}.{number}.{_PROJECTION[projection]}.weight"
        return [own, f"{experts}.{_FUSED[projection]}"]
    table = _IN_BLOCK if block else _TOP
    stem = rest.removesuffix(".weight")
    leaf = rest[len(stem) :]
    return [f"{prefix}{theirs}{leaf}" for theirs in table.get(stem, ())]
