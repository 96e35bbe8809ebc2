"""Exactness is what the bytes say: every count is held against an independent decoder's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from click.testing import CliRunner

import dsv4
from dsv4.cli import cli
from dsv4.convert import scale_look
from dsv4.convert.counter import Event
from dsv4.convert.engine import convert
from dsv4.convert.plan import make_plan
from dsv4.convert.scale_look import look_at_scales
from dsv4.convert.sources.open import open_source
from dsv4.formats.errors import ExactnessError, FormatError, StoreError
from dsv4.formats.model.inventory import DraftKind
from dsv4.formats.model.recipes import make_recipe
from dsv4.formats.model.releases import FLASH
from dsv4.synthetic.real_shapes import fresh_layers
from dsv4.synthetic.tiny import hub_config, write_tiny
from tests.conftest import MakeSource
from tests.convert.header_source import HeaderSource
from tests.convert.wide import HELD, Bytes, edited, widened
from tests.support.oracles import source_values
from tests.validate.small import SMALL

DRAFT = dataclasses.replace(SMALL, num_draft_layers=1)
BEYOND = HELD + 3
FIRST = "layers.0.ffn.experts.2.w1.weight"
CASES: dict[str, tuple[tuple[str, ...], int, int]] = {
    "one block of one expert": ((FIRST,), BEYOND, 1),
    "two experts": ((FIRST, "layers.1.ffn.experts.0.w2.weight"), BEYOND, 5),
    "a draft layer": (("mtp.0.ffn.experts.3.w3.weight",), BEYOND, 2),
    "at the limit": ((FIRST, "mtp.0.ffn.experts.3.w3.weight"), HELD, 4),
}
"""Experts, octaves between their block scales, and how many blocks lie so low."""


@pytest.fixture
def source(make_source: MakeSource) -> Path:
    return make_source(DRAFT, DraftKind.MTP)


@pytest.fixture
def wide(source: Path, tmp_path: Path) -> Path:
    """One expert of which two blocks of 16 are rounded."""
    return widened(source, tmp_path / "wide", [FIRST], octaves=BEYOND)


def _different(source: Path, packed: Path) -> dict[str, tuple[int, float]]:
    """Name -> (blocks of 16 that differ, largest error), by ml_dtypes' decoding of the source."""
    opened, found = dsv4.open(packed), {}
    for name, value in source_values(source).items():
        emitted = opened.dequantize(name).double().numpy()
        other = (emitted != value) | (np.signbit(emitted) != np.signbit(value))
        if other.any():
            blocks = int(other.reshape(-1, 16).any(axis=1).sum())
            found[name] = blocks, float(np.abs(emitted - value).max())
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("recipe", ["standard", "native"])
def test_what_is_said_is_what_the_bytes_are(
    source: Path, tmp_path: Path, case: str, recipe: str
) -> None:
    names, octaves, blocks = CASES[case]
    hub, packed = tmp_path / "hub", tmp_path / "packed"
    widened(source, hub, names, octaves=octaves, blocks=blocks)
    summary = convert(hub, packed, recipe, accept_rounding=True)
    different = _different(hub, packed)
    experts = {name: what for name, what in different.items() if ".experts." in name}
    assert set(experts) == (set(names) if octaves > HELD else set())
    assert all(count == 2 * blocks for count, _ in experts.values())
    said = {t.name: (t.rounded_blocks, t.max_abs_error) for t in summary.tally.inexact}
    assert said == experts
    document = json.loads(json.dumps(summary.to_dict()))
    assert set(document["rounded_tensors"]) == set(different)
    assert document["exact_tensors"] == document["tensors"] - len(different)
    assert [t["name"] for t in document["inexact_tensors"]] == list(said)
    assert document["accepted_rounding"] == bool(experts)
    assert any(names[0] in sentence for sentence in summary.notices) == bool(experts)
    opened = dsv4.open(packed)
    assert opened.store.manifest["recipe"].get("accepted_rounding", False) == bool(experts)
    exact = {name for name in opened.names() if opened.provenance(name)["exact"]}
    assert exact == set(opened.names()) - set(different)
    planned = json.loads(CliRunner().invoke(cli, ["plan", str(hub), "--json"]).stdout)
    assert planned["inexact_tensors"] == document["inexact_tensors"]
    assert planned["block_scales"]["looked_at"] == planned["encodings"]["mxfp4"] > 0
    if recipe == "standard":
        assert planned["exact_tensors"] == document["exact_tensors"]


