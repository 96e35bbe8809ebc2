"""Layouts against torchao, nvmath and the written offset formula; round trips."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4.formats.errors import FormatError
from dsv4.formats.numeric.layouts import (
    LAYOUTS,
    deinterleave_rows,
    dequantize,
    interleave_rows,
    pack_fp8,
    pack_nvfp4,
    tile_scales,
    unpack_fp8,
    unpack_nvfp4,
    untile_scales,
)
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor
from tests.formats.numeric.judges import ml_e4m3, ml_nvfp4
from tests.formats.numeric.tool_judges import torchao_blocked

SHAPES = [(128, 4), (256, 448), (200, 7), (384, 12), (1, 1), (129, 5), (33, 64)]


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def random_nvfp4(rows: int, cols: int, seed: int = 0) -> NVFP4Tensor:
    blocks = -(-cols // 16)
    return NVFP4Tensor(
        random_bytes(rows, blocks * 8, seed=seed),
        random_bytes(rows, blocks, seed=seed + 1) % 0x7E + 1,
        torch.tensor(2.0 ** (seed % 7 - 12)),
        (rows, cols),
    )


def same(a: NVFP4Tensor, b: NVFP4Tensor) -> bool:
    return (
        torch.equal(a.codes, b.codes)
        and torch.equal(a.scales, b.scales)
        and torch.equal(a.global_scale, b.global_scale)
        and a.shape == b.shape
    )


@pytest.mark.parametrize(("rows", "kb"), SHAPES)
def test_tiles_equal_torchaos(rows: int, kb: int) -> None:
    scales = random_bytes(rows, kb)
    assert torch.equal(tile_scales(scales).flatten(), torchao_blocked(scales))


@pytest.mark.parametrize(("rows", "kb"), SHAPES)
def test_tiles_follow_the_offset_formula(rows: int, kb: int) -> None:
    """Offset of row r, column j in CUTLASS's 128x4 atom, tiles along K first."""
    scales = random_bytes(rows, kb)
    flat = tile_scales(scales).flatten()
    r, j = torch.arange(rows).unsqueeze(1), torch.arange(kb)
    tile = (r // 128) * -(-kb // 4) + j // 4
    offset = tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + j % 4
    assert torch.equal(flat[offset], scales)
    padding = torch.ones_like(flat, dtype=torch.bool)
    padding[offset.flatten()] = False
    assert not bool(flat[padding].any())


@pytest.mark.parametrize(("rows", "kb"), [(128, 4), (256, 448), (384, 12)])
def test_tiles_equal_nvmaths(rows: int, kb: int) -> None:
    """NVIDIA's own helper for cuBLASLt."""
    helpers = pytest.importorskip("nvmath.linalg.advanced.helpers.matmul")
    scales = random_bytes(rows, kb) % 0x7F
    theirs = helpers.to_block_scale(
        scales.view(torch.float8_e4m3fn), (rows, kb * 16), helpers.BlockScalingFormat.NVFP4, axis=-1
    )
    assert torch.equal(tile_scales(scales).flatten(), theirs.view(torch.uint8))


def test_stacks_are_tiled_one_by_one() -> None:
    scales = random_bytes(2, 3, 130, 9)
    tiled = tile_scales(scales)
    assert tiled.shape == (2, 3, 2, 3, 512)
    assert torch.equal(tiled[1, 2], tile_scales(scales[1, 2]))
    assert torch.equal(untile_scales(tiled, 130, 9), scales)


@given(st.integers(1, 300), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_tiling_round_trips(rows: int, kb: int) -> None:
    scales = random_bytes(rows, kb, seed=rows)
    assert torch.equal(untile_scales(tile_scales(scales), rows, kb), scales)


def test_tiles_of_another_shape_are_refused() -> None:
    with pytest.raises(FormatError, match="tiled scales"):
        untile_scales(tile_scales(random_bytes(128, 4)), 129, 4)


def test_interleaving_alternates_runs_of_rows() -> None:
    gate, up = torch.arange(8).view(8, 1), torch.arange(100, 108).view(8, 1)
    mixed = interleave_rows(gate, up, 4).flatten().tolist()
    assert mixed == [0, 1, 2, 3, 100, 101, 102, 103, 4, 5, 6, 7, 104, 105, 106, 107]
    with pytest.raises(FormatError, match="rows of gate: 8, expected a multiple of 3"):
        interleave_rows(gate, up, 3)
    with pytest.raises(FormatError, match="up has"):
        interleave_rows(gate, up[:4], 4)
    with pytest.raises(FormatError, match="interleaved rows: 8"):
        deinterleave_rows(gate, 8)


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 5), st.booleans())
@settings(max_examples=40, deadline=None)
def test_interleaving_round_trips(granularity: int, runs: int, width: int, stack: bool) -> None:
    shape = (*((3,) if stack else ()), granularity * runs, width)
    gate, up = random_bytes(*shape), random_bytes(*shape, seed=1)
    back = deinterleave_rows(interleave_rows(gate, up, granularity), granularity)
    assert torch.equal(back[0], gate)
    assert torch.equal(back[1], up)


