"""What was to be carried and is not equal fails, unless the store says that it was accepted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import dsv4
from dsv4.cli import cli
from dsv4.convert.engine import convert
from dsv4.validate.page.html import render_html
from tests.convert.wide import HELD, widened
from tests.validate.page import Page
from tests.validate.scratch import Edit, Json, Scratch

NAME = "layers.0.ffn.experts.2.w1.weight"
STACK = "layers/0/ffn/experts/w13"
BLOCKS = 4


@pytest.fixture(scope="module")
def wide(small_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wide") / "hub"
    return widened(small_source, out, [NAME], octaves=HELD + 3, blocks=BLOCKS // 2)


@pytest.fixture(scope="module")
def stores(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Without and with consent."""
    out = tmp_path_factory.mktemp("stores")
    for accept in (False, True):
        convert(wide, out / str(accept), accept_rounding=accept)
    return {accept: out / str(accept) for accept in (False, True)}


@pytest.mark.parametrize("how", ["alone", "quick", "source", "source only"])
def test_the_verdict(stores: dict[bool, Path], wide: Path, how: str) -> None:
    source, quick = wide if "source" in how else None, how in ("quick", "source only")
    report = dsv4.validate(stores[False], source=source, quick=quick)
    (finding,) = report.findings
    assert (finding.check, finding.where) == ("exact", NAME)
    assert f"{BLOCKS} of 2048 blocks are rounded" in finding.message
    report = dsv4.validate(stores[True], source=source, quick=quick)
    assert report.ok, report.findings
    assert report.checks["tensors accepted as rounded"] == 1
    assert [tensor.name for tensor in report.inexact] == [NAME]
    if source:
        (verdict,) = (v for v in report.tensors if v.carried and not v.exact)
        assert (verdict.name, verdict.rounded_blocks) == (NAME, BLOCKS)


def test_the_command_and_the_page_say_so(stores: dict[bool, Path], tmp_path: Path) -> None:
    for accepted, code, verdict, word in (
        (False, 1, "FAILED, 1 finding", "not accepted"),
        (True, 0, "OK, 1 tensor accepted as rounded", "accepted at conversion"),
    ):
        document = tmp_path / "report.json"
        done = CliRunner().invoke(cli, ["validate", str(stores[accepted]), "--json", str(document)])
        assert done.exit_code == code
        assert verdict in done.stdout
        said = json.loads(document.read_text())
        assert said["accepted_rounding"] == accepted
        assert said["inexact_tensors"][0]["rounded_blocks"] == BLOCKS
        page = Page(render_html(dsv4.validate(stores[accepted])))
        assert page.errors == []
        assert f"{word}: {NAME}: {BLOCKS} of 2048 blocks" in page.text("inexact")


def _own(change: Callable[[Json], object]) -> Edit:
    return lambda manifest, nodes: change(nodes[STACK]["attributes"]["dsv4"])


def _unlisted(own: Json) -> None:
    own.pop("inexact")


def _figure(figure: str, factor: float) -> Edit:
    def change(own: Json) -> None:
        own["inexact"][NAME][figure] *= factor

    return _own(change)


FALSE: dict[str, tuple[Edit, str]] = {
    "it is not listed": (_own(_unlisted), "loss"),
    "its error": (_figure("max_abs_error", 0.5), "loss"),
    "its loss": (_figure("rel_mse", 1.001), "loss"),
    "its blocks": (_figure("rounded_blocks", 2), "counts"),
    "another's, too": (
        _own(
            lambda own: own["inexact"].update({NAME.replace("2.w1", "1.w1"): own["inexact"][NAME]})
        ),
        "counts",
    ),
    "consent withdrawn": (
        lambda manifest, nodes: manifest["recipe"].pop("accepted_rounding"),
        "exact",
    ),
}


@pytest.mark.parametrize("what", FALSE)
def test_a_false_admission_is_found(
    stores: dict[bool, Path], wide: Path, tmp_path: Path, what: str
) -> None:
    edit, check = FALSE[what]
    scratch = Scratch(stores[True], tmp_path / "packed")
    scratch.seal(edit)
    report = dsv4.validate(scratch.root, source=wide)
    assert check in {finding.check for finding in report.findings}, report.findings


def _all_exact(scratch: Scratch) -> None:
    """A packer that rounds and claims that nothing happened: lineage, counts, no admission."""
    lineage = scratch.store.array(f"{STACK}/lineage").tensor().clone()
    lineage[..., 7] = 0
    scratch.poke(scratch.key(f"{STACK}/lineage"), 0, lineage.numpy().tobytes())

    def claim(own: Json) -> None:
        own.pop("inexact")
        own.update(exact=True, rounded_blocks=0, rel_mse=0.0)

    def edit(manifest: Json, nodes: Json) -> None:
        manifest["recipe"].pop("accepted_rounding")
        claim(nodes[STACK]["attributes"]["dsv4"])

    scratch.seal(edit)


def test_a_store_that_claims_to_be_exact_and_is_not(
    stores: dict[bool, Path], wide: Path, tmp_path: Path
) -> None:
    scratch = Scratch(stores[True], tmp_path / "packed")
    _all_exact(scratch)
    assert dsv4.validate(scratch.root).ok  # nothing within it contradicts
    report = dsv4.validate(scratch.root, source=wide)
    assert ("inversion", NAME) in {(f.check, f.where) for f in report.findings}
