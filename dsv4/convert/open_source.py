"""From what a user gives to a source: a directory, or a repository on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from dsv4.convert.local_source import LocalSource
from dsv4.convert.source import Source
from dsv4.formats.errors import SourceError

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


def open_source(
    src: str | Path,
    revision: str | None = None,
    *,
    on_wait: Callable[[str], None] | None = None,
) -> Source:
    """The checkpoint `src`: a directory, else a hub id `org/name` at `revision`.

    A directory of that name wins. on_wait: of the source, from its opening on.
    Raises SourceError, also for a revision of a directory.
    """
    if os.path.isdir(src):  # noqa: PTH112  # False for every string that can be no path
        if revision is not None:
            raise SourceError(f"--revision {revision} has no meaning for the directory {src}")
        return LocalSource(src)
    text = str(src)
    if os.path.exists(src):  # noqa: PTH110
        raise SourceError(f"{text} is a file; give the directory of a checkpoint")
    if isinstance(src, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise SourceError(f"there is no directory {text}; give one, or a hub id such as org/name")
    if not _HUB_ID.fullmatch(text):
        raise SourceError(
            f"{text!r:.200} is neither a directory nor a hub id such as org/name; give one of them"
        )
    # huggingface_hub takes half a second to import and is of use here only.
    from dsv4.convert.hub_source import HubSource

    return HubSource(text, revision, on_wait=on_wait)
