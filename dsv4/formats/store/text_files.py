"""The text files of a packed store, read as those of a source are, and whose fault it is."""

from __future__ import annotations

import hashlib

from dsv4.formats.checkpoint import PackedCheckpoint
from dsv4.formats.errors import StoreError
from dsv4.formats.model.text_files import TEXT_FILES, TextFileError, TextFiles, read_text_files


def stored_text_files(packed: PackedCheckpoint) -> TextFiles:
    """What the store carries for text. Reads no weight.

    Raises StoreError for a file that cannot be used, saying whether the source had it so.
    """
    store = packed.store
    try:
        files = {
            name: store.assets[name].read_bytes() for name in TEXT_FILES if name in store.assets
        }
    except OSError as error:
        raise StoreError(f"{error.filename} cannot be read: {error.strerror}") from None
    try:
        return read_text_files(files, packed.config)
    except TextFileError as error:
        listed = _listed_sha256(packed, error.file)
        if listed is None:
            advice = "correct the file in the source and convert again"
        elif listed == hashlib.sha256(files[error.file]).hexdigest():
            advice = "the source had the same file, so correct it there and convert again"
        else:
            advice = "the file is not what was packed: `dsv4 repair` makes it again from the source"
        raise StoreError(f"{store.root}: {error}; {advice}") from None


def _listed_sha256(packed: PackedCheckpoint, name: str) -> str | None:
    """SHA-256 of the source's file as the manifest has it; None where it says nothing."""
    listed = packed.store.manifest["source"].get("files")
    for one in listed if isinstance(listed, list) else ():
        if isinstance(one, dict) and one.get("name") == name:
            return str(one.get("sha256"))
    return None
