"""Element codecs against ml_dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv4.formats.errors import FormatError
from dsv4.formats.numeric.codecs import (
    dequantize_fp8,
    dequantize_mxfp4,
    e2m1_decode,
    e2m1_encode,
    e4m3_decode,
    e4m3_encode,
    e8m0_decode,
    pack_nibbles,
    unpack_nibbles,
)
from tests.formats.numeric.judges import ml_e2m1, ml_e4m3, ml_e8m0, ml_mxfp4

ALL_BYTES = torch.arange(256, dtype=torch.int16).to(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def ml_encode(x: Tensor) -> Tensor:
    codes = x.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    codes[codes == 8] = 0  # our sign of zero
    return torch.from_numpy(codes)


@pytest.mark.parametrize(
    "x",
    [
        torch.linspace(-9, 9, (1 << 16) + 1),
        torch.arange(-2048, 2049) / 256,  # every tie, exactly
        torch.nextafter(torch.arange(-64, 65) / 8, torch.tensor(torch.inf)),
        torch.nextafter(torch.arange(-64, 65) / 8, torch.tensor(-torch.inf)),
        torch.tensor([1e-45, -1e-45, 1e38, -1e38, torch.inf, -torch.inf, 0.0, -0.0]),
    ],
    ids=["dense", "ties", "above ties", "below ties", "extremes"],
)
def test_e2m1_encodes_as_ml_dtypes_does(x: Tensor) -> None:
    assert torch.equal(e2m1_encode(x), ml_encode(x))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=64))
def test_e2m1_encodes_any_float_as_ml_dtypes_does(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(e2m1_encode(x), ml_encode(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_e2m1_accepts_other_floats(dtype: torch.dtype) -> None:
    x = (torch.arange(-60, 61) / 8).to(dtype)
    assert torch.equal(e2m1_encode(x), ml_encode(x.float()))


def test_e2m1_accepts_strided_input() -> None:
    x = torch.linspace(-7, 7, 64).view(8, 8).t()
    assert torch.equal(e2m1_encode(x), ml_encode(x.contiguous()))


def test_e2m1_refuses_nan() -> None:
    with pytest.raises(FormatError, match="NaN"):
        e2m1_encode(torch.tensor([1.0, torch.nan]))


def test_e2m1_decodes_as_ml_dtypes_does() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert same_bits(e2m1_decode(codes), ml_e2m1(codes).float())


def test_nibbles_put_the_even_column_low() -> None:
    assert pack_nibbles(torch.tensor([[1, 2, 15, 8]], dtype=torch.uint8)).tolist() == [[0x21, 0x8F]]
    with pytest.raises(FormatError, match="3 codes"):
        pack_nibbles(torch.zeros(3, dtype=torch.uint8))


def test_nibbles_round_trip() -> None:
    assert torch.equal(pack_nibbles(unpack_nibbles(ALL_BYTES)), ALL_BYTES)


def test_e4m3_encodes_as_ml_dtypes_does() -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    x = bits.view(torch.bfloat16).float()
    x = x[x.isfinite()]
    ties = torch.from_numpy(np.arange(0, 4096, dtype=np.float32) / 2048)
    for values in (x, ties, torch.linspace(-450, 450, 9001)):
        expected = values.numpy().clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        assert torch.equal(e4m3_encode(values), torch.from_numpy(expected))


def test_e4m3_and_e8m0_decode_as_ml_dtypes_does() -> None:
    for ours, theirs in (
        (e4m3_decode(ALL_BYTES), ml_e4m3(ALL_BYTES)),
        (e8m0_decode(ALL_BYTES), ml_e8m0(ALL_BYTES)),
    ):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num().double(), theirs.nan_to_num())
    assert e8m0_decode(ALL_BYTES)[0].item() == 2.0**-127


def test_dequantize_mxfp4_decodes_stacks_as_ml_dtypes_does() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 256, (2, 3, 5, 32), dtype=torch.uint8, generator=generator)
    scales = torch.randint(3, 250, (2, 3, 5, 2), dtype=torch.uint8, generator=generator)
    assert same_bits(dequantize_mxfp4(codes, scales), ml_mxfp4(codes, scales).float())
    with pytest.raises(FormatError, match=r"\(2, 3, 5, 32\)"):
        dequantize_mxfp4(codes, scales[..., :1])


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (1, 385)])
def test_dequantize_fp8_scales_whole_tiles(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    rows, cols = shape
    generator = torch.Generator().manual_seed(2)
    codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    tiles = (-(-rows // 128), -(-cols // 128))
    scales = torch.randint(-20, 20, tiles, generator=generator).float().exp2().to(dtype)
    grown = np.kron(scales.float().numpy(), np.ones((128, 128)))[:rows, :cols]
    expected = ml_e4m3(codes.view(torch.uint8)).numpy() * grown
    assert torch.equal(dequantize_fp8(codes, scales).double(), torch.from_numpy(expected))
    with pytest.raises(FormatError, match="FP8 codes"):
        dequantize_fp8(codes, scales.float().repeat(2, 1))
