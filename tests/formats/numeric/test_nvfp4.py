"""NVFP4 quantisation: its quality, its edge cases, and its agreement with other tools."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv4.formats.errors import FormatError
from dsv4.formats.numeric.codecs import (
    dequantize_mxfp4,
    e2m1_encode,
    e4m3_decode,
    e4m3_encode,
    pack_nibbles,
)
from dsv4.formats.numeric.nvfp4 import (
    NVFP4Tensor,
    dequantize_nvfp4,
    global_scale_for,
    quantize_nvfp4,
)
from tests.formats.numeric.judges import ml_nvfp4, relative_mse
from tests.formats.numeric.tool_judges import (
    modelopt_dequantize,
    modelopt_quantize,
    torchao_dequantize,
)

FLT_MAX = torch.finfo(torch.float32).max

# Relative MSE of an exhaustive search on 8.4 M bfloat16 weights whose largest scale is 256.
BOUNDS = {"gauss": 6.60e-3, "laplace": 6.80e-3, "t5": 6.75e-3, "t3": 6.89e-3, "uniform": 6.18e-3}


def sample(kind: str, rows: int, cols: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(rows, cols, generator=generator)

    def student(degrees: int) -> Tensor:
        chi = sum((normal().square() for _ in range(degrees)), torch.zeros(1))
        return normal() / (chi / degrees).sqrt()

    def laplace() -> Tensor:
        u = torch.rand(rows, cols, generator=generator) - 0.5
        return -u.sign() * (1 - 2 * u.abs()).clamp(min=1e-7).log()

    make: dict[str, Callable[[], Tensor]] = {
        "gauss": normal,
        "laplace": laplace,
        "t5": lambda: student(5),
        "t3": lambda: student(3),
        "uniform": lambda: torch.rand(rows, cols, generator=generator) - 0.5,
    }
    w = make[kind]()
    return (w * (0.75 / w.abs().max())).to(torch.bfloat16)  # amax / 6 = 2^-3, the largest scale


def margin(kind: str, original: Tensor, decoded: Tensor) -> float:
    """Three standard errors of the relative MSE, a ratio of sums over independent blocks.

    t3 has no fourth moment: its sampled energy hangs on a few weights, and 3 % are allowed.
    """
    if kind == "t3":
        return 0.03 * BOUNDS[kind]
    energy = original.double().square().view(-1, 16).sum(dim=1)
    error = (decoded.double() - original.double()).square().view(-1, 16).sum(dim=1)
    residual = error - energy * float(error.sum() / energy.sum())
    return 3 * float(residual.square().sum().sqrt() / energy.sum())


@pytest.mark.parametrize("kind", BOUNDS)
def test_quality_is_that_of_an_exhaustive_search(kind: str) -> None:
    w = sample(kind, 1024, 1024)
    decoded = ml_nvfp4(quantize_nvfp4(w))
    assert relative_mse(w, decoded) <= BOUNDS[kind] + margin(kind, w, decoded)


@pytest.mark.long
@pytest.mark.parametrize("kind", BOUNDS)
def test_quality_on_eight_million_weights(kind: str) -> None:
    w = sample(kind, 2048, 4096, seed=1)
    decoded = dequantize_nvfp4(quantize_nvfp4(w))
    assert relative_mse(w, decoded) <= BOUNDS[kind] + margin(kind, w, decoded)


@pytest.mark.parametrize("kind", ["gauss", "laplace", "uniform"])
def test_quality_hardly_depends_on_where_in_its_octave_amax_lies(kind: str) -> None:
    """A power of two cannot put the largest scale at 256: light tails lose up to 2.6 %."""
    loss = 1.03 if kind == "uniform" else 1.003
    for phase in (1.1, 1.25, 1.4, 1.55, 1.7, 1.85):
        w = (sample(kind, 256, 512).float() * phase).to(torch.bfloat16)
        decoded = ml_nvfp4(quantize_nvfp4(w))
        assert relative_mse(w, decoded) <= BOUNDS[kind] * loss + margin(kind, w, decoded)


@pytest.mark.parametrize("kind", BOUNDS)
def test_rounding_beats_modelopt(kind: str) -> None:
    w = sample(kind, 128, 512)
    theirs = relative_mse(w, ml_nvfp4(modelopt_quantize(w)))
    assert relative_mse(w, ml_nvfp4(quantize_nvfp4(w))) < 0.9 * theirs


def quantize_as_modelopt(w: Tensor) -> NVFP4Tensor:
    """g = amax / 2688, one scale per block from its amax: our codecs under ModelOpt's rule."""
    blocks = w.float().view(w.shape[0], -1, 16)
    global_scale = w.abs().amax().float() / (6 * 448)
    wanted = blocks.abs().amax(dim=-1) / (6 * global_scale)
    wanted[wanted == 0] = 1.0
    scales = e4m3_encode(wanted.clamp(min=2.0**-9))
    scaled = blocks / (e4m3_decode(scales) * global_scale).unsqueeze(-1)
    codes = e2m1_encode(scaled) | ((scaled < 0).to(torch.uint8) << 3)  # it keeps -0
    return NVFP4Tensor(pack_nibbles(codes.flatten(1)), scales, global_scale, tuple(w.shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", BOUNDS)
def test_codecs_reproduce_modelopt_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    w = sample(kind, 128, 512).to(dtype) * (1.0 if dtype is torch.bfloat16 else 1.0 / 3.0)
    w[3, :32] = 0.0
    ours, theirs = quantize_as_modelopt(w), modelopt_quantize(w)
    assert torch.equal(ours.global_scale, theirs.global_scale)
    assert torch.equal(ours.scales, theirs.scales)
    assert torch.equal(ours.codes, theirs.codes)


def any_bytes(rows: int, cols: int, exponent: int) -> NVFP4Tensor:
    """All codes, all finite positive scales."""
    generator = torch.Generator().manual_seed(exponent)
    return NVFP4Tensor(
        torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, generator=generator),
        torch.randint(1, 127, (rows, cols // 16), dtype=torch.uint8, generator=generator),
        torch.tensor(2.0**exponent),
        (rows, cols),
    )


@pytest.mark.parametrize("exponent", [-126, -12, 0, 100])
def test_dequantisation_equals_the_tools_bit_for_bit(exponent: int) -> None:
    t = any_bytes(64, 256, exponent)
    ours = dequantize_nvfp4(t)
    assert torch.equal(ours.double(), ml_nvfp4(t))
    assert torch.equal(ours, modelopt_dequantize(t))
    assert torch.equal(ours, torchao_dequantize(t))
    if exponent > -100:  # where BF16 is not subnormal
        assert torch.equal(ours, ours.to(torch.bfloat16).float())


def test_dequantisation_with_any_global_scale_equals_the_tools_within_rounding() -> None:
    t = dataclasses.replace(any_bytes(64, 256, 0), global_scale=torch.tensor(0.0123))
    for theirs in (modelopt_dequantize(t), torchao_dequantize(t)):
        torch.testing.assert_close(dequantize_nvfp4(t), theirs, rtol=2.0**-23, atol=0.0)


def test_zero_tensor() -> None:
    t = quantize_nvfp4(torch.zeros(3, 32))
    assert t.global_scale.item() == 1.0
    assert set(t.scales.flatten().tolist()) == {0x38}
    assert not bool(t.codes.any())


def test_zero_block_and_signed_zeros() -> None:
    w = sample("gauss", 4, 64).float()
    w[1, 16:32] = -0.0
    t = quantize_nvfp4(w)
    assert t.scales[1, 1].item() == 0x38
    assert not bool(t.codes[1, 8:16].any())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_values_are_refused_by_index(bad: float, dtype: torch.dtype) -> None:
    w = torch.zeros(5, 40, dtype=dtype)
    w[2, 33] = w[4, 1] = bad
    with pytest.raises(FormatError, match=r"head\.weight: the value at \[2, 33\] is .*(nan|inf)"):
        quantize_nvfp4(w, name="head.weight")


@pytest.mark.parametrize(
    "w", [torch.zeros(4, 16, dtype=torch.int8), torch.zeros(()), torch.zeros(0, 16)]
)
def test_other_inputs_are_refused(w: Tensor) -> None:
    with pytest.raises(FormatError, match="x: cannot quantise"):
        quantize_nvfp4(w, name="x")


@pytest.mark.parametrize("amax", [FLT_MAX, 3e38, 1e30, 1.0, 1e-30, 1e-36])
def test_quality_holds_at_any_magnitude(amax: float) -> None:
    x = sample("gauss", 64, 256).double()
    w = (x / x.abs().max() * amax).float()
    t = quantize_nvfp4(w)
    decoded = ml_nvfp4(t)
    assert bool(decoded.isfinite().all())
    assert torch.equal(dequantize_nvfp4(t).double(), decoded)
    assert relative_mse(w.double() / amax, decoded / amax) < 7e-3


@pytest.mark.parametrize("amax", [1e-38, 1e-40, 1.5e-45])
def test_subnormal_magnitudes_keep_a_normal_global_scale(amax: float) -> None:
    """Steps of 2^-126 * 2^-9 / 2 are all there is, and no error may exceed half of one."""
    generator = torch.Generator().manual_seed(0)
    w = (torch.rand(8, 64, generator=generator).double() * amax).float()
    w[0, 0] = amax
    t = quantize_nvfp4(w)
    assert t.global_scale.item() == 2.0**-126
    step = max(amax / 3, 2.0**-136)
    assert float((ml_nvfp4(t) - w.double()).abs().max()) <= step / 2


@given(st.floats(min_value=2.0**-116, max_value=FLT_MAX, width=32))
def test_global_scale_puts_the_largest_scale_above_128(amax: float) -> None:
    scale = global_scale_for(amax)
    assert math.frexp(scale)[0] == 0.5
    assert 6 * 128 < amax / scale <= 6 * 256


def test_global_scale_of_nothing_and_of_too_little() -> None:
    assert global_scale_for(0.0) == 1.0
    assert global_scale_for(1e-40) == 2.0**-126
    with pytest.raises(FormatError, match="nan"):
        global_scale_for(math.nan)


@pytest.mark.parametrize("shape", [(7,), (16,), (3, 5, 100), (2, 1), (40, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_shape_is_padded_with_zero_columns(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=generator).to(dtype)
    t = quantize_nvfp4(w)
    padded = -(-shape[-1] // 16) * 16
    assert t.codes.shape == (*shape[:-1], padded // 2)
    assert t.scales.shape == (*shape[:-1], padded // 16)
    assert t.shape == shape
    decoded = ml_nvfp4(t)
    assert not bool(decoded[..., shape[-1] :].any())
    assert torch.equal(dequantize_nvfp4(t).double(), decoded[..., : shape[-1]])
    assert relative_mse(w, dequantize_nvfp4(t)) < 2e-2


def test_rows_wider_than_a_tile_and_strided_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    w = sample("laplace", 24, 800)
    whole = quantize_nvfp4(w)
    strided = quantize_nvfp4(w.t().contiguous().t())
    monkeypatch.setattr("dsv4.formats.numeric.nvfp4._TILE_BLOCKS", 7)
    tiled = quantize_nvfp4(w)
    for other in (strided, tiled):
        assert torch.equal(other.codes, whole.codes)
        assert torch.equal(other.scales, whole.scales)


def test_parts_with_the_whole_matrix_scale_equal_the_whole() -> None:
    w = sample("t5", 96, 128)
    whole = quantize_nvfp4(w)
    scale = global_scale_for(float(w.abs().max()))
    parts = [quantize_nvfp4(part, global_scale=scale) for part in torch.chunk(w, 3)]
    assert torch.equal(torch.cat([part.codes for part in parts]), whole.codes)
    assert torch.equal(torch.cat([part.scales for part in parts]), whole.scales)


@pytest.mark.parametrize("scale", [0.3, 0.0, -1.0, 2.0**-127, 2.0**128, math.nan, 2.0**-12])
def test_unsuitable_global_scales_are_refused(scale: float) -> None:
    with pytest.raises(FormatError, match=r"x: .*global scale"):
        quantize_nvfp4(torch.ones(2, 16), global_scale=scale, name="x")


def test_what_was_mxfp4_is_recovered() -> None:
    """Every block holds a 6 or a 4 somewhere, so its power-of-two scale is in the window."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (64, 64), dtype=torch.uint8, generator=generator)
    codes[:, ::8] = 0x17  # a 6 in every block of 16
    scales = torch.randint(115, 128, (64, 4), dtype=torch.uint8, generator=generator)
    w = dequantize_mxfp4(codes, scales)
    assert torch.equal(dequantize_nvfp4(quantize_nvfp4(w)), w)


def test_importance_lowers_the_weighted_error() -> None:
    w = sample("gauss", 256, 512).float()
    generator = torch.Generator().manual_seed(0)
    importance = (torch.randn(512, generator=generator) * 2).exp()

    def weighted(t: NVFP4Tensor) -> float:
        return float(((ml_nvfp4(t) - w.double()).square() * importance.double()).sum())

    plain, informed = quantize_nvfp4(w), quantize_nvfp4(w, importance=importance)
    assert weighted(informed) < 0.97 * weighted(plain)
    flat = quantize_nvfp4(w, importance=torch.full((512,), 3.0))
    assert torch.equal(flat.scales, plain.scales)
    assert torch.equal(flat.codes, plain.codes)


def test_columns_without_importance() -> None:
    w = sample("gauss", 32, 48).float()
    importance = torch.ones(48)
    importance[:16] = 0.0  # a block without any: treated evenly
    importance[20:32] = 0.0
    t = quantize_nvfp4(w, importance=importance)
    assert torch.equal(t.scales[:, 0], quantize_nvfp4(w).scales[:, 0])
    error = (ml_nvfp4(t) - w.double()).square()[:, 16:20]
    assert float(error.sum() / w[:, 16:20].double().square().sum()) < 4e-3


@pytest.mark.parametrize("bad", [torch.ones(15), -torch.ones(16), torch.full((16,), math.nan)])
def test_bad_importance_is_refused(bad: Tensor) -> None:
    with pytest.raises(FormatError, match="x: importance"):
        quantize_nvfp4(torch.ones(2, 16), importance=bad, name="x")


def test_parts_that_do_not_fit_together_are_refused() -> None:
    t = quantize_nvfp4(torch.ones(3, 40))
    with pytest.raises(
        FormatError, match=r"NVFP4 scales .* expected torch\.uint8 of shape \(3, 3\)"
    ):
        dataclasses.replace(t, scales=t.scales[:, :2])
    with pytest.raises(FormatError, match=r"NVFP4 codes are torch\.float32"):
        dataclasses.replace(t, codes=t.codes.float())
