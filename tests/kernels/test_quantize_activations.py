"""Activations to NVFP4: the reference is ModelOpt's, the division exact, the machine code lean."""

from __future__ import annotations

import random
import warnings
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from dsv4.formats.model.releases import FLASH
from dsv4.formats.numeric.codecs import e2m1_encode, pack_nibbles, unpack_nibbles
from dsv4.formats.numeric.layouts import untile_scales
from dsv4.kernels.core.contract import Case
from dsv4.kernels.core.verify import fault
from dsv4.kernels.ops.fp4_blackwell.quantize_contract import (
    Form,
    amax,
    case,
    cases,
    checks,
    hard_values,
    plain_values,
    quantize,
)
from dsv4.kernels.ops.fp4_blackwell.reference import dequantize_activations, quantize_activations
from tests.support.machine_code import machine_code

with warnings.catch_warnings():  # it warns about torch.jit while importing
    warnings.simplefilter("ignore")
    from modelopt.torch.quantization.qtensor import NVFP4QTensor


def _rng() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def _buffers(one: Case) -> dict[str, Tensor]:
    return one.make(_rng())


INPUTS = {
    "plain": lambda: plain_values(33, 1024, _rng()),
    "hard": lambda: hard_values(64, 2048, _rng()),
    "subnormal": lambda: plain_values(3, 512, _rng()) * 2.0**-130,
    "huge": lambda: plain_values(3, 512, _rng()) * 2.0**124,
    "wide": lambda: plain_values(64, 512, _rng()) * torch.logspace(-30, 30, 64)[:, None],
    "lone values": lambda: torch.eye(64, 512) * -(2.0**-133),
}


@pytest.mark.parametrize("name", INPUTS)
def test_codes_and_scales_are_modelopts(name: str) -> None:
    x = INPUTS[name]().to(torch.bfloat16)
    judge, scales, g = NVFP4QTensor.quantize(x.clone(), 16)
    ours = quantize_activations(x)
    assert torch.equal(ours.global_scale, g.view(1))
    assert torch.equal(ours.scales, scales.view(torch.uint8))
    assert torch.equal(ours.codes, judge._quantized_data)


def test_values_are_what_modelopt_reads() -> None:
    x = INPUTS["hard"]().to(torch.bfloat16)
    ours = quantize_activations(x)
    judge = NVFP4QTensor(x.shape, torch.float64, ours.codes).dequantize(
        scale=ours.scales.view(torch.float8_e4m3fn),
        double_scale=ours.global_scale.to(torch.float64),
        block_sizes={-1: 16},
    )
    torch.testing.assert_close(dequantize_activations(ours), judge, rtol=1e-7, atol=0)


def test_zero_without_a_sign_is_the_packed_formats() -> None:
    x = INPUTS["hard"]().to(torch.bfloat16)
    signed, plain = (quantize_activations(x, signed_zero=flag) for flag in (True, False))
    codes = unpack_nibbles(signed.codes)
    assert int((codes == 8).sum()) > 100
    assert torch.equal(plain.codes, pack_nibbles(torch.where(codes == 8, 0, codes)))
    assert torch.equal(plain.scales, signed.scales)
    tiny = torch.full((1,), -(2.0**-20))
    assert int(e2m1_encode(tiny)) == 0  # how weights are packed


def test_a_row_with_its_own_scale_is_the_row_alone() -> None:
    x = INPUTS["plain"]().to(torch.bfloat16)
    together = quantize_activations(x, per_row=True)
    for row in (0, 13, 32):
        alone = quantize_activations(x[row : row + 1])
        assert torch.equal(together.codes[row : row + 1], alone.codes)
        assert torch.equal(together.scales[row : row + 1], alone.scales)
        assert torch.equal(together.global_scale[row], alone.global_scale[0])


def test_all_zero_has_global_scale_one() -> None:
    zero = quantize_activations(torch.zeros(2, 64, dtype=torch.bfloat16))
    assert zero.global_scale.tolist() == [1.0]
    assert bool((zero.scales == 0x38).all())
    assert not bool(zero.codes.any())


