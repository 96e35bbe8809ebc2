"""transformers' model is given our weights: the logits of its steps are our reference's."""

from __future__ import annotations

import dataclasses
from io import StringIO

import torch
from rich.console import Console

from benchmarks import transformers_peer as peer
from benchmarks.tables import rivals_table
from dsv4.bench.decode import Step
from dsv4.bench.random_weights import RandomWeights
from dsv4.kernels.reference.numerics import Numerics
from dsv4.runtime.model import load
from tests.runtime.gpu.test_session import CPU, SMALL

CONFIG = dataclasses.replace(SMALL, compress_ratios=(0, 4, 128, 4), sliding_window=16)
IDS = torch.randint(0, CONFIG.vocab_size, (300,), generator=torch.Generator().manual_seed(7))


def test_steps_after_a_prompt_in_pieces_are_the_references() -> None:
    weights = RandomWeights(CONFIG, CPU)
    model = peer.build(weights)
    cache, _ = peer.read(model, IDS[:290])
    found = torch.cat([peer.read(model, IDS[n : n + 1], cache)[1] for n in range(290, 300)])
    session = load(weights, dtype=torch.float32, numerics=Numerics.EXACT).session(300)
    wanted = session.forward(IDS)[290:]
    difference, same = peer.agreement(wanted, found)
    assert difference < 0.1
    assert same > 0.8


def test_other_logits_are_not_called_right() -> None:
    logits = torch.randn(8, 500, generator=torch.Generator().manual_seed(0))
    difference, same = peer.agreement(logits, logits.roll(1, 0))
    assert not peer.Rivals("0", 1, difference, same, ()).right
    assert peer.Rivals("0", 1, *peer.agreement(logits, logits), ()).right


def test_what_fails_is_a_line() -> None:
    def fails() -> float:
        raise RuntimeError("not under capture\nstack")

    assert peer._try("graph", fails) == peer.Rival("graph", None, "RuntimeError: not under capture")
    assert peer._try("eager", lambda: 2.0) == peer.Rival("eager", 2.0)


def _shown(rivals: peer.Rivals, steps: list[Step]) -> str:
    console = Console(width=200, record=True, file=StringIO())
    console.print(rivals_table(rivals, steps))
    return console.export_text()


def test_the_table_has_its_time_over_ours_and_what_failed() -> None:
    step = Step(1, 5e-4, 1e-4, 5e-5, 10**9, 0.5, 6.0, 67)
    lines = (peer.Rival("eager", 2e-2), peer.Rival("graph", None, "RuntimeError: no"))
    shown = _shown(peer.Rivals("5.0", 64, 0.05, 0.5, lines), [step])
    assert "logits right: 0.0500" in shown
    assert "20.00" in shown
    assert "40.0" in shown
    assert "RuntimeError: no" in shown
    absent = peer.Rivals("", 64, 0.0, 0.0, (), "not installed: transformers")
    assert "not installed" in _shown(absent, [step])
