"""Each fault is a mistake a packer can make; one check passes good bytes and sees every one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dsv4.formats.numeric.codecs import e2m1_encode, e4m3_decode, pack_nibbles, unpack_nibbles
from dsv4.formats.numeric.layouts import pack_nvfp4, unpack_nvfp4, untile_scales
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor, quantize_nvfp4
from dsv4.formats.numeric.operands import Nvfp4Matrix
from tests.formats.numeric.judges import brute_force_errors, ml_nvfp4

ROWS, COLS, GRANULARITY = 136, 256, 8


def weights(seed: int, amax: float) -> Tensor:
    w = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(seed))
    return w * (amax / w.abs().max())


def is_optimal(matrix: Nvfp4Matrix, gate: Tensor, up: Tensor) -> bool:
    """Whether the emitted bytes decode, by ml_dtypes, to the least possible error."""
    for part, w in zip(unpack_nvfp4(matrix), (gate, up), strict=True):
        # The optimum's global scale, not the emitted one.
        global_scale = 2.0 ** torch.ceil((w.abs().max() / 1536).log2()).item()
        best = brute_force_errors(w.reshape(-1, 16) / global_scale).amin(dim=1).sum()
        found = (ml_nvfp4(part) - w.double()).square().sum() / global_scale**2
        if not float(found) <= float(best) * (1 + 1e-5):
            return False
    return True


def pack(gate: NVFP4Tensor, up: NVFP4Tensor) -> Nvfp4Matrix:
    return pack_nvfp4([gate, up], slabs=2, interleave=GRANULARITY)


def swapped_nibbles(gate: NVFP4Tensor, up: NVFP4Tensor) -> Nvfp4Matrix:
    m = pack(gate, up)
    return dataclasses.replace(m, codes=(m.codes << 4) | (m.codes >> 4))


def scale_rows_off_by_one(gate: NVFP4Tensor, up: NVFP4Tensor) -> Nvfp4Matrix:
    return pack(dataclasses.replace(gate, scales=gate.scales.roll(1, 0)), up)


def scale_columns_off_by_one(gate: NVFP4Tensor, up: NVFP4Tensor) -> Nvfp4Matrix:
    return pack(gate, dataclasses.replace(up, scales=up.scales.roll(1, 1)))


def untiled_scales(gate: NVFP4Tensor, up: NVFP4Tensor) -> Nvfp4Matrix:
    m = pack(gate, up)
    plain = untile_scales(m.scales, 384, COLS // 32)  # padding rows included
    return dataclasses.replace(m, scales=plain.reshape(m.scales.shape))


def swapped_gate_and_up(gate: NVFP4Tensor, up: NVFP4Tensor) -> Nvfp4Matrix:
    return pack(up, gate)


def swapped_global_scales(gate: NVFP4Tensor, up: NVFP4Tensor) -> Nvfp4Matrix:
    m = pack(gate, up)
    return dataclasses.replace(m, global_scales=m.global_scales.flip(0))


def reciprocal_global_scale(gate: NVFP4Tensor, up: NVFP4Tensor) -> Nvfp4Matrix:
    m = pack(gate, up)
    return dataclasses.replace(m, global_scales=1 / m.global_scales)


def another_granularity(gate: NVFP4Tensor, up: NVFP4Tensor) -> Nvfp4Matrix:
    m = pack_nvfp4([gate, up], slabs=2, interleave=GRANULARITY // 2)
    return dataclasses.replace(m, interleave=GRANULARITY)


def swapped_slabs(gate: NVFP4Tensor, up: NVFP4Tensor) -> Nvfp4Matrix:
    m = pack(gate, up)
    return dataclasses.replace(m, codes=m.codes.flip(0))


def codes_by_unrounded_scales(gate: NVFP4Tensor, up: NVFP4Tensor) -> Nvfp4Matrix:
    """Codes from a scale that E4M3 had yet to round, by up to half a step."""
    w = weights(1, 0.1)
    generator = torch.Generator().manual_seed(0)
    off = 1 + (torch.rand(gate.scales.shape, generator=generator) - 0.5) / 16
    scales = e4m3_decode(gate.scales) * off * gate.global_scale
    codes = e2m1_encode((w.view(ROWS, -1, 16) / scales.unsqueeze(-1)).flatten(1))
    assert not torch.equal(codes, unpack_nibbles(gate.codes))
    return pack(dataclasses.replace(gate, codes=pack_nibbles(codes)), up)


def one_code_changed(gate: NVFP4Tensor, up: NVFP4Tensor) -> Nvfp4Matrix:
    m = pack(gate, up)
    codes = m.codes.clone()
    codes[1, 77, 3] ^= 0x80
    return dataclasses.replace(m, codes=codes)


FAULTS: list[Callable[[NVFP4Tensor, NVFP4Tensor], Nvfp4Matrix]] = [
    swapped_nibbles,
    scale_rows_off_by_one,
    scale_columns_off_by_one,
    untiled_scales,
    swapped_gate_and_up,
    swapped_global_scales,
    reciprocal_global_scale,
    another_granularity,
    swapped_slabs,
    codes_by_unrounded_scales,
    one_code_changed,
]


def test_good_bytes_pass_the_check() -> None:
    gate, up = weights(1, 0.1), weights(2, 0.03)
    assert is_optimal(pack(quantize_nvfp4(gate), quantize_nvfp4(up)), gate, up)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_faults_fail_the_check(
    fault: Callable[[NVFP4Tensor, NVFP4Tensor], Nvfp4Matrix],
) -> None:
    gate, up = weights(1, 0.1), weights(2, 0.03)
    assert not is_optimal(fault(quantize_nvfp4(gate), quantize_nvfp4(up)), gate, up)
