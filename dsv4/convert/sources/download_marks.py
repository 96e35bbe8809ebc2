"""Downloads into a directory that the hub's own client has begun and not finished.

`hf download --local-dir DIR` writes to DIR/.cache/huggingface/download and moves each file to its
place when it is whole. What lies there unfinished belongs to another version of the file in place,
unless the record of the finished download has the same hash: then it is left from an older try.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Iterable
from pathlib import Path

_FOLDER = Path(".cache/huggingface/download")
_MAX_RECORD_BYTES = 1 << 12


def unfinished(directory: Path, files: Iterable[str]) -> dict[str, str]:
    """file -> path, relative to `directory`, of a download of it that did not finish."""
    folder = directory / _FOLDER
    found: dict[str, str] = {}
    try:
        names = [path.name for path in folder.iterdir() if path.name.endswith(".incomplete")]
    except OSError:
        return found
    if not names:
        return found
    owner = {}
    for file in files:
        # The name's hash since huggingface_hub 0.27, the name itself before.
        digest = hashlib.sha1(f"{file}.metadata".encode(), usedforsecurity=False).digest()
        owner[base64.urlsafe_b64encode(digest).decode()] = owner[file] = file
    for name in sorted(names):
        for key, file in owner.items():
            if name.startswith(f"{key}."):
                etag = name.removeprefix(f"{key}.").split(".")[0]
                if etag != _finished(folder / f"{file}.metadata"):
                    found[file] = str(_FOLDER / name)
    return found


def _finished(record: Path) -> str | None:
    """The hash of the download that was finished last, from lines of commit, hash and time."""
    with contextlib.suppress(OSError, IndexError, ValueError), record.open("rb") as file:
        return file.read(_MAX_RECORD_BYTES).decode().splitlines()[1].strip()
    return None
