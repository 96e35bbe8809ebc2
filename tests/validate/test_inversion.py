"""Inversion by tiles: bounded memory at real shapes, element bounds, optimum, router choices."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv4
from dsv4.convert.outputs import dense
from dsv4.convert.outputs.rounding import round_tiles
from dsv4.convert.sources.open import open_source
from dsv4.formats.checkpoint import PackedCheckpoint, values_of
from dsv4.formats.model.releases import PRO
from dsv4.formats.numeric.codecs import e2m1_encode, pack_nibbles
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor, dequantize_nvfp4, quantize_nvfp4
from dsv4.formats.numeric.operands import Fp8Matrix
from dsv4.synthetic.real_shapes import fresh_layers, write_checkpoint
from dsv4.validate.checks import inversion, rounding
from dsv4.validate.checks.rounding import largest_error
from dsv4.validate.checks.router_gates import INPUTS, agreement, unit_inputs
from dsv4.validate.page.html import render_html
from dsv4.validate.report import Report
from tests.validate.page import Page

MEMORY_LIMIT = 1 << 30  # half of what is promised: the layer has few experts here
MEASURE = """
import json, pathlib, sys
import dsv4
report = dsv4.validate(sys.argv[1], source=sys.argv[2], workers=2)
# Not ru_maxrss, which counts the parent that started this process.
status = dict(x.split(":", 1) for x in pathlib.Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) * 1024
print(json.dumps({"ok": report.ok, "tensors": len(report.tensors), "peak": peak}))
"""


def _values(stored: NVFP4Tensor | Fp8Matrix | torch.Tensor) -> torch.Tensor:
    return stored.float() if isinstance(stored, torch.Tensor) else values_of(stored)


@pytest.fixture(scope="module")
def pro() -> Iterator[tuple[Path, Path]]:
    """One layer of Pro's real shapes with eight experts, and its store."""
    config = fresh_layers(PRO, 1, experts=8, vocabulary=1024)
    with tempfile.TemporaryDirectory() as scratch:  # a gigabyte that is not to be kept
        hub, packed = Path(scratch) / "hub", Path(scratch) / "packed"
        write_checkpoint(hub, config)
        dsv4.convert(hub, packed, workers=2)
        yield hub, packed


