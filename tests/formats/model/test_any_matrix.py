"""FP8 and NVFP4 for matrices whose kernels take BF16, integers of any width, matrices of zeros."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dsv4
from dsv4.convert.outputs.dequantised import ValuesOutput
from dsv4.convert.plan import make_plan
from dsv4.convert.sources.open import open_source
from dsv4.formats.errors import ExactnessError, FormatError, SourceError
from dsv4.formats.model.recipes import make_recipe
from dsv4.synthetic.tiny import write_tiny
from tests.formats.model.conftest import SMALL
from tests.formats.model.dequantisers import decode, modelopt_encode

ONE_LAYER = dataclasses.replace(
    SMALL, num_hidden_layers=1, compress_ratios=(4,), num_hash_layers=1, num_draft_layers=0
)
COMPRESSOR = "layers.0.attn.compressor.wkv"
DENSE = "layers.0.attn.wq_a"
TABLE = "layers.0.ffn.gate.tid2eid"
EXPERT = "layers.0.ffn.experts.2.w1"
Tensors = dict[str, Tensor]


def _edited(out: Path, edit: Callable[[Tensors], object], flavour: str = "bf16") -> Path:
    """A tiny checkpoint of one shard with its tensors edited in memory."""
    write_tiny(out, ONE_LAYER, flavour=flavour)
    tensors: Tensors = {}
    for file in sorted(out.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (out / "model.safetensors.index.json").unlink()
    edit(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _fp8(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """-> (random codes of the matrix's shape, the scale)."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(weight.shape, generator=generator).to(torch.float8_e4m3fn), scale


def _set_fp8(
    stem: str, role: str, scale: Callable[[int, int], Tensor]
) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        weight = tensors[f"{stem}.weight"]
        codes, factors = _fp8(weight, scale(*weight.shape))
        tensors |= {f"{stem}.weight": codes, f"{stem}.{role}": factors}

    return edit


def _uneven(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) + 0.5


GRAINS: dict[str, Callable[[int, int], Tensor]] = {
    "tiles": lambda n, k: _uneven(-(-n // 128), -(-k // 128)),
    "rows": lambda n, k: _uneven(n, 1),
    "rows without columns": lambda n, k: _uneven(n),
    "one": lambda n, k: _uneven(1),
    "one without shape": lambda n, k: _uneven(),
    "BF16 tiles": lambda n, k: _uneven(-(-n // 128), -(-k // 128)).bfloat16(),
    "E8M0 tiles": lambda n, k: torch.full((-(-n // 128), -(-k // 128)), 2.0**-3).to(
        torch.float8_e8m0fnu
    ),
}


def _by_numpy(codes: Tensor, scale: Tensor) -> Tensor:
    """code * scale by ml_dtypes in float64, rounded once to float32."""
    elements = codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    factors = scale.to(torch.float64).numpy()
    rows, cols = elements.shape
    if factors.ndim == 2 and factors.shape != (rows, 1):
        factors = factors.repeat(128, 0).repeat(128, 1)[:rows, :cols]
    elif factors.shape == (rows,):
        factors = factors[:, None]
    return torch.from_numpy((elements * factors).astype(np.float32))


@pytest.mark.parametrize("grain", GRAINS)
def test_an_fp8_compressor_becomes_the_nearest_bf16_and_says_what_it_lost(
    grain: str, tmp_path: Path
) -> None:
    hub = _edited(tmp_path / "hub", _set_fp8(COMPRESSOR, "weight_scale", GRAINS[grain]))
    stored = load_file(hub / "model.safetensors")
    values = _by_numpy(stored[f"{COMPRESSOR}.weight"], stored[f"{COMPRESSOR}.weight_scale"])
    exact = grain == "E8M0 tiles"
    if not exact:
        with pytest.raises(ExactnessError, match=f"{COMPRESSOR}.weight cannot be carried .* BF16"):
            dsv4.convert(hub, tmp_path / "packed", recipe="native")
    summary = dsv4.convert(hub, tmp_path / "packed", recipe="native", accept_rounding=not exact)
    packed = dsv4.open(tmp_path / "packed")
    name = f"{COMPRESSOR}.weight"
    nearest = values.numpy().astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(packed.dequantize(name).numpy(), nearest)
    assert bool((nearest == values.numpy()).all()) is exact
    assert packed.provenance(name)["exact"] is exact
    assert (name in summary.losses) is not exact
    if not exact:
        lost = ((values - torch.from_numpy(nearest)).double() ** 2).sum() / (
            values.double() ** 2
        ).sum()
        assert summary.losses[name]["rel_mse"] == pytest.approx(float(lost), rel=1e-6)
    assert any(COMPRESSOR in notice and "BF16" in notice for notice in summary.plan.notices)
    report = dsv4.validate(packed, source=hub)
    assert report.ok, report.findings
    (verdict,) = (verdict for verdict in report.tensors if verdict.name == name)
    assert verdict.exact is exact


def test_a_value_that_is_not_the_nearest_fails_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = _edited(tmp_path / "hub", _set_fp8(COMPRESSOR, "weight_scale", GRAINS["rows"]))
    tiles = ValuesOutput._tiles

    def off(output: ValuesOutput, source: object, loss: object) -> object:
        for tile in tiles(output, source, loss):  # type: ignore[arg-type]
            tile.view(torch.int16)[3, 5] += 1
            yield tile

    with monkeypatch.context() as patch:
        patch.setattr(ValuesOutput, "_tiles", off)
        dsv4.convert(hub, tmp_path / "packed", recipe="native", accept_rounding=True)
    report = dsv4.validate(tmp_path / "packed", source=hub)
    found = {(finding.check, finding.where) for finding in report.findings}
    assert ("bound", f"{COMPRESSOR}.weight") in found


def test_nvfp4_for_compressor_and_embedding_is_dequantised_and_for_the_head_carried(
    tmp_path: Path,
) -> None:
    stems = (COMPRESSOR, "embed", "layers.0.attn.indexer.weights_proj", "head")

    def edit(tensors: Tensors) -> None:
        for stem in stems:
            weight = tensors.pop(f"{stem}.weight").float()
            tensors.update({f"{stem}.{r}": t for r, t in modelopt_encode(weight).items()})

    hub = _edited(tmp_path / "hub", edit)
    stored = load_file(hub / "model.safetensors")
    dsv4.convert(hub, tmp_path / "packed", recipe="native", accept_rounding=True)
    packed = dsv4.open(tmp_path / "packed")
    for stem in stems:
        roles = ("weight", "weight_scale", "weight_scale_2")
        theirs = decode({role: stored[f"{stem}.{role}"] for role in roles})
        ours = packed.dequantize(f"{stem}.weight")
        kind = packed.format_of(f"{stem}.weight")
        assert kind == ("nvfp4" if stem == "head" else "plain")
        step = 2.0**-22 if stem == "head" else 2.0**-8
        assert bool(((ours - theirs).abs() <= step * theirs.abs()).all()), stem
    report = dsv4.validate(packed, source=hub)
    assert report.ok, report.findings


def test_a_dense_matrix_with_a_scale_per_row_is_dequantised(tmp_path: Path) -> None:
    hub = _edited(tmp_path / "hub", _set_fp8(DENSE, "weight_scale", GRAINS["rows"]))
    stored = load_file(hub / "model.safetensors")
    values = _by_numpy(stored[f"{DENSE}.weight"], stored[f"{DENSE}.weight_scale"])
    dsv4.convert(hub, tmp_path / "packed", recipe="native", accept_rounding=True)
    packed = dsv4.open(tmp_path / "packed")
    assert torch.equal(packed.dequantize(f"{DENSE}.weight"), values.bfloat16().float())


def test_experts_with_a_scale_per_row_are_rounded_or_refused(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        for expert in range(ONE_LAYER.n_routed_experts):
            for projection in ("w1", "w2", "w3"):
                stem = f"layers.0.ffn.experts.{expert}.{projection}"
                _set_fp8(stem, "weight_scale", GRAINS["rows"])(tensors)

    hub = _edited(tmp_path / "hub", edit)
    with pytest.raises(SourceError, match=r"FP8 with scales of shape .*convert with recipe stand"):
        make_plan(open_source(hub), make_recipe("native"))
    dsv4.convert(hub, tmp_path / "packed")
    report = dsv4.validate(tmp_path / "packed", source=hub)
    assert report.ok, report.findings


INTEGERS = [torch.int32, torch.int16, torch.int8, torch.uint32, torch.uint16, torch.uint8]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_a_table_of_any_integers_is_widened(dtype: torch.dtype, tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[TABLE] = tensors[TABLE].to(dtype)

    write_tiny(tmp_path / "wide", ONE_LAYER, flavour="bf16")
    dsv4.convert(tmp_path / "wide", tmp_path / "expected", recipe="native")
    hub = _edited(tmp_path / "hub", edit)
    dsv4.convert(hub, tmp_path / "packed", recipe="native")
    ours, expected = (dsv4.open(tmp_path / n).store.tensor(TABLE) for n in ("packed", "expected"))
    assert ours.dtype == torch.int64
    assert torch.equal(ours, expected)
    report = dsv4.validate(tmp_path / "packed", source=hub)
    assert report.ok, report.findings
    assert all(verdict.exact for verdict in report.tensors)


def test_a_narrow_table_that_names_no_expert_is_refused(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        tensors[TABLE] = tensors[TABLE].to(torch.int32)
        tensors[TABLE][17, 1] = -1

    hub = _edited(tmp_path / "hub", edit)
    with pytest.raises(FormatError, match=r"tid2eid: the value at \[17, 1\] is -1, expected an en"):
        dsv4.convert(hub, tmp_path / "packed")


def _zero(scales: int, codes: int, g: float) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for projection in ("w1", "w2", "w3"):
            stem = EXPERT.removesuffix("w1") + projection
            tensors[f"{stem}.weight"].fill_(codes)
            tensors[f"{stem}.weight_scale"].view(torch.uint8).fill_(scales)
            tensors[f"{stem}.weight_scale_2"].fill_(g)

    return edit


@pytest.mark.parametrize("scales", [0, 0x38, 0x7F, 0xFF])
def test_an_expert_of_zeros_is_carried_and_said(scales: int, tmp_path: Path) -> None:
    hub = _edited(tmp_path / "hub", _zero(scales, 0, 0.0), "modelopt")
    summary = dsv4.convert(hub, tmp_path / "packed", recipe="native")
    (notice,) = (notice for notice in summary.plan.notices if "zero" in notice)
    assert "3 NVFP4 matrices are zero throughout" in notice
    assert f"{EXPERT}.weight" in notice
    packed = dsv4.open(tmp_path / "packed")
    assert not packed.dequantize(f"{EXPERT}.weight").any()
    assert packed.dequantize("layers.0.ffn.experts.1.w1.weight").any()
    report = dsv4.validate(packed, source=hub)
    assert report.ok, report.findings


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (_zero(0x38, 0x21, 0.0), r"codes are not zero; the source is damaged \(and 2 more"),
        (_zero(0x38, 0x21, float("nan")), "is nan, expected a number .*; the source is damaged"),
        (_zero(0x38, 0x21, -0.5), "is -0.5, expected a number .*; the source is damaged"),
        (_zero(0x38, 0x21, 1.5), "is 1.5, expected a number .*; the source is damaged"),
        (_zero(0x38, 0x21, 26880.0), "is 26880, .* written the other way round"),
    ],
)
def test_the_plan_says_what_is_wrong_with_a_global_scale(
    edit: Callable[[Tensors], None], sentence: str, tmp_path: Path
) -> None:
    hub = _edited(tmp_path / "hub", edit, "modelopt")
    with pytest.raises(FormatError, match=rf"{EXPERT[:-2]}.*{sentence}"):
        make_plan(open_source(hub), make_recipe("native"))


def test_what_modelopt_writes_for_zeros_is_named(tmp_path: Path) -> None:
    """ModelOpt itself quantises a matrix of zeros: 0 / 0."""

    def edit(tensors: Tensors) -> None:
        rows, half = tensors[f"{EXPERT}.weight"].shape
        written = modelopt_encode(torch.zeros(rows, 2 * half))
        assert written["weight"].any()
        tensors.update({f"{EXPERT}.{role}": tensor for role, tensor in written.items()})

    hub = _edited(tmp_path / "hub", edit, "modelopt")
    with pytest.raises(FormatError, match=rf"{EXPERT}.*as ModelOpt 0\.47 writes a matrix of zeros"):
        make_plan(open_source(hub), make_recipe("native"))
