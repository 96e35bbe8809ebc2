"""What a repair did, or would do, for people and for programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class FileRepair:
    """What became of one file. made_bytes: made again. failure: why it is still not in order.

    Of a dry run: what would become of it.
    """

    key: str
    problem: str
    made_bytes: int
    failure: str | None = None


@dataclasses.dataclass
class RepairReport:
    """Every file that was not in order, and what became of it.

    root: recomputed from the metadata, and the one that was published. source: what was read, if
    anything had to be. absent: which parts a pull left out, and what fetches them. dry_run: nothing
    was written, `files` is what a repair would rewrite.
    """

    path: Path
    root: str
    source: str | None = None
    absent: str | None = None
    dry_run: bool = False
    files: list[FileRepair] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the store is whole now."""
        if self.dry_run:
            return not self.files
        return all(file.failure is None for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "path": str(self.path),
            "ok": self.ok,
            "root": self.root,
            "source": self.source,
            "absent": self.absent,
            "dry_run": self.dry_run,
            "files": [dataclasses.asdict(file) for file in self.files],
            "seconds": self.seconds,
        }
