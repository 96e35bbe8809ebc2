"""The verdict on a packed store, for people and for programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dsv4.convert.exactness import Inexact
from dsv4.formats.plain_text import size
from dsv4.formats.store.damage import repaired_by
from dsv4.formats.version import TOOL

SCALE_OCTAVES = ("zero", *range(-9, 9))
"""Of an E4M3 block scale: zero, or the exponent e of 2^e <= scale < 2^(e + 1)."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong: which check found it, where, and what to do about it."""

    check: str
    where: str
    message: str


@dataclasses.dataclass(frozen=True)
class TensorVerdict:
    """One tensor inverted from the emitted bytes and compared with the source.

    exact: every value (sign of zero included) equals the source's. loss: None when exact.
    max_error: of a rounded tensor, the largest error of an element as a fraction of what its block
    allows. rounded_blocks: its blocks with other values. carried: whether it was to be exact.
    zero: whether it is a weight that is zero throughout. optimum: the relative MSE that the format
    allows, recomputed from the source for `optimum_share` of its rows and inferred for the others.
    seconds: what reading both and comparing took.
    """

    name: str
    format: str
    exact: bool
    loss: dict[str, float | None] | None = None
    optimum: float | None = None
    seconds: float = 0.0
    max_error: float | None = None
    optimum_share: float | None = None
    rounded_blocks: int = 0
    carried: bool = True
    zero: bool = False

    @property
    def excess(self) -> float | None:
        """Relative MSE above the optimum, as a fraction of it; None where there is no optimum."""
        rel_mse = None if self.loss is None else self.loss["rel_mse"]
        return None if rel_mse is None or not self.optimum else rel_mse / self.optimum - 1.0


@dataclasses.dataclass(frozen=True)
class GateAgreement:
    """How often a rounded router gate chooses as the source's does, over seeded random inputs.

    same_set: share of the inputs that go to the very same experts. overlap: mean share of the
    experts chosen by both.
    """

    name: str
    inputs: int
    same_set: float
    overlap: float


@dataclasses.dataclass
class Report:
    """All findings, how much was checked, and the losses of rounded tensors.

    checksums: what the bytes were compared with: "blake3" (and XXH3) or "xxh3"; None: not read.
    tool, recipe: what packed the store, by its manifest. recorded: name of a rounded tensor, or
    template of a stack -> relative MSE noted at conversion (of a stack's worst expert).
    notices: sentences about what is no fault. damaged: whether there is damage that `dsv4 repair`
    mends. wrong_source: whether the source was refused as another checkpoint.
    said_exact: how many tensors the store says are the source's. scales: role -> count of NVFP4
    block scales per octave, `SCALE_OCTAVES`. Both come from the content, which `quick` leaves out.
    begun: when, ISO 8601 in UTC. nbytes: of all files of the store. gate_bytes: how much larger it
    would be with its router gates as they are in the source.
    inexact: what the store says was to be carried and is not equal. accepted_rounding: whether it
    says that this was accepted. zero: weights that are zero throughout, as compared with the
    source, else as recorded.
    """

    path: Path
    quick: bool = False
    source: str | None = None
    checksums: str | None = None
    root: str | None = None
    tool: str | None = None
    recipe: str | None = None
    recorded: dict[str, float] = dataclasses.field(default_factory=dict)
    said_exact: int | None = None
    scales: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    notices: list[str] = dataclasses.field(default_factory=list)
    findings: list[Finding] = dataclasses.field(default_factory=list)
    damaged: bool = False
    wrong_source: bool = False
    tensors: list[TensorVerdict] = dataclasses.field(default_factory=list)
    gates: list[GateAgreement] = dataclasses.field(default_factory=list)
    gate_bytes: int = 0
    inexact: list[Inexact] = dataclasses.field(default_factory=list)
    accepted_rounding: bool = False
    zero: list[str] = dataclasses.field(default_factory=list)
    checks: dict[str, int] = dataclasses.field(default_factory=dict)
    bytes_read: int = 0
    begun: str = ""
    nbytes: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether every check held, and at least one was made."""
        return not self.findings and bool(self.checks)

    @property
    def remedy(self) -> str | None:
        """What mends the damage that was found; None when there is none."""
        return repaired_by(self.path) if self.damaged else None

    def gates_meaning(self) -> str:
        """What the agreement of the gates means for an answer, and what can be done about it."""
        worst = min((gate.same_set for gate in self.gates), default=1.0)
        return (
            "Same experts: the share of random inputs whose whole set of experts is the source's. "
            f"At {worst:.0%} the others mostly differ in one expert, so answers can differ from "
            "the source's. In this project's small trained model 80 % on real text went with a KL "
            "divergence of 0.0158 nats a token, more than lm_head and experts cost together. To "
            "keep the gates exact, convert with --keep '*.gate.weight' "
            f"({size(self.gate_bytes)} more)."
        )

    def add(self, check: str, where: str, message: str) -> None:
        """Record a finding."""
        self.findings.append(Finding(check, where, message))

    def count(self, check: str, number: int = 1) -> None:
        """Record that `check` was applied to `number` more things."""
        self.checks[check] = self.checks.get(check, 0) + number

    def absorb(self, part: Report) -> None:
        """Take over what another report of the same store found, counted and compared."""
        self.findings += part.findings
        self.tensors += part.tensors
        for check, number in part.checks.items():
            self.count(check, number)

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "path": str(self.path),
            "ok": self.ok,
            "quick": self.quick,
            "source": self.source,
            "checksums": self.checksums,
            "root": self.root,
            "tool": self.tool,
            "recipe": self.recipe,
            "validated_by": TOOL,
            "notices": self.notices,
            "remedy": self.remedy,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "checks": self.checks,
            "said_exact": self.said_exact,
            "recorded_rel_mse": self.recorded,
            "scale_octaves": list(SCALE_OCTAVES),
            "scales": self.scales,
            "tensors": [dataclasses.asdict(verdict) for verdict in self.tensors],
            "gates": [dataclasses.asdict(gate) for gate in self.gates],
            "gate_bytes": self.gate_bytes,
            "begun": self.begun,
            "bytes": self.nbytes,
            "inexact_tensors": [dataclasses.asdict(tensor) for tensor in self.inexact],
            "accepted_rounding": self.accepted_rounding,
            "zero_tensors": self.zero,
            "bytes_read": self.bytes_read,
            "seconds": self.seconds,
        }
