"""The quantise bench: its rows mean what they say, and a wrong result is called wrong."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks import quantize as bench
from benchmarks.peers import least_errors
from benchmarks.tables import quality_table, speed_table
from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.numeric.layouts import unpack_nvfp4
from dsv4.formats.numeric.mxfp4 import CastReport, cast_mxfp4_to_nvfp4
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor, dequantize_nvfp4, quantize_nvfp4
from tests.formats.numeric.judges import brute_force_errors

ELEMENTS = 1 << 18


def found(lines: list[bench.Quality], method: str) -> list[bench.Spread]:
    """One method's figures, distribution by distribution."""
    spreads = [line.methods[method] for line in lines]
    return [spread for spread in spreads if spread is not None]


def test_quality_orders_the_methods_as_the_arithmetic_says() -> None:
    lines = bench.quality(ELEMENTS)
    assert [line.distribution for line in lines] == ["Gauss", "Laplace", "t(5)", "t(3)", "uniform"]
    for line in lines:
        assert line.methods.keys() == bench.METHODS.keys()
        errors = {name: spread.mean for name, spread in line.methods.items() if spread}
        assert errors.keys() == bench.METHODS.keys()  # every peer is in the test extra
        assert errors["dsv4"] < errors["four-over-six"] < errors["ModelOpt rounding"]
        # The sweep searches all 126 scales at another global scale: equal but for that.
        assert errors["dsv4"] < errors["ModelOpt sweep"] * 1.01
        assert math.isclose(errors["torchao"], errors["ModelOpt rounding"], rel_tol=0.01)


def test_searches_reach_the_optimum_and_the_others_do_not() -> None:
    lines = bench.quality(ELEMENTS)
    for method in ("dsv4", "ModelOpt sweep"):
        assert all(abs(spread.excess) < 1e-5 for spread in found(lines, method))
    for method in ("four-over-six", "ModelOpt rounding", "torchao"):
        assert all(spread.excess > 0.05 for spread in found(lines, method))


def test_a_method_off_the_optimum_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block in a hundred has another scale than it should."""

    def worse(w: Tensor) -> Tensor:
        tensor = quantize_nvfp4(w)
        tensor.scales.view(-1)[::100] = 0x38
        return dequantize_nvfp4(tensor)

    monkeypatch.setattr(bench, "METHODS", {"dsv4": worse})
    assert all(spread.excess > 1e-3 for spread in found(bench.quality(ELEMENTS), "dsv4"))


@pytest.mark.parametrize("global_scale", [2.0**-14, 0.09375 / 2688])
def test_the_least_errors_are_those_of_brute_force(global_scale: float) -> None:
    for _, weights in bench.distributions(1 << 14):
        blocks = weights.float().view(-1, 16)
        least = least_errors(blocks, torch.tensor(global_scale))
        exact = brute_force_errors(blocks.double() / global_scale).amin(dim=1)
        assert torch.allclose(least, exact * global_scale**2, rtol=1e-5, atol=0.0)


def test_seeds_are_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "METHODS", {"dsv4": bench.METHODS["dsv4"]})
    (one, *_), (both, *_) = bench.quality(ELEMENTS), bench.quality(ELEMENTS, seeds=2)
    alone, spread = one.methods["dsv4"], both.methods["dsv4"]
    assert alone and spread
    assert alone.standard_error is None
    assert alone.least == alone.mean == alone.largest
    assert spread.least < spread.largest
    assert alone.mean in (spread.least, spread.largest)  # seed 0 is one of the two
    assert spread.mean == pytest.approx((spread.least + spread.largest) / 2, rel=1e-12)
    assert spread.standard_error == pytest.approx((spread.largest - spread.least) / 2, rel=1e-9)


def test_the_weights_do_not_touch_the_global_generator() -> None:
    before = torch.get_rng_state()
    first = [weights for _, weights in bench.distributions(1 << 12)]
    assert torch.equal(torch.get_rng_state(), before)
    second = [weights for _, weights in bench.distributions(1 << 12)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small experts, and few turns."""
    monkeypatch.setattr(bench, "EXPERTS", {"small": (512, 512)})
    monkeypatch.setattr(bench, "COLD_BYTES", 1 << 18)