def test_memory_is_bounded_at_real_shapes(pro: tuple[Path, Path]) -> None:
    command = [sys.executable, "-c", MEASURE, str(pro[1]), str(pro[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"]
    assert found["tensors"] > 40
    assert found["peak"] < MEMORY_LIMIT


def test_rows_are_those_of_the_whole(pro: tuple[Path, Path]) -> None:
    """Of every format and layout: interleaved experts, K-slabs, FP8, plain."""
    packed = dsv4.open(pro[1])
    prefix = "layers.0."
    names = ["ffn.experts.1.w1", "ffn.experts.1.w3", "ffn.experts.1.w2", "ffn.gate"]
    names += ["attn.wo_b", "attn.wq_a", "ffn_norm"]
    for name in (f"{prefix}{name}.weight" for name in names):
        whole = _values(packed.stored(name))
        rows = packed.shape(name)[0]
        for start, stop in ((0, min(128, rows)), (rows // 256 * 128, rows)):
            part = _values(packed.stored_rows(name, start, stop))
            assert torch.equal(part, whole[start:stop]), name


def test_small_tiles_and_threads_change_no_verdict(
    tiny_source: Path, standard_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verdicts(workers: int) -> list[tuple[object, ...]]:
        report = dsv4.validate(standard_store, source=tiny_source, workers=workers, quick=True)
        assert report.ok, report.findings
        return [(v.name, v.exact, v.loss and v.loss["max_abs_error"]) for v in report.tensors]

    whole = verdicts(1)
    monkeypatch.setattr(inversion, "TILE_BYTES", 128 << 10)
    assert verdicts(3) == whole


def test_a_nearest_code_is_within_the_bound_and_no_other_is() -> None:
    rng = torch.Generator().manual_seed(3)
    w = torch.randn(64, 160, generator=rng) * torch.rand(64, 1, generator=rng).mul(-20).exp2()
    t = quantize_nvfp4(w)
    assert 0.9 < largest_error(w, dequantize_nvfp4(t), t) <= 1.0 + rounding.BOUND_SLACK
    for byte in range(t.codes.shape[1]):  # one step up or down, whichever code it was
        codes = t.codes.clone()
        codes[5, byte] ^= 1
        other = NVFP4Tensor(codes, t.scales, t.global_scale, t.shape)
        assert largest_error(w, dequantize_nvfp4(other), other) > 1.0 + rounding.BOUND_SLACK
    for scale in (0, 1):  # nearest codes of a scale that clips nearly everything
        scales = t.scales.clone()
        scales[5, 2] = scale
        other = NVFP4Tensor(t.codes, scales, t.global_scale, t.shape)
        assert largest_error(w, dequantize_nvfp4(other), other) > 1.0 + rounding.BOUND_SLACK


def test_optimal_blocks_with_outliers_are_within_the_bound() -> None:
    """Where the best scale clips: fifteen values on its grid and one far above."""
    rng = torch.Generator().manual_seed(4)
    grid = torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6])
    w = grid[torch.randint(7, (4096, 16), generator=rng)]
    w[:, 7] = 6 + 6 * torch.rand(4096, generator=rng)
    w[0, 0] = 200.0
    t = quantize_nvfp4(w)
    emitted = dequantize_nvfp4(t)
    assert bool((w - emitted > t.global_scale * 1.0).any())
    assert largest_error(w, emitted, t) <= 1.0 + rounding.BOUND_SLACK


def _worse(tiny_source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> Report:
    """Validate what a packer makes that rounds badly and honestly records its loss."""

    def worse(*args: Any) -> Iterator[tuple[int, torch.Tensor, NVFP4Tensor]]:
        for start, values, rounded in round_tiles(*args):
            if what == "scale":  # nearest codes of a scale that is not the best
                amax = values.abs().amax()
                scale = (amax / 6 / rounded.global_scale).to(torch.float8_e4m3fn)
                scales = torch.full_like(rounded.scales, int(scale.view(torch.uint8)))
                unit = float(scale.float() * rounded.global_scale)
                codes = pack_nibbles(e2m1_encode(values / unit))
            else:
                codes, scales = rounded.codes ^ 1, rounded.scales
            yield start, values, NVFP4Tensor(codes, scales, rounded.global_scale, rounded.shape)

    monkeypatch.setattr(dense, "round_tiles", worse)
    dsv4.convert(tiny_source, out)
    monkeypatch.undo()
    return dsv4.validate(out, source=tiny_source)


def test_a_scale_that_is_not_the_best_is_found(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = _worse(tiny_source, tmp_path / "packed", monkeypatch, "scale")
    assert {finding.check for finding in report.findings} == {"optimum"}
    assert len(report.findings) == 8


def test_a_code_that_is_not_the_nearest_is_found(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = _worse(tiny_source, tmp_path / "packed", monkeypatch, "codes")
    assert {finding.check for finding in report.findings} == {"bound", "optimum"}


def test_a_sample_stands_for_a_large_tensor(
    tiny_source: Path, standard_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "LARGE", 1 << 16)
    monkeypatch.setattr(rounding, "SAMPLED_TILES", 3)
    monkeypatch.setattr(inversion, "TILE_BYTES", 128 << 10)
    sample, full = (
        dsv4.validate(standard_store, source=tiny_source, quick=True, optimum=how)
        for how in ("sample", "full")
    )
    assert sample.ok
    assert full.ok
    shares = [{v.name: v.optimum_share for v in r.tensors if v.optimum} for r in (sample, full)]
    assert shares[0]["head.weight"] == 3 / 8
    assert set(shares[1].values()) == {1.0}
    for verdict in sample.tensors:
        if verdict.optimum is not None:
            assert verdict.excess == pytest.approx(0.0, abs=1e-6)
    assert "(of 1 large ones in a sample of their rows)" in render_html(sample)


def test_gates_choose_alike_as_far_as_a_plain_computation_says(
    tiny_source: Path, standard_store: Path
) -> None:
    report = dsv4.validate(standard_store, source=tiny_source, quick=True)
    config = dsv4.open(standard_store).config
    scored = [f"layers.{n}" for n in range(config.num_hash_layers, config.num_hidden_layers)]
    assert [g.name for g in report.gates] == [f"{b}.ffn.gate.weight" for b in (*scored, "mtp.0")]
    gate = report.gates[0]
    source, packed = open_source(tiny_source), PackedCheckpoint.open(standard_store)
    weights = (source.read(source.entries[gate.name]).float(), packed.dequantize(gate.name))
    bias = source.read(source.entries[gate.name.replace("weight", "bias")]).float()
    inputs = unit_inputs(weights[0].shape[1])
    assert torch.allclose(inputs.square().mean(dim=1), torch.ones(INPUTS))
    chosen = []
    for weight in weights:
        affinity = (1 + (inputs @ weight.T).double().exp()).log().sqrt() + bias
        best = affinity.topk(config.num_experts_per_tok).indices.tolist()
        chosen.append([set(experts) for experts in best])
    same = sum(a == b for a, b in zip(*chosen, strict=True)) / INPUTS
    common = sum(len(a & b) for a, b in zip(*chosen, strict=True)) / INPUTS
    assert 0.5 < same < 1.0
    assert gate.same_set == pytest.approx(same, abs=2 / INPUTS)
    assert gate.overlap == pytest.approx(common / config.num_experts_per_tok, abs=2 / INPUTS)
    assert report.to_dict()["gates"][0]["overlap"] == gate.overlap
    rows = Page(render_html(report)).rows("Router gates")
    worst = min(report.gates, key=lambda g: g.same_set)
    assert rows[0] == [worst.name, f"{worst.same_set:.2%}".replace("%", " %"), rows[0][2]]
    assert len(rows) == len(report.gates)


def test_a_gate_agrees_with_itself_and_the_bias_matters() -> None:
    gate = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    inputs = unit_inputs(64)
    assert agreement(gate, gate, torch.zeros(16), inputs, 4) == (1.0, 1.0)
    assert agreement(gate, gate.roll(1, 0), torch.zeros(16), inputs, 4)[0] < 0.1
    bias = torch.zeros(16)
    bias[:4] = 100.0
    assert agreement(gate, gate.roll(1, 0), bias, inputs, 4) == (1.0, 1.0)