@given(st.integers(1, 150), st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_one_matrix_of_any_shape_round_trips(rows: int, cols: int) -> None:
    part = random_nvfp4(rows, cols, seed=cols)
    matrix = pack_nvfp4([part])
    assert matrix.codes.shape == (1, rows, -(-cols // 64) * 32)
    (back,) = unpack_nvfp4(matrix)
    assert same(back, part)
    again = pack_nvfp4([back])
    assert torch.equal(again.codes, matrix.codes)
    assert torch.equal(again.scales, matrix.scales)


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 2), st.integers(0, 4), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_slabs_and_interleaving_round_trip(slabs: int, tiles: int, log: int, runs: int) -> None:
    cols, rows = slabs * tiles * 64, (1 << log) * runs
    parts = [random_nvfp4(rows, cols, seed=slabs), random_nvfp4(rows, cols, seed=slabs + 9)]
    matrix = pack_nvfp4(parts, slabs=slabs, interleave=1 << log)
    assert matrix.codes.shape == (slabs, 2 * rows, tiles * 32)
    assert all(same(a, b) for a, b in zip(unpack_nvfp4(matrix), parts, strict=True))
    one = pack_nvfp4(parts[:1], slabs=slabs)
    assert same(unpack_nvfp4(one)[0], parts[0])


def test_a_slab_is_the_matrix_of_its_columns() -> None:
    part = random_nvfp4(130, 256)
    whole = pack_nvfp4([part], slabs=2)
    right = NVFP4Tensor(part.codes[:, 64:], part.scales[:, 8:], part.global_scale, (130, 128))
    alone = pack_nvfp4([right])
    assert torch.equal(whole.codes[1], alone.codes[0])
    assert torch.equal(whole.scales[1], alone.scales[0])
    assert whole.codes.is_contiguous()
    assert whole.scales.is_contiguous()


@pytest.mark.parametrize("offset", [0, 1, 4, 8])
@pytest.mark.parametrize("slabs", [1, 2])
def test_memory_of_any_alignment_is_arranged_alike(offset: int, slabs: int) -> None:
    """Scales move as words where they can; odd offsets and rows apart make no difference."""
    part = random_nvfp4(130, 256)
    expected = pack_nvfp4([part], slabs=slabs)
    wide = torch.cat([random_bytes(130, offset), part.codes, random_bytes(130, 3)], dim=1)
    scales = torch.cat([random_bytes(130, offset), part.scales, random_bytes(130, 3)], dim=1)
    columns = slice(offset, offset + 128), slice(offset, offset + 16)
    apart = NVFP4Tensor(wide[:, columns[0]], scales[:, columns[1]], part.global_scale, part.shape)
    shifted = [
        torch.zeros(x.numel() + offset, dtype=torch.uint8)[offset:].view_as(x).copy_(x)
        for x in (part.codes, part.scales)
    ]
    for other in (apart, NVFP4Tensor(shifted[0], shifted[1], part.global_scale, part.shape)):
        packed = pack_nvfp4([other], slabs=slabs)
        assert torch.equal(packed.codes, expected.codes)
        assert torch.equal(packed.scales, expected.scales)
        assert packed.codes.is_contiguous()
        assert packed.scales.is_contiguous()


@pytest.mark.parametrize(
    ("parts", "slabs", "interleave", "message"),
    [
        ([random_nvfp4(8, 64)] * 2, 1, 0, "2 NVFP4 parts"),
        ([random_nvfp4(8, 64)], 1, 8, "1 NVFP4 parts"),
        ([random_nvfp4(8, 64), random_nvfp4(8, 128)], 1, 8, "shapes"),
        ([random_nvfp4(8, 64)], 2, 0, "columns in 2 slabs: 64, expected a multiple of 128"),
        ([random_nvfp4(12, 64)] * 2, 1, 8, "rows of gate: 12"),
    ],
)
def test_impossible_arrangements_are_refused(
    parts: list[NVFP4Tensor], slabs: int, interleave: int, message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        pack_nvfp4(parts, slabs=slabs, interleave=interleave)


@given(st.sampled_from([1, 2, 4]), st.integers(1, 140), st.integers(1, 90))
@settings(max_examples=30, deadline=None)
def test_fp8_round_trips(slabs: int, rows: int, per_slab: int) -> None:
    codes = random_bytes(rows, slabs * per_slab).view(torch.float8_e4m3fn)
    tiles = (-(-rows // 128), -(-slabs * per_slab // 128))
    scales = random_bytes(*tiles).view(torch.float8_e8m0fnu)
    matrix = pack_fp8(codes, scales, slabs=slabs)
    assert matrix.codes.shape == (slabs, rows, per_slab)
    back, back_scales = unpack_fp8(matrix)
    assert torch.equal(back.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(back_scales.view(torch.uint8), scales.view(torch.uint8))


def test_fp8_refuses_slabs_that_do_not_divide() -> None:
    codes = torch.zeros(4, 10).to(torch.float8_e4m3fn)
    with pytest.raises(FormatError, match="columns in 4 slabs: 10"):
        pack_fp8(codes, torch.ones(1, 1), slabs=4)


def test_dequantize_sees_through_every_layout() -> None:
    gate, up = random_nvfp4(16, 128), random_nvfp4(16, 128, seed=5)
    mixed = dequantize(pack_nvfp4([gate, up], slabs=2, interleave=8)).double()
    assert torch.equal(mixed, interleave_rows(ml_nvfp4(gate), ml_nvfp4(up), 8))
    odd = random_nvfp4(5, 100)
    assert torch.equal(dequantize(pack_nvfp4([odd])).double(), ml_nvfp4(odd)[:, :100])
    codes = (random_bytes(130, 256) % 0x7F).view(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0], [4.0, 0.5]])
    grown = scales.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1).double()
    values = dequantize(pack_fp8(codes, scales, slabs=2))
    assert torch.equal(values.double(), ml_e4m3(codes.view(torch.uint8)) * grown)
    plain = torch.randn(3, 4).to(torch.bfloat16)
    assert torch.equal(dequantize(plain), plain.float())


def test_registered_layouts_are_pairs() -> None:
    assert list(LAYOUTS) == ["nvfp4.kmajor.sf32x4x4", "fp8.block128", "plain"]
    part = random_nvfp4(32, 256)
    codes = random_bytes(8, 256).view(torch.float8_e4m3fn)
    nvfp4, fp8, plain = LAYOUTS.values()
    assert all(layout.id == key for key, layout in LAYOUTS.items())
    assert same(nvfp4.inverse(nvfp4.forward([part], slabs=4, interleave=0))[0], part)
    back, scales = fp8.inverse(fp8.forward(codes, torch.ones(1, 2), slabs=2))
    assert torch.equal(back.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(scales, torch.ones(1, 2))
    assert plain.inverse(plain.forward(part.codes)) is part.codes
