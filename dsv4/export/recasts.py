"""Changes of scales that change no value: one global scale for two projections, NVFP4 as MXFP4.

Servers give gate and up of an expert one global scale: vLLM takes w1's for both. Two powers of two
become one by moving the octaves between them into the block scales, which E4M3 holds from 2^-9 to
448. And NVFP4 that was cast from MXFP4 has equal powers of two as the two scales of 32 columns, so
that codes and exponents go back as they came; only of 32 zeros far below the others NVFP4 does not
keep the exponent, and another comes back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.formats.errors import FormatError
from dsv4.formats.numeric.codecs import E8M0_NAN, e4m3_decode
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor

_E8M0_BIAS = 127
_E4M3_MAX = 448.0


def with_one_global_scale(parts: Sequence[NVFP4Tensor]) -> list[NVFP4Tensor] | None:
    """`parts` with equal values and equal global scales; None where E4M3 cannot hold them.

    Tried are the parts' own global scales and the powers of two between them, largest first.
    """
    scales = [float(part.global_scale) for part in parts]
    low, high = min(scales), max(scales)
    if low == high:
        return list(parts)
    octaves = math.log2(high / low)
    if octaves != int(octaves) or math.ldexp(low, int(octaves)) != high:
        return None
    for octave in range(int(octaves), -1, -1):
        moved = [_with_global_scale(part, math.ldexp(low, octave)) for part in parts]
        found = [part for part in moved if part is not None]
        if len(found) == len(parts):
            return found
    return None


def _with_global_scale(part: NVFP4Tensor, global_scale: float) -> NVFP4Tensor | None:
    """`part` with another global scale; None where a block scale would have to be rounded."""
    ratio = float(part.global_scale) / global_scale
    wanted = e4m3_decode(part.scales).mul_(ratio)
    if float(wanted.amax()) > _E4M3_MAX:
        return None
    scales = wanted.to(torch.float8_e4m3fn)
    if not torch.equal(scales.to(torch.float32), wanted):
        return None
    g = torch.tensor(global_scale, dtype=torch.float32)
    return NVFP4Tensor(part.codes, scales.view(torch.uint8), g, part.shape)


def nvfp4_to_mxfp4(part: NVFP4Tensor, name: str) -> tuple[Tensor, Tensor]:
    """-> (codes uint8 `[N, K/2]`, E8M0 bytes `[N, K/32]`), the inverse of the exact cast.

    Raises FormatError, naming the matrix, where two neighbouring blocks do not have one power of
    two that E8M0 holds.
    """
    values = e4m3_decode(part.scales).mul_(float(part.global_scale))
    mantissa, exponent = torch.frexp(values.view(values.shape[0], -1, 2))
    wrong = (mantissa != 0.5) | (exponent != exponent[..., :1])
    stored = exponent[..., 0] - 1 + _E8M0_BIAS
    wrong |= ((stored < 0) | (stored >= E8M0_NAN)).unsqueeze(-1)
    if bool(wrong.any()):
        row, block, _ = wrong.nonzero()[0].tolist()
        raise FormatError(
            f"{name}: the scales of row {row}, columns {32 * block} to {32 * block + 31} are not "
            "one power of two, which MXFP4 needs; export it as NVFP4"
        )
    return part.codes, stored.to(torch.uint8)