def test_a_wrong_result_is_called_wrong(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.speed(ELEMENTS, threads=1)
    assert all(line.correct for line in right)
    monkeypatch.setitem(bench.METHODS, "dsv4", lambda w: torch.zeros(w.shape))
    monkeypatch.setattr(bench, "unpack_nvfp4", lambda m: list(reversed(unpack_nvfp4(m))))
    wrong = {line.operation for line in bench.speed(ELEMENTS, threads=1) if not line.correct}
    assert wrong == {"round, dsv4", "small w13, layout", "small w13, cast and layout"}


def test_a_wrong_cast_is_called_wrong(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def cast(codes: Tensor, scales: Tensor, *, name: str) -> tuple[NVFP4Tensor, CastReport]:
        scales = scales.clone()
        scales[-1, -1] += 1
        return cast_mxfp4_to_nvfp4(codes, scales, name=name)

    monkeypatch.setattr(bench, "cast_mxfp4_to_nvfp4", cast)
    lines = [line for line in bench.speed(1 << 16, threads=1) if "cast" in line.operation]
    assert len(lines) == 6
    assert not any(line.correct for line in lines)


def test_speed_counts_the_bytes_that_go_in_and_out(small: None) -> None:
    lines = {line.operation: line for line in bench.speed(1 << 16, threads=1)}
    count = 512 * 512
    codes, mx_scales, nv_scales = count // 2, count // 32, count // 16
    for what, matrices in (("small w13", 2), ("small w2", 1)):
        for operation, nbytes in {
            "exact cast": codes + mx_scales + nv_scales,
            "exact cast, scales alone": mx_scales + nv_scales,
            "layout": 2 * (codes + nv_scales),
            "cast and layout": 2 * codes + mx_scales + nv_scales,
        }.items():
            line = lines.pop(f"{what}, {operation}")
            assert (line.elements, line.nbytes) == (matrices * count, matrices * nbytes)
            assert line.from_memory
            assert all(t.seconds > 0 < t.of_copy for t in (line.from_memory, line.in_cache))
    assert all(line.from_memory is None for line in lines.values())
    assert {"round, dsv4", "round, torchao"} <= lines.keys()


def test_from_memory_no_input_is_met_twice_in_a_round() -> None:
    """Every input has memory of its own, and results stay alive: nothing is found in a cache."""
    met: list[int] = []
    sources = [torch.ones(8, dtype=torch.uint8) for _ in range(7)]

    def run(x: Tensor) -> Tensor:
        met.append(x.data_ptr())
        return x.clone()

    bench._medians(run, sources, sources, keep=7, turns=9)
    assert len(met) == 2 * 7 + 1 + 9
    assert all(len(set(met[i : i + 7])) == 7 for i in range(len(met) - 6))


def test_bad_counts_are_refused() -> None:
    with pytest.raises(RuntimeRefusal, match="threads is 0"):
        bench.speed(ELEMENTS, threads=0)
    with pytest.raises(RuntimeRefusal, match="seeds is 0"):
        bench.quality(ELEMENTS, seeds=0)


@pytest.mark.long
def test_the_command_prints_one_json_document() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks",
            "quantize",
            "--elements",
            "65536",
            "--seeds",
            "2",
            "--json",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert len(document["quality"]) == 5
    assert all(line["methods"]["dsv4"]["standard_error"] > 0 for line in document["quality"])
    assert all(line["correct"] and line["in_cache"]["of_copy"] > 0 for line in document["speed"])


def test_the_tables_show_every_figure() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    spread = bench.Spread.of([6e-3, 7e-3], 0.25)
    console.print(quality_table([bench.Quality("Gauss", {"dsv4": spread, "peer": None})], 2))
    cold, hot = bench.Timing(2e-3, 0.75), bench.Timing(1e-3, 0.5)
    lines = [bench.Speed("layout", 4_000_000, 8_000_000, cold, hot, True)]
    console.print(speed_table([*lines, bench.Speed("round", 1, 1, None, hot, False)], 1))
    text = console.export_text()
    for figure in ("6.5000e-03", "5.0e-04", "6.0000e-03", "7.0000e-03", "25.0000%"):
        assert figure in text
    for figure in ("not installed", "2000", "4.00", "0.750", "0.500", "right", "WRONG"):
        assert figure in text