@pytest.mark.parametrize("flavour", ["base", "modelopt", "bf16", "compressed-tensors"])
def test_what_is_carried_byte_for_byte_counts_as_exact(tmp_path: Path, flavour: str) -> None:
    write_tiny(tmp_path / "hub", SMALL, draft=DraftKind.NONE, flavour=flavour)
    summary = convert(tmp_path / "hub", tmp_path / "packed", "native")
    report = dsv4.validate(tmp_path / "packed", source=tmp_path / "hub")
    assert report.ok, report.findings
    equal = sum(verdict.exact for verdict in report.tensors)
    assert summary.tally.exact == equal == report.said_exact == len(report.tensors)
    assert summary.tally.rounded == []
    assert summary.tally.inexact == []


def test_native_refuses_and_continues_once_it_is_accepted(
    source: Path, wide: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    for _ in range(2):  # the second time from what the first has found
        with pytest.raises(ExactnessError) as refusal:
            convert(wide, packed, "native", 1)
        assert f"{FIRST} cannot be carried exactly" in str(refusal.value)
        assert "so 2 of 2048 blocks would be rounded, with a largest error of" in str(refusal.value)
        assert "--accept-rounding" in str(refusal.value)
        with pytest.raises(StoreError):
            dsv4.open(packed)
    summary = convert(wide, packed, "native", 1, accept_rounding=True)
    assert summary.resumed_units > 0
    assert summary.root == convert(wide, tmp_path / "b", "native", accept_rounding=True).root


class _InterruptedError(Exception):
    pass


def test_consent_is_asked_of_the_command_that_finishes(wide: Path, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if event.inexact_tensors:
            raise _InterruptedError

    def nothing_is_read(event: Event) -> NoReturn:
        raise AssertionError(event)

    packed = tmp_path / "packed"
    with pytest.raises(_InterruptedError):
        convert(wide, packed, "native", 1, interrupt, accept_rounding=True)
    with pytest.raises(ExactnessError, match=FIRST):
        convert(wide, packed, "native", 1, nothing_is_read)


def test_consent_that_was_not_needed_leaves_no_trace(source: Path, tmp_path: Path) -> None:
    roots = {
        convert(source, tmp_path / str(accept), "native", accept_rounding=accept).root
        for accept in (False, True)
    }
    assert len(roots) == 1


def test_the_command_names_what_it_rounded(wide: Path, tmp_path: Path) -> None:
    arguments = ["convert", "--hf", str(wide), "--out", str(tmp_path / "packed")]
    refused = CliRunner().invoke(cli, [*arguments, "--recipe", "native"])
    assert isinstance(refused.exception, ExactnessError)
    done = CliRunner().invoke(cli, ["convert", "--hf", str(wide), "--out", str(tmp_path / "s")])
    assert done.exit_code == 0
    assert f"{FIRST}: 2 of 2048 blocks" in done.stdout
    (note,) = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert FIRST in note
    assert "`dsv4 validate` fails on it" in note
    arguments += ["--recipe", "native", "--accept-rounding", "--json"]
    events = CliRunner().invoke(cli, arguments)
    last = [line for line in events.stderr.splitlines() if line.startswith("{")][-1]
    assert json.loads(last)["inexact_tensors"] == 1


def _plan(source: Path) -> Any:
    return make_plan(open_source(source), make_recipe("native"))


def test_codes_decide_where_scales_alone_do_not(source: Path, tmp_path: Path) -> None:
    """Blocks far below the others that hold zeros, or codes that are codes again when shifted."""

    def scales(raw: Bytes) -> None:
        raw[:] = 120
        raw[:2] = 120 - BEYOND

    def codes(raw: Bytes) -> None:
        raw[:16] = 0x80  # -0 and 0
        raw[16:32] = 0x04  # 2 and 0: three octaves below, a quarter, which is no code
        raw[24:32] = 0x66  # 4: half of the smallest scale, which is one

    edits = {FIRST: codes, FIRST.replace("weight", "scale"): scales}
    hub = edited(source, tmp_path / "hub", edits)
    (inexact,) = look_at_scales(_plan(hub), open_source(hub)).inexact
    assert (inexact.name, inexact.rounded_blocks) == (FIRST, 1)
    convert(hub, tmp_path / "packed")
    assert _different(hub, tmp_path / "packed")[FIRST] == (1, inexact.max_abs_error)


def test_a_plan_refuses_a_scale_that_is_no_number(source: Path, tmp_path: Path) -> None:
    def nan(raw: Bytes) -> None:
        raw[9] = 255

    hub = edited(source, tmp_path / "hub", {FIRST.replace("weight", "scale"): nan})
    with pytest.raises(FormatError, match=f"{FIRST}: the E8M0 scale of row 1, block 1"):
        look_at_scales(_plan(hub), open_source(hub))


def test_a_plan_says_what_it_had_no_time_for(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_look, "LOCAL_SECONDS", -1.0)
    look = look_at_scales(_plan(wide), open_source(wide))
    assert (look.looked_at, look.inexact, look.complete) == (0, (), False)
    shown = CliRunner().invoke(cli, ["plan", str(wide)]).stdout
    assert "0 of 36 MXFP4 tensors looked at" in shown
    assert "as planned, not all of them looked at" in shown


class _OnTheHub(HeaderSource):
    """Whoever reads a byte of it fails."""

    def remote_bytes(self, file: str) -> int:
        return self.sizes[file]


def test_a_plan_downloads_no_gigabytes() -> None:
    source = _OnTheHub(hub_config(fresh_layers(FLASH, 1), DraftKind.NONE), DraftKind.NONE)
    look = look_at_scales(make_plan(source, make_recipe("native")), source)
    assert (look.looked_at, look.inexact) == (0, ())
    # 256 experts of three matrices of 2048 x 4096, a byte for 32 columns
    assert look.tensors == 256 * 3
    assert look.reason == "0.2 GB of block scales would have to be downloaded"


def _zero(raw: Bytes) -> None:
    raw[:] = 0


def _negative_zero(raw: Bytes) -> None:
    """Of BF16."""
    raw[0::2], raw[1::2] = 0, 0x80


ZERO = {
    "layers.0.ffn.experts.1.w3.weight": _zero,  # MXFP4
    "layers.1.attn.wq_b.weight": _zero,  # FP8
    "layers.1.ffn_norm.weight": _zero,  # carried
    "layers.1.ffn.gate.weight": _zero,  # rounded
    "layers.0.ffn.gate.weight": _negative_zero,
}


@pytest.mark.parametrize("recipe", ["standard", "native"])
def test_weights_of_zeros_are_named(source: Path, tmp_path: Path, recipe: str) -> None:
    hub = edited(source, tmp_path / "hub", {**ZERO, "layers.1.ffn.gate.bias": _zero})
    packed = tmp_path / "packed"
    summary = convert(hub, packed, recipe)
    assert sorted(summary.tally.zero) == sorted(ZERO)
    assert summary.to_dict()["zero_tensors"] == summary.tally.zero
    assert any("5 weights are zero throughout" in sentence for sentence in summary.notices)
    for report in (dsv4.validate(packed), dsv4.validate(packed, source=hub)):
        assert report.ok, report.findings
        assert sorted(report.zero) == sorted(ZERO)
    values = source_values(hub)
    assert all(not values[name].any() for name in ZERO)
    shown = CliRunner().invoke(cli, ["validate", str(packed), "--quick"])
    assert "zero throughout" in shown.stdout


@pytest.mark.parametrize("flavour", ["modelopt", "base", "bf16"])
def test_dead_experts_of_every_dialect_are_named(tmp_path: Path, flavour: str) -> None:
    write_tiny(tmp_path / "tiny", SMALL, draft=DraftKind.NONE, flavour=flavour)
    names = [f"layers.1.ffn.experts.2.{w}.weight" for w in ("w1", "w2", "w3")]
    hub = edited(tmp_path / "tiny", tmp_path / "hub", dict.fromkeys(names, _zero))
    summary = convert(hub, tmp_path / "packed", "native")
    assert sorted(summary.tally.zero) == names
    report = dsv4.validate(tmp_path / "packed", source=hub)
    assert report.ok, report.findings
    assert sorted(report.zero) == names
