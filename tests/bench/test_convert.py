"""The convert bench: its figures are there and agree, and a wrong result is called wrong."""

from __future__ import annotations

import dataclasses
import io
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsv4.bench import convert as bench
from dsv4.bench.lanes import LANES, RECIPES, copy, stack_experts, swizzle, today
from dsv4.commands.bench_tables import throughput_table
from dsv4.convert.engine import convert
from dsv4.formats.errors import ConfigError, OutOfSpaceError
from dsv4.formats.model import releases
from dsv4.synthetic import real_shapes
from dsv4.synthetic.disk_space import require_space
from tests.formats.numeric import tool_judges

SMALL = dataclasses.replace(
    releases.FLASH,
    hidden_size=512,
    num_attention_heads=8,
    moe_intermediate_size=256,
    n_routed_experts=8,
    o_groups=8,
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(releases.MODELS, "flash", SMALL)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """One small layer."""
    real_shapes.write_checkpoint(tmp_path / "source", real_shapes.fresh_layers(SMALL, 1, 8, 1024))
    return tmp_path / "source"


def flip_a_byte(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place, os.SEEK_SET if place >= 0 else os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def test_the_figures_are_there_and_agree(tmp_path: Path) -> None:
    found = bench.throughput("flash", tmp_path, layers=1, experts=0, workers=2, rounds=1)
    assert list(tmp_path.iterdir()) == []
    assert (found.experts, found.rounds) == (8, 1)
    assert [line.lane for line in found.lines] == list(LANES)
    plain = found.lines[0].rate
    for line in found.lines:
        assert line.correct, line
        assert line.of_copy == pytest.approx(line.rate / plain)
        assert line.slowest == line.rate == line.fastest > 0
        assert line.peak_rss >= line.base_rss > 50 << 20
        assert line.start_up > 0
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(throughput_table(found))
    text = console.export_text()
    for figure in (*LANES, f"{plain:.3f}", "right"):
        assert figure in text


def test_a_wrong_result_is_called_wrong(source: Path, tmp_path: Path) -> None:
    judge = bench.Judge(source)
    for recipe in RECIPES:
        convert(source, tmp_path / recipe, recipe)
        assert judge.correct(recipe, tmp_path / recipe)
    copy(source, tmp_path / "copy")
    today(source, tmp_path / "today")
    for lane in ("copy", "today"):
        assert judge.correct(lane, tmp_path / lane)
    flip_a_byte(tmp_path / "copy" / "layer-0.safetensors", -1)
    assert not judge.correct("copy", tmp_path / "copy")
    codes = sorted((tmp_path / "native/layers/0/ffn/experts/w2/codes").rglob("c/0/*/*"))
    flip_a_byte(next(path for path in codes if path.is_file()), 0)
    assert not judge.correct("native", tmp_path / "native")
    for kind in ("weight", "scale"):
        tensors = load_file(tmp_path / "today/layer-0.safetensors")
        tensors[f"{bench.EXPERTS}.w13.{kind}"].view(torch.uint8)[0, 0, 0] ^= 1
        path = tmp_path / f"today-{kind}"
        path.mkdir()
        save_file(tensors, path / "layer-0.safetensors")
        assert judge.correct("standard", tmp_path / "standard")  # what it compares with
        assert not judge.correct("today", path)


def test_today_stacks_every_expert_and_keeps_the_rest(source: Path) -> None:
    path = source / "layer-0.safetensors"
    stacked = stack_experts(load_file(path))
    prefix = bench.EXPERTS
    assert not any(name.startswith(f"{prefix}.0.") for name in stacked)
    with safe_open(path, framework="pt") as tensors:
        gate = tensors.get_tensor(f"{prefix}.7.w1.weight")
        up = tensors.get_tensor(f"{prefix}.7.w3.weight")
        assert torch.equal(stacked[f"{prefix}.w13.weight"][7], torch.cat([gate, up]))
        name = "layers.0.attn_norm.weight"
        assert torch.equal(stacked[name], tensors.get_tensor(name))


@pytest.mark.parametrize("shape", [(128, 4), (256, 16), (100, 6), (384, 3)])
def test_scales_are_swizzled_as_torchao_does(shape: tuple[int, int]) -> None:
    scales = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator())
    assert torch.equal(swizzle(scales).flatten(), tool_judges.torchao_blocked(scales).flatten())


def test_too_little_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OutOfSpaceError, match=r"needs 1000000\.00 TB"):
        require_space(tmp_path, 10**18)
    with pytest.raises(ConfigError, match="at least 1"):
        bench.throughput("flash", tmp_path, layers=0, experts=0, workers=1, rounds=1)
    assert list(tmp_path.iterdir()) == []
