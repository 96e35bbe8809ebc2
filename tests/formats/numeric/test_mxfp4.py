"""The MXFP4 cast against ml_dtypes and a brute-force count of what can be exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dsv4.formats.errors import FormatError
from dsv4.formats.numeric.mxfp4 import CastReport, cast_mxfp4_to_nvfp4
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor, dequantize_nvfp4
from tests.formats.numeric.judges import (
    E2M1_GRID,
    E4M3_POSITIVE,
    ml_e8m0,
    ml_mxfp4,
    ml_nvfp4,
)


def source(
    low: int, high: int, rows: int = 24, cols: int = 256, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random codes with scale bytes over [low, high], both ends taken; some blocks of zeros."""
    generator = torch.Generator().manual_seed(seed + 1000 * (high - low))
    codes = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8, generator=generator)
    # Few distinct magnitudes in some blocks, so that shifts by one to three octaves can be exact.
    few = torch.tensor([0x00, 0x04, 0x44, 0x4C, 0x88, 0xC4, 0x62, 0x66], dtype=torch.uint8)
    poor = few[torch.randint(0, 8, (rows, cols // 2), generator=generator)]
    choose = torch.rand(rows, cols // 16, generator=generator).repeat_interleave(8, dim=1)
    codes = torch.where(choose < 0.4, poor, codes)
    zeros = torch.tensor([0x00, 0x88, 0x80, 0x08], dtype=torch.uint8)[codes.long() % 4]
    codes = torch.where(choose > 0.9, zeros, codes)
    scales = torch.randint(
        low, high + 1, (rows, cols // 32), dtype=torch.uint8, generator=generator
    )
    codes[0, 0], codes[0, 16] = 0x75, 0x75
    scales[0, 0], scales[0, 1] = low, high
    return codes, scales


def exact_in(values: np.ndarray, scale: float) -> bool:
    return bool(np.isin(np.abs(values) / scale, E2M1_GRID).all())


def expected_counts(codes: Tensor, scales: Tensor) -> tuple[int, int]:
    """(re-coded, rounded) blocks of 16, by trying every E4M3 scale on every block."""
    blocks = ml_mxfp4(codes, scales).numpy().reshape(-1, 16)
    exponents = ml_e8m0(scales).log2().numpy().repeat(2, axis=-1).reshape(-1)
    live = np.abs(blocks).max(axis=1) > 0
    top = exponents[live].max() if live.any() else 0
    global_scale = 2.0 ** max(top - 8, -126)
    recoded = rounded = 0
    for block, exponent in zip(blocks[live], exponents[live], strict=True):
        if 2.0**exponent / global_scale in E4M3_POSITIVE:
            continue
        if any(exact_in(block / global_scale, scale) for scale in E4M3_POSITIVE):
            recoded += 1
        else:
            rounded += 1
    return recoded, rounded


def check_cast(codes: Tensor, scales: Tensor) -> tuple[NVFP4Tensor, CastReport]:
    """What holds for every cast; returns it."""
    untouched = codes.clone()
    cast, report = cast_mxfp4_to_nvfp4(codes, scales, name="w")
    assert torch.equal(codes, untouched)
    assert report.blocks == cast.scales.numel() == codes.numel() // 8
    assert (report.recoded_blocks, report.rounded_blocks) == expected_counts(codes, scales)
    assert int(cast.scales.min()) >= 0x01
    assert int(cast.scales.max()) <= 0x7E
    assert 2.0**-126 <= cast.global_scale.item() < 2.0**128
    before, after = ml_mxfp4(codes, scales), ml_nvfp4(cast)
    equal = (before == after).view(-1, 16).all(dim=1)
    assert int((~equal).sum()) == report.rounded_blocks
    assert report.exact == torch.equal(before, after)
    kept = (before == after) & (report.rounded_blocks == 0)
    assert torch.equal(before.signbit()[kept], after.signbit()[kept])  # -0 stays -0
    lost = float((after - before).square().sum() / before.square().sum().clamp(min=1e-300))
    assert report.rel_mse == pytest.approx(lost, rel=1e-9, abs=0.0)
    assert report.max_abs_error == float((after - before).abs().max())
    return cast, report


@pytest.mark.parametrize("span", range(41))
def test_any_span_of_exponents(span: int) -> None:
    codes, scales = source(110, 110 + span)
    cast, report = check_cast(codes, scales)
    if span <= 17:
        assert report == CastReport(report.blocks, 0, 0, 0.0)
        assert torch.equal(cast.codes, codes)
        assert torch.equal(cast.scales[:, 0::2], cast.scales[:, 1::2])
    if span >= 19:
        assert report.recoded_blocks and report.rounded_blocks


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0), (0, 17), (0, 20), (0, 254), (237, 254), (254, 254)]
)
def test_the_ends_of_e8m0(low: int, high: int) -> None:
    report = check_cast(*source(low, high))[1]
    assert report.exact == (high - low <= 17)


def test_small_exponents_are_exact_at_the_smallest_normal_global_scale() -> None:
    cast, report = check_cast(*source(0, 17))
    assert report.exact
    assert cast.global_scale.item() == 2.0**-118
    assert check_cast(*source(0, 3))[0].global_scale.item() == 2.0**-126


def test_a_zero_exponent_is_an_ordinary_block() -> None:
    """Byte 0 is 2^-127, not a mark for zeros."""
    codes = torch.full((1, 32), 0x53, dtype=torch.uint8)
    scales = torch.tensor([[0, 5]], dtype=torch.uint8)
    cast, report = check_cast(codes, scales)
    assert report.exact
    assert bool((dequantize_nvfp4(cast)[0, :32] != 0).all())


def test_blocks_of_zeros_do_not_move_the_window() -> None:
    codes, scales = source(100, 110)
    codes[3, :16], scales[3, 0] = 0x88, 250
    codes[4, :16], scales[4, 0] = 0x00, 0
    cast, report = check_cast(codes, scales)
    assert report == CastReport(report.blocks, 0, 0, 0.0)
    assert cast.scales[3, :2].tolist() == cast.scales[4, :2].tolist() == [0x38, 0x38]
    assert torch.equal(cast.codes, codes)


@pytest.mark.parametrize("rows", [1, 3, 64, 127])
def test_the_largest_scale_is_found_wherever_it_is(rows: int) -> None:
    codes = torch.full((rows, 5 * 16), 0x53, dtype=torch.uint8)
    for place in (0, rows * 5 // 2, rows * 5 - 1):
        scales = torch.full((rows, 5), 110, dtype=torch.uint8)
        scales.view(-1)[place] = 120
        cast, report = check_cast(codes, scales)
        assert report.exact
        assert cast.global_scale.item() == 2.0 ** (120 - 127 - 8)


def test_an_empty_tensor() -> None:
    none = torch.zeros(0, 16, dtype=torch.uint8), torch.zeros(0, 1, dtype=torch.uint8)
    cast, report = cast_mxfp4_to_nvfp4(*none, name="w")
    assert report == CastReport(0, 0, 0, 0.0)
    assert cast.shape == (0, 32)
    assert cast.global_scale.item() == 1.0


@pytest.mark.parametrize("zero", [0x00, 0x88])
def test_a_tensor_of_zeros(zero: int) -> None:
    codes = torch.full((4, 32), zero, dtype=torch.uint8)
    cast, report = cast_mxfp4_to_nvfp4(codes, torch.full((4, 2), 77, dtype=torch.uint8), name="w")
    assert report == CastReport(16, 0, 0, 0.0)
    assert cast.global_scale.item() == 1.0
    assert torch.equal(cast.codes, codes)
    assert set(cast.scales.flatten().tolist()) == {0x38}


def test_rounded_blocks_are_rounded_at_the_optimum() -> None:
    codes, scales = source(100, 119)
    cast, _ = check_cast(codes, scales)
    exact = ml_mxfp4(codes, scales).view(-1, 16)
    found = (ml_nvfp4(cast).view(-1, 16) - exact).square().sum(dim=1)
    best = torch.full_like(found, torch.inf)
    for scale in E4M3_POSITIVE * cast.global_scale.item():
        error = (exact.abs().unsqueeze(-1) - torch.from_numpy(E2M1_GRID) * scale).abs().amin(dim=-1)
        best = torch.minimum(best, error.square().sum(dim=1))
    assert bool((found <= best * (1 + 4e-6)).all())


def test_nan_scale_is_refused_by_row_and_block() -> None:
    codes, scales = source(100, 110)
    codes[5, 48:64] = 0
    scales[5, 3] = 255
    with pytest.raises(
        FormatError, match=r"experts\.3\.w1: .* row 5, block 3 \(columns 96 to 127\)"
    ):
        cast_mxfp4_to_nvfp4(codes, scales, name="experts.3.w1")


@pytest.mark.parametrize(
    ("codes", "scales"),
    [
        (torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 3, dtype=torch.uint8)),
        (torch.zeros(4, 24, dtype=torch.uint8), torch.zeros(4, 1, dtype=torch.uint8)),
        (torch.zeros(4, 32, dtype=torch.int8), torch.zeros(4, 2, dtype=torch.uint8)),
        (torch.zeros(32, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)),
    ],
)
def test_other_inputs_are_refused(codes: Tensor, scales: Tensor) -> None:
    with pytest.raises(FormatError, match="w: MXFP4"):
        cast_mxfp4_to_nvfp4(codes, scales, name="w")


def test_strided_and_unaligned_codes() -> None:
    codes, scales = source(100, 125)
    wide = torch.zeros(codes.shape[0], codes.shape[1] + 5, dtype=torch.uint8)
    wide[:, 5:] = codes
    shifted = torch.zeros(codes.numel() + 3, dtype=torch.uint8)[3:].view_as(codes).copy_(codes)
    expected = cast_mxfp4_to_nvfp4(codes, scales, name="w")
    for other in (wide[:, 5:], shifted):
        cast, report = cast_mxfp4_to_nvfp4(other, scales, name="w")
        assert report == expected[1]
        assert torch.equal(cast.codes, expected[0].codes)
        assert torch.equal(cast.scales, expected[0].scales)


@pytest.mark.parametrize("fault", ["nibbles", "scales", "global scale"])
def test_the_check_catches_a_wrong_cast(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scales = source(100, 110)
    cast, report = cast_mxfp4_to_nvfp4(codes, scales, name="w")
    wrong_codes, wrong_scales, wrong_global = (
        cast.codes.clone(),
        cast.scales.clone(),
        cast.global_scale,
    )
    if fault == "nibbles":
        wrong_codes = (wrong_codes << 4) | (wrong_codes >> 4)
    if fault == "scales":
        wrong_scales[7, 1] += 1
    if fault == "global scale":
        wrong_global = 1 / wrong_global
    wrong = NVFP4Tensor(wrong_codes, wrong_scales, wrong_global, cast.shape)
    monkeypatch.setitem(globals(), "cast_mxfp4_to_nvfp4", lambda *_, **__: (wrong, report))
    with pytest.raises(AssertionError):
        check_cast(codes, scales)
