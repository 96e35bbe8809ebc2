"""Values that are carried byte for byte: looked at once, so that nonsense is refused early."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.formats.errors import FormatError

_NAN_BYTES = {torch.float8_e4m3fn: (0x7F, 0x7F), torch.float8_e8m0fnu: (0xFF, 0xFF)}
"""dtype -> (mask, value): a byte is NaN when `byte & mask == value`."""


def checked(part: Tensor, name: str, first_row: int = 0, below: int | None = None) -> Tensor:
    """`part`, rows `first_row` on of a tensor called `name`, unless a value in it means nothing.

    below: what entries of an integer table have to stay below. Raises FormatError naming the
    tensor, the place and the value: NaN, infinity, or an entry out of range.
    """
    if part.is_floating_point():
        wrong = _meaningless(part)
        expected = "a finite number"
    elif below is not None:
        wrong = (part < 0) | (part >= below)
        expected = f"an entry from 0 to {below - 1}"
    else:
        return part
    if bool(wrong.any()):
        place = wrong.nonzero()[0].tolist()
        value = part[tuple(place)].to(torch.float64).item()
        place[:1] = [first_row + row for row in place[:1]]
        raise FormatError(
            f"{name}: the value at {place} is {value:g}, expected {expected}; the source is damaged"
        )
    return part


def widened(part: Tensor) -> Tensor:
    """`part` as int64 where it holds integers of any width, else as it is."""
    return part if part.is_floating_point() else part.to(torch.int64)


def _meaningless(part: Tensor) -> Tensor:
    if part.dtype not in _NAN_BYTES:
        return ~part.isfinite()
    mask, nan = _NAN_BYTES[part.dtype]
    return part.view(torch.uint8).bitwise_and(mask).eq(nan)
