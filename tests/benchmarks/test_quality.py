"""The quality bench: `native` is the source, a planted fault is seen, the checkpoint is sound."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from benchmarks import quality as bench
from benchmarks.__main__ import benchmarks as commands
from benchmarks.peers import amax_rounding, modelopt_rounding
from benchmarks.quality_table import cost_plot, cost_table
from benchmarks.source_weights import SourceWeights
from dsv4.convert.engine import convert
from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.numeric.operands import Fp8Matrix, Matrix
from dsv4.runtime.weights import Weights
from dsv4.validate.engine import validate

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny-dsv4"
MOST_BYTES = 14_000_000
FAULTY = "layers.2.attn.wo_b.weight"


class Faulty:
    """A store, but for the scales of one matrix, which are doubled."""

    def __init__(self, store: Weights) -> None:
        self.store = store
        self.config = store.config
        self.tensor = store.tensor
        self.experts = store.experts

    def matrix(self, name: str) -> Matrix:
        matrix = self.store.matrix(name)
        if name != FAULTY:
            return matrix
        assert isinstance(matrix, Fp8Matrix)
        return dataclasses.replace(matrix, scales=matrix.scales.float() * 2)


def faulty(directory: Path, place: Path) -> Weights:
    return Faulty(bench.packed("native")(directory, place))


@pytest.fixture(scope="module")
def found() -> bench.Quality:
    """One window: the source, `native`, and `standard` by its two roundings."""
    names = (bench.NATIVE, "standard", "standard, gates kept", "standard, amax rounding")
    return bench.quality(EXAMPLE, tokens=512, variants={n: bench.VARIANTS[n] for n in names})


def test_native_is_the_source(found: bench.Quality) -> None:
    source, native, *_ = found.lines
    assert (found.windows, found.scored, found.native_holds) == (1, 448, True)
    assert 2.0 < source.perplexity.mean < 100.0  # of 1536 tokens: it has learnt something
    assert abs(native.perplexity.mean - source.perplexity.mean) < 1e-4
    assert abs(native.kl.mean) < 1e-9
    assert native.top1.mean == native.routing.mean == 1.0


def test_rounding_costs_and_kept_gates_route_as_before(found: bench.Quality) -> None:
    _, _, standard, gates_kept, amax = found.lines
    assert amax.kl.mean > standard.kl.mean > gates_kept.kl.mean > 1e-4
    assert gates_kept.routing.mean == 1.0 > standard.routing.mean > 0.5
    assert standard.top1.mean < 1.0


def test_a_planted_fault_is_seen() -> None:
    found = bench.quality(EXAMPLE, tokens=512, variants={bench.NATIVE: faulty})
    source, native = found.lines
    assert native.perplexity.mean > source.perplexity.mean + 1e-2
    assert not found.native_holds


def test_the_command_fails_where_native_differs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "VARIANTS", {bench.NATIVE: faulty})
    plot = tmp_path / "cost.svg"
    arguments = ["quality", str(EXAMPLE), "--tokens", "512", "--json", "--plot", str(plot)]
    done = CliRunner().invoke(commands, arguments)
    assert done.exit_code == 1
    assert "native differs from the source" in done.stderr
    document = json.loads(done.stdout)
    assert [line["variant"] for line in document["lines"]] == ["source", "native"]
    xml.etree.ElementTree.parse(plot)


def test_table_and_plot_show_every_variant(found: bench.Quality) -> None:
    console = Console(width=160, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(cost_table(found))
    shown, plot = captured.get(), cost_plot(found)
    for line in found.lines[1:]:
        assert line.variant in shown
        assert line.variant in plot
        assert f"{line.kl.mean:.5f}".removeprefix("-") in shown


def test_amax_rounding_is_modelopts() -> None:
    weights = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    assert torch.equal(amax_rounding(weights), modelopt_rounding(weights))


def test_a_text_too_short_or_missing_is_refused(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("import os\n")
    with pytest.raises(RuntimeRefusal, match="less than one window"):
        bench.quality(EXAMPLE, short, variants={})
    with pytest.raises(RuntimeRefusal, match="no such file"):
        bench.quality(EXAMPLE, tmp_path / "none.txt", variants={})


def test_the_committed_checkpoint_converts_and_validates(tmp_path: Path) -> None:
    convert(EXAMPLE, tmp_path / "packed")
    report = validate(tmp_path / "packed", source=EXAMPLE)
    assert report.ok, report.findings
    assert sum(file.stat().st_size for file in EXAMPLE.iterdir()) <= MOST_BYTES
    assert SourceWeights.read(EXAMPLE).config.num_hidden_layers == 5
