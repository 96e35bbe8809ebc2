"""One global scale for two projections, and back to MXFP4: values and bytes stay, or a refusal."""

from __future__ import annotations

import pytest
import torch

from dsv4.export.recasts import nvfp4_to_mxfp4, with_one_global_scale
from dsv4.formats.errors import FormatError
from dsv4.formats.numeric.mxfp4 import cast_mxfp4_to_nvfp4
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor, dequantize_nvfp4


def nvfp4(g: float, scales: list[int]) -> NVFP4Tensor:
    rng = torch.Generator().manual_seed(len(scales))
    codes = torch.randint(256, (1, 8 * len(scales)), generator=rng, dtype=torch.uint8)
    raw = torch.tensor([scales], dtype=torch.uint8)
    return NVFP4Tensor(codes, raw, torch.tensor(g), (1, 16 * len(scales)))


@pytest.mark.parametrize(
    "scales, wanted",
    [
        ([2.0**-8, 2.0**-8], 2.0**-8),
        ([2.0**-8, 2.0**-10], 2.0**-8),  # the smaller one's block scales shrink by 4: they can
        ([2.0**-8, 2.0**-20], 2.0**-11),  # one shrinks by 2^9 to 0x01, the other grows by 8
        ([2.0**-8, 2.0**-40], None),
        ([2.0**-8, 3 * 2.0**-10], None),
    ],
)
def test_two_global_scales_become_one_or_stay(scales: list[float], wanted: float | None) -> None:
    parts = [nvfp4(g, [0x38, 0x40, 0x50]) for g in scales]
    made = with_one_global_scale(parts)
    if wanted is None:
        assert made is None
        return
    assert made is not None
    for before, after in zip(parts, made, strict=True):
        assert float(after.global_scale) == wanted
        assert torch.equal(after.codes, before.codes)
        assert torch.equal(dequantize_nvfp4(after), dequantize_nvfp4(before))


def test_block_scales_that_cannot_shrink_let_the_others_grow() -> None:
    """0x01 is the least there is, so the larger global scale gives way."""
    parts = [nvfp4(2.0**-8, [0x38]), nvfp4(2.0**-9, [0x01])]
    made = with_one_global_scale(parts)
    assert made is not None and {float(part.global_scale) for part in made} == {2.0**-9}
    for before, after in zip(parts, made, strict=True):
        assert torch.equal(dequantize_nvfp4(after), dequantize_nvfp4(before))


@pytest.mark.parametrize("span", [0, 3, 17])
@pytest.mark.parametrize("top", [-30, 0, 90])
def test_mxfp4_comes_back_byte_for_byte(span: int, top: int) -> None:
    rng = torch.Generator().manual_seed(span)
    codes = torch.randint(256, (8, 64), generator=rng, dtype=torch.uint8) | 0x11  # none is zero
    exponents = torch.randint(top - span, top + 1, (8, 4), generator=rng) + 127
    exponents[0, 0], exponents[0, 1] = top + 127, top - span + 127
    scales = exponents.to(torch.uint8)
    cast, report = cast_mxfp4_to_nvfp4(codes.clone(), scales, name="w")
    assert report.exact and not report.recoded_blocks
    back = nvfp4_to_mxfp4(cast, "w")
    assert torch.equal(back[0], codes) and torch.equal(back[1], scales)


@pytest.mark.parametrize("scales", [[0x38, 0x40], [0x39, 0x39], [0x03, 0x03]])
def test_scales_that_mxfp4_does_not_have_are_refused(scales: list[int]) -> None:
    with pytest.raises(FormatError, match=r"w: the scales of row 0, columns 0 to 31"):
        nvfp4_to_mxfp4(nvfp4(1.0, scales), "w")
