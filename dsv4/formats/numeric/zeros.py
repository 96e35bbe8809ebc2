"""Whether a tensor is zero throughout, as a download that was cut short, or a dead expert, is.

Nearly every tensor shows in its first bytes that it is not, so that the others are all that is
read a second time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.formats.numeric.nvfp4 import NVFP4Tensor
from dsv4.formats.numeric.operands import NVFP4_BLOCK

_MAGNITUDES = 0x77  # of two E2M1 codes in a byte
_MAGNITUDE = 0x7F  # of an E4M3 byte
_HEAD = 4096


def is_zero(part: Tensor) -> bool:
    """Whether all of `part` is +0 or -0. FP8 (E4M3) too; not for E8M0, which has no zero."""
    flat = part.reshape(-1)
    if part.dtype is torch.float8_e4m3fn:
        flat = flat.view(torch.uint8)
        return not any(bool((x & _MAGNITUDE).any()) for x in (flat[:_HEAD], flat[_HEAD:]))
    return not any(bool(x.any()) for x in (flat[:_HEAD], flat[_HEAD:]))


def nvfp4_is_zero(part: NVFP4Tensor) -> bool:
    """Whether every value is zero: of each block the codes, or its scale."""
    codes = part.codes.reshape(-1, NVFP4_BLOCK // 2)
    scales = part.scales.reshape(-1)
    cut = _HEAD // (NVFP4_BLOCK // 2)
    for rows in (slice(None, cut), slice(cut, None)):
        live = (codes[rows] & _MAGNITUDES).any(dim=1)
        if bool((live & (scales[rows] & _MAGNITUDE).bool()).any()):
            return False
    return True


class Zeros:
    """Watches a tensor pass tile by tile."""

    def __init__(self) -> None:
        self.all_zero = True

    def see(self, part: Tensor) -> Tensor:
        """`part` itself, looked at."""
        self.all_zero = self.all_zero and is_zero(part)
        return part
