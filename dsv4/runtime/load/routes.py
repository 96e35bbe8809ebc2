"""How often tokens chose each expert, kept from one start to the next: what a placement goes by.

A file is JSON: the store's root, and counts of decode and of prompts apart, `[layers][experts]`.
Without a name it lies in the user's cache folder, named by the root of the store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from dsv4.formats.errors import RuntimeRefusal
from dsv4.runtime.load.placement import Counts, mixed

MAX_COUNT = 2**53  # what a float64 counts to


@dataclasses.dataclass(frozen=True)
class Routes:
    """Counts `[L, E]` of the store with `root`."""

    root: str
    decode: Counts
    prompt: Counts

    @classmethod
    def none(cls, root: str, shape: tuple[int, int]) -> Routes:
        """Nothing counted."""
        return cls(root, np.zeros(shape), np.zeros(shape))

    @property
    def counts(self) -> Counts | None:
        """What to place by."""
        return mixed(self.decode, self.prompt)

    def plus(self, decode: Counts, prompt: Counts) -> Routes:
        """With what was counted since."""
        return Routes(self.root, self.decode + decode, self.prompt + prompt)

    def write(self, path: Path) -> None:
        """Replace the file at `path`. Raises RuntimeRefusal when it cannot be written."""
        document = {
            "root": self.root,
            "decode": self.decode.round().astype(np.int64).tolist(),
            "prompt": self.prompt.round().astype(np.int64).tolist(),
        }
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(document))
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise RuntimeRefusal(f"{path} cannot be written: {error.strerror}") from None


def default_file(root: str) -> Path:
    """Where the counts of the store with `root` are kept when nobody says where."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "dsv4" / "routes" / f"{root}.json"


def read_routes(path: Path, root: str | None, shape: tuple[int, int]) -> Routes:
    """The counts in the file at `path`, none where there is no file. root: None for any store's.

    Raises RuntimeRefusal when it is not such a file, or of another store.
    """
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        return Routes.none(root or "", shape)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise RuntimeRefusal(f"{path} cannot be read: {reason}") from None
    if not isinstance(document, dict) or not isinstance(document.get("root"), str):
        raise RuntimeRefusal(
            f"{path} is not a routes file, expected JSON that `dsv4 run --routes FILE` writes"
        )
    if document["root"] != (root or document["root"]):
        raise RuntimeRefusal(
            f"{path} holds counts of another store; name another file with --routes"
        )
    decode, prompt = (
        _counts(document.get(name), shape, name, path) for name in ("decode", "prompt")
    )
    return Routes(document["root"], decode, prompt)


def _counts(found: Any, shape: tuple[int, int], name: str, path: Path) -> Counts:
    try:
        counts = np.asarray(found, np.float64)
    except (TypeError, ValueError, OverflowError):
        counts = np.empty(0)
    if counts.shape != shape or not ((counts >= 0) & (counts <= MAX_COUNT)).all():
        raise RuntimeRefusal(
            f"{path}: {name!r} is not {shape[0]} rows of {shape[1]} counts; remove the file"
        )
    return counts
