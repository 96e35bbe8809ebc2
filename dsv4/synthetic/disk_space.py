"""Room on a disk, asked for before a measurement fills it."""

from __future__ import annotations

import shutil
from pathlib import Path

from dsv4.formats.errors import OutOfSpaceError
from dsv4.formats.plain_text import size


def require_space(directory: Path, nbytes: int) -> None:
    """Raise OutOfSpaceError unless `directory` has `nbytes` free."""
    free = shutil.disk_usage(directory).free
    if free < nbytes:
        raise OutOfSpaceError(
            f"{directory}: the bench needs {size(nbytes)}, {size(free)} are free; "
            "give another --dir, or fewer --experts or --layers"
        )
