"""The quantise bench: its rows mean what they say, and a wrong result is called wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from dsv4.bench import quantize as bench
from dsv4.formats.errors import RuntimeRefusal

ELEMENTS = 1 << 18


def test_quality_orders_the_methods_as_the_arithmetic_says() -> None:
    lines = list(bench.quality(ELEMENTS))
    assert [line.distribution for line in lines] == ["Gauss", "Laplace", "t(5)", "t(3)", "uniform"]
    for line in lines:
        errors = {name: value for name, value in line.rel_mse.items() if value is not None}
        assert errors.keys() == bench.METHODS.keys()  # every peer is in the test extra
        assert errors["dsv4"] < errors["four-over-six"] < errors["ModelOpt rounding"]
        # The sweep searches all 126 scales at another global scale: equal but for that.
        assert errors["dsv4"] < errors["ModelOpt sweep"] * 1.01
        assert math.isclose(errors["torchao"], errors["ModelOpt rounding"], rel_tol=0.01)


def test_the_weights_do_not_touch_the_global_generator() -> None:
    before = torch.get_rng_state()
    first = [weights for _, weights in bench.distributions(1 << 12)]
    assert torch.equal(torch.get_rng_state(), before)
    second = [weights for _, weights in bench.distributions(1 << 12)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_wrong_result_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.speed(ELEMENTS, threads=1)
    assert all(line.correct and line.seconds > 0 and line.of_copy > 0 for line in right)
    monkeypatch.setitem(bench.METHODS, "dsv4", lambda w: torch.zeros(w.shape))
    wrong = {line.operation: line.correct for line in bench.speed(ELEMENTS, threads=1)}
    assert wrong["round, dsv4"] is False


def test_bad_thread_counts_are_refused() -> None:
    with pytest.raises(RuntimeRefusal, match="threads is 0"):
        bench.speed(ELEMENTS, threads=0)


def test_the_command_prints_one_json_document() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dsv4", "bench", "quantize", "--elements", "65536", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert len(document["quality"]) == 5
    assert all(line["correct"] for line in document["speed"])
