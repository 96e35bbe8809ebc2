"""The verdict on a packed store, for people and for programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong: which check found it, where, and what to do about it."""

    check: str
    where: str
    message: str


@dataclasses.dataclass(frozen=True)
class TensorVerdict:
    """One tensor inverted from the emitted bytes and compared with the source.

    `exact`: every value (sign of zero included) equals the source's. `loss` is None when exact.
    """

    name: str
    format: str
    exact: bool
    loss: dict[str, float | None] | None = None


@dataclasses.dataclass
class Report:
    """All findings, how much was checked, and the losses of rounded tensors."""

    path: Path
    quick: bool = False
    source: str | None = None
    root: str | None = None
    findings: list[Finding] = dataclasses.field(default_factory=list)
    tensors: list[TensorVerdict] = dataclasses.field(default_factory=list)
    checks: dict[str, int] = dataclasses.field(default_factory=dict)
    bytes_read: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether every check held, and at least one was made."""
        return not self.findings and bool(self.checks)

    def add(self, check: str, where: str, message: str) -> None:
        """Record a finding."""
        self.findings.append(Finding(check, where, message))

    def count(self, check: str, number: int = 1) -> None:
        """Record that `check` was applied to `number` more things."""
        self.checks[check] = self.checks.get(check, 0) + number

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "path": str(self.path),
            "ok": self.ok,
            "quick": self.quick,
            "source": self.source,
            "root": self.root,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "checks": self.checks,
            "tensors": [dataclasses.asdict(verdict) for verdict in self.tensors],
            "bytes_read": self.bytes_read,
            "seconds": self.seconds,
        }
