"""Parts of a store that a pull left out: what the directory then holds, and how it says so.

Such a directory has no `dsv4.complete`, so that no reader takes it for whole; `dsv4.partial` stands
in its place, with the same members and what is absent. The manifest and its root are those of the
whole store; the nodes and files of absent parts are not there, and everybody who opens the store
sees one without them.

    {"format_version", "root", "metadata_sha256", "absent": ["draft"], "repo", "commit"}
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dsv4.formats.errors import StoreError
from dsv4.formats.plain_text import printable
from dsv4.formats.store.zarr_json import Hierarchy
from dsv4.formats.store_place import PART_MARKER as PART_MARKER
from dsv4.formats.store_place import PARTS as PARTS


class Absent(NamedTuple):
    """parts: of `PARTS`, sorted. repo, commit: where they are."""

    parts: tuple[str, ...]
    repo: str
    commit: str

    def sentence(self, root: Path) -> str:
        """What is not in the store in `root`, and the command that fetches it."""
        what = " and ".join(PARTS[part] for part in self.parts)
        words = ["dsv4", "pull", self.repo, str(root), "--revision", self.commit]
        return (
            f"{root}: {what} were left out when it was pulled; "
            f"`{printable(shlex.join(words), 400)}` fetches them"
        )

    def marker(self, whole: bytes) -> bytes:
        """The content of `dsv4.partial`. whole: that of the store's `dsv4.complete`."""
        found = json.loads(whole)
        found |= {"absent": list(self.parts), "repo": self.repo, "commit": self.commit}
        return json.dumps(found, indent=2).encode() + b"\n"


def read_absent(marker: Mapping[str, Any]) -> Absent:
    """What a parsed `dsv4.partial` says. Raises StoreError when it is malformed."""
    parts, repo, commit = (marker.get(key) for key in ("absent", "repo", "commit"))
    if (
        not isinstance(parts, list)
        or not parts
        or any(not isinstance(part, str) or part not in PARTS for part in parts)
        or not isinstance(repo, str)
        or not isinstance(commit, str)
    ):
        raise StoreError(f"{PART_MARKER} is malformed; pull the store again")
    return Absent(tuple(sorted(set(parts))), repo, commit)


def is_draft(path: str) -> bool:
    """Whether a node, or a file by its key, is of the draft layers."""
    return path == "mtp" or path.startswith("mtp/")


def without(hierarchy: Hierarchy, absent: Absent) -> Hierarchy:
    """The nodes that are there."""
    assert absent.parts == ("draft",)
    return Hierarchy(
        hierarchy.manifest,
        {path: own for path, own in hierarchy.groups.items() if not is_draft(path)},
        {path: spec for path, spec in hierarchy.arrays.items() if not is_draft(path)},
    )
