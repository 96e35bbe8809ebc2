"""The battery: hundreds of planted faults, all found by name; each check is there for a reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dsv4
from dsv4.formats.store import integrity, nodes, reader
from dsv4.formats.store.specs import LAYOUT_OF
from dsv4.validate.checks import inversion, manifest_claims, structure, value_ranges
from dsv4.validate.report import Report
from tests.formats.store.packing import tree
from tests.validate.mutations import KINDS, Mutation, raw_faults
from tests.validate.scratch import Scratch
from tests.validate.sealed import sealed_faults

SEED = 4
REPAIR_EVERY = 4
AT_LEAST = 200


@pytest.fixture(params=["standard", "native"])
def scratch(request: pytest.FixtureRequest, tmp_path: Path) -> Scratch:
    return Scratch(request.getfixturevalue(f"small_{request.param}"), tmp_path / "packed")


@pytest.fixture
def standard(small_standard: Path, tmp_path: Path) -> Scratch:
    return Scratch(small_standard, tmp_path / "packed")


def _complaints(report: Report, mutation: Mutation) -> Iterator[str]:
    if report.ok:
        yield f"{mutation.name}: not found, source {report.source}"
    elif not any(mutation.named in f"{f.where} {f.message}" for f in report.findings):
        where = [(finding.check, finding.where) for finding in report.findings[:3]]
        yield f"{mutation.name}: {mutation.named} is not named, but {where}"


def test_every_raw_fault_is_found_and_repaired(scratch: Scratch, small_source: Path) -> None:
    complaints: list[str] = []
    repaired, good = 0, tree(scratch.pristine)
    for number, mutation in enumerate(raw_faults(scratch, SEED)):
        mutation.plant(scratch)
        for source in (None, small_source):
            complaints += _complaints(dsv4.validate(scratch.root, source=source), mutation)
        if mutation.repairable and number % REPAIR_EVERY == 0:
            assert dsv4.repair(scratch.root, source=small_source).ok, mutation.name
            assert tree(scratch.root) == good, mutation.name
            repaired += 1
        scratch.restore()
    assert complaints == []
    assert repaired >= 15
    assert tree(scratch.root) == good


def test_sealed_faults_are_found_with_the_source(scratch: Scratch, small_source: Path) -> None:
    complaints: list[str] = []
    for mutation in sealed_faults(scratch, small_source):
        mutation.plant(scratch)
        report = dsv4.validate(scratch.root)
        if mutation.seen:
            complaints += _complaints(report, mutation)
        elif not report.ok:
            complaints.append(f"{mutation.name}: found without the source, {report.findings[:2]}")
        complaints += _complaints(dsv4.validate(scratch.root, source=small_source), mutation)
        scratch.restore()
    assert complaints == []


def test_the_battery_is_large(small_standard: Path, small_source: Path, tmp_path: Path) -> None:
    scratch = Scratch(small_standard, tmp_path / "packed")
    sealed = [mutation.name for mutation in sealed_faults(scratch, small_source)]
    raw = [mutation.name for mutation in raw_faults(scratch, SEED)]
    assert len(raw) == sum(KINDS.values())
    assert len(set(sealed)) == len(sealed) >= 50
    assert 2 * len(raw) >= AT_LEAST


CHECKS = (
    "root", "files", "layouts", "inventory", "checksums", "hashes", "values", "counts",
    "config", "inversion", "optimum", "origin", "loss", "source", "assets", "recipe", "exact",
)  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_without_a_check_something_goes_unnoticed(
    standard: Scratch, small_source: Path, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    """A validator whose findings of one kind are dropped calls a damaged store good."""
    honest = Report.add

    def deaf(report: Report, kind: str, where: str, message: str) -> None:
        if kind != check and (check, kind) != ("optimum", "bound"):  # what breaks one breaks both
            honest(report, kind, where, message)

    faults = [*raw_faults(standard, SEED), *sealed_faults(standard, small_source)]
    mine = [mutation for mutation in faults if mutation.check == check]
    assert mine
    passed = []
    for mutation in mine:
        mutation.plant(standard)
        source = None if mutation.seen else small_source
        assert not dsv4.validate(standard.root, source=source).ok
        with monkeypatch.context() as patch:
            patch.setattr(Report, "add", deaf)
            if dsv4.validate(standard.root, source=source).ok:
                passed.append(mutation.name)
        standard.restore()
    assert passed


class _AnyLayout(dict[str, Any]):
    """A register in which every layout fits every format."""

    def __getitem__(self, key: str) -> Any:
        return _Anything()


class _Anything:
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def _nothing(*args: Any) -> Iterator[Any]:
    return iter(())


_group_rules = value_ranges._group_rules


def _no_rules(*args: Any) -> Iterator[Any]:
    return ((member, ()) for member, _ in _group_rules(*args))


PARTS: dict[str, tuple[object, str, object, str]] = {
    "strangers": (integrity, "unlisted", _nothing, "stranger extra.bin"),
    "node documents": (integrity, "node_faults", _nothing, "own document"),
    "layout ids": (nodes, "LAYOUT_OF", _AnyLayout(LAYOUT_OF), "sealed: layout id"),
    "carried bytes": (inversion, "_same_bytes", lambda *args: True, "sealed: FP8 code"),
    "carried scales": (inversion, "_same_bytes", lambda *args: True, "sealed: FP8 scale"),
    "block scales": (value_ranges, "_group_rules", _no_rules, "sealed: NaN block scale"),
    "SHA-256 of the source": (
        manifest_claims,
        "check_source_files",
        lambda *args: set(),
        "sealed: hash of a source file",
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_without_a_part_of_a_check_something_goes_unnoticed(
    standard: Scratch, small_source: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    module, name, replacement, fault = PARTS[part]
    own = Mutation("own document", "norm/weight", lambda s: s.remove("norm/weight/zarr.json"))
    faults = [*raw_faults(standard, SEED), *sealed_faults(standard, small_source), own]
    (mutation,) = (mutation for mutation in faults if mutation.name == fault)
    mutation.plant(standard)
    source = None if mutation.seen else small_source
    assert not dsv4.validate(standard.root, source=source).ok
    monkeypatch.setattr(module, name, replacement)
    assert dsv4.validate(standard.root, source=source).ok


def test_sizes_alone_make_the_quick_verdict(
    standard: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = standard.key("norm/weight")
    standard.write(key, bytes(standard.read(key)) + b"x")
    assert not dsv4.validate(standard.root, quick=True).ok
    for where in (reader, structure):  # opening looks at them, and so does the check
        monkeypatch.setattr(where, "sizes", _nothing)
    assert dsv4.validate(standard.root, quick=True).ok
