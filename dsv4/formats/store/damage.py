"""What is wrong with a file of a store, and what every open looks for: missing files, wrong sizes.

`sizes` costs one lstat a file; `symbolic_link` is what the first use of a file costs besides its
checksums. What takes the whole store is in `integrity`.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from dsv4.formats.errors import StoreError
from dsv4.formats.store.specs import FileSpec

LINK_ADVICE = (
    "it is a link, as in a download's cache; copy the store with `cp -rL`, or download it into a "
    "directory of its own (`hf download ORG/NAME --local-dir DIR`)"
)


def repaired_by(root: Path) -> str:
    """What to do about a damaged file of the store in `root`, as the end of a sentence."""
    return (
        f"`dsv4 repair {shlex.quote(str(root))} --source SRC` makes it whole from its source; of a "
        "pulled store, the same `dsv4 pull` again fetches a file that is not there"
    )


@dataclasses.dataclass(frozen=True)
class Damage:
    """One fault of a file. chunk: its index, or None when the whole file is concerned.

    repairable: whether `dsv4 repair` can make it whole; it leaves alone what is not the store's.
    """

    key: str
    chunk: int | None
    problem: str
    repairable: bool = True

    def __str__(self) -> str:
        where = self.key if self.chunk is None else f"{self.key}, chunk {self.chunk}"
        return f"{where}: {self.problem}"


def sizes(root: Path, files: Iterable[FileSpec]) -> Iterator[Damage]:
    """Files that are missing, of another size, or no regular files (such as symbolic links)."""
    base = os.fspath(root)
    for file in files:
        try:
            status = os.lstat(f"{base}/{file.key}")
        except (FileNotFoundError, NotADirectoryError):
            yield Damage(file.key, None, "the file is missing")
            continue
        regular = stat.S_ISREG(status.st_mode)
        if regular and status.st_size == file.nbytes:
            continue
        if stat.S_ISLNK(status.st_mode):
            yield Damage(file.key, None, LINK_ADVICE, repairable=False)
        elif not regular:
            yield Damage(file.key, None, "it is not a regular file")
        else:
            found = f"the file has {status.st_size} bytes, expected {file.nbytes}"
            yield Damage(file.key, None, found)


def symbolic_link(root: Path, directory: str, real: set[str]) -> str | None:
    """The outermost symbolic link on the way from `root` to `directory` below it, or None.

    real: directories known to be none; grows.
    """
    if not directory or directory in real:
        return None
    parent = directory.rpartition("/")[0]
    if (above := symbolic_link(root, parent, real)) is not None:
        return above
    if (root / directory).is_symlink():
        return directory
    real.add(directory)
    return None


def refuse(root: Path, faults: Iterable[Damage]) -> None:
    """Raise StoreError for the first of `faults`, with what to do about it."""
    first = next(iter(faults), None)
    if first is not None:
        advice = f"; {repaired_by(root)}" if first.repairable else ""
        raise StoreError(f"{first}{advice}")