def test_each_group_begins_a_tile_and_what_has_no_row_is_zero() -> None:
    one = case(Form(128, groups=5), "test", "none", 300)
    buffers = _buffers(one)
    buffers["offsets"] = torch.tensor([0, 0, 129, 129, 130, 300], dtype=torch.int32)
    value, tolerance = one.expect(buffers)["scales"]
    assert isinstance(tolerance, Tensor)
    used = 2 + 1 + 2
    assert value.shape[0] >= used
    assert bool(tolerance[used:].isinf().all()) and not bool(tolerance[:used].any())
    rows = quantize_activations(buffers["x"], signed_zero=False).scales
    groups = ((0, 2, 0, 129), (2, 3, 129, 130), (3, 5, 130, 300))
    for first_tile, end_tile, begin, end in groups:
        found = untile_scales(value[first_tile:end_tile], 128 * (end_tile - first_tile), 8)
        assert torch.equal(found[: end - begin], rows[begin:end])
        assert not bool(found[end - begin :].any())


def _float32(value: Fraction) -> Fraction:
    """To 24 bits, ties to even."""
    if not value:
        return value
    ratio = abs(value)
    exponent = ratio.numerator.bit_length() - ratio.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > ratio
    unit = Fraction(2) ** (exponent - 23)
    return round(value / unit) * unit


def test_two_corrections_of_the_reciprocal_product_divide_exactly() -> None:
    """The quantiser's quick division, replayed in rationals, against the rounded quotient."""
    draw = random.Random(7)
    for _ in range(5000):
        a = Fraction(draw.choice((1, -1)) * draw.randrange(128, 256), 1 << draw.randrange(20))
        b = Fraction(draw.randrange(1 << 23, 1 << 24), 1 << 24)
        if draw.random() < 0.5:  # next to a tie of E2M1, where a last place decides
            b = _float32(abs(a) / Fraction(draw.choice((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0))))
            b = _float32(b * (1 + Fraction(draw.randrange(-2, 3), 1 << 24)))
        inverse = _float32(1 / b)
        q = _float32(a * inverse)
        for _ in range(2):
            q = _float32(_float32(a - q * b) * inverse + q)
        assert q == _float32(a / b), (a, b)


def test_a_wrong_scale_or_code_is_caught() -> None:
    one = case(Form(128, per_row=True), "test", "none", 5, hard=True)
    expected = one.expect(_buffers(one))
    for name, (value, _) in expected.items():
        assert fault(name, value, expected[name]) is None
        altered = value.clone().flatten()
        altered.view(torch.uint8)[3] ^= 1
        assert "1 of" in str(fault(name, altered.view(value.shape), expected[name]))


def test_cases_and_checks_are_consistent() -> None:
    for one in (*cases(FLASH, "flash", (1, 8)), *checks(FLASH, "flash")):
        names = {argument.name for k in one.kernels for argument in k.leaves()}
        assert names >= {"x", "amax", "codes", "scales", "global_scale"}
        assert one.nbytes > 0


def test_columns_that_do_not_fill_a_tile_are_refused() -> None:
    with pytest.raises(ValueError, match="100 columns, expected a multiple of 64"):
        quantize(Form(100))


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("form", [Form(4096), Form(2048, True, True, 256)], ids=str)
def test_machine_code(form: Form, arch: str) -> None:
    code = machine_code(quantize(form), arch)
    assert code.spilled == 0
    assert code.resources["REG"] <= 96
    assert ("cvt.rn.satfinite.e2m1x2.f32" in code.ptx) == (arch == "sm_100a")
    assert "cvt.rn.satfinite.e4m3x2.f32" in code.ptx
    assert code.ptx.index("griddepcontrol.wait") < code.ptx.index("ld.global")
    assert machine_code(amax(form.k), arch).spilled == 0
