"""What makes a directory a packed store, at one look: for a refusal before torch is imported."""

from __future__ import annotations

import shlex
from pathlib import Path

from dsv4.formats.errors import NoStoreError

NODE_DOCUMENT = "zarr.json"
MARKER = "dsv4.complete"
JOURNAL = "journal.jsonl"
PART_MARKER = "dsv4.partial"
PARTS = {"draft": "the draft layers"}
"""What a pull may leave out, and what it is called."""


def refuse_no_store(root: Path) -> None:
    """Raise NoStoreError for what nobody would take for a store."""
    if not root.is_dir():
        if root.exists():
            raise NoStoreError(f"{root} is a file; give the directory of a packed checkpoint")
        raise NoStoreError(f"there is no directory {root}")
    if any((root / name).exists() for name in (MARKER, JOURNAL, NODE_DOCUMENT)):
        return
    if (root / "config.json").exists() or any(root.glob("*.safetensors")):
        raise NoStoreError(
            f"{root} is a checkpoint that is not packed; pack it first: "
            f"dsv4 convert --hf {shlex.quote(str(root))} --out ./packed"
        )
    raise NoStoreError(f"{root} is not a packed checkpoint: it has no {MARKER}")
