"""NVFP4 with optimal block scales: E2M1 codes, an E4M3 scale per 16 columns, a global scale.

The value of a code is `e2m1(code) * e4m3(block scale) * global_scale`. The global scale g is the
power of two with max|w| / (6 g) in (128, 256]: it leaves room above the usual scales, makes every
value exact in BF16, and is a normal float32 (so tensors below 1e-35 get less than 128).
Block scales are searched for, see `scale_search`: no data-free choice has less squared error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv4.formats.errors import FormatError
from dsv4.formats.numeric.codecs import E2M1_MAX, e2m1_decode, e4m3_decode, unpack_nibbles
from dsv4.formats.numeric.operands import NVFP4_BLOCK
from dsv4.formats.numeric.scale_search import BlockEncoder

MIN_GLOBAL_EXPONENT = -126
MAX_GLOBAL_EXPONENT = 127

_LARGEST_SCALE = 256.0
_TILE_BLOCKS = 1 << 13  # per thread: what one operation touches stays in a core's cache
_GPU_TILE_BLOCKS = 1 << 18


@dataclasses.dataclass(frozen=True)
class NVFP4Tensor:
    """A quantised tensor, rows as they came: nothing tiled, nothing interleaved.

    codes: uint8 `[..., Kp/2]`, low nibble = even column; Kp is K rounded up to 16, zero-padded.
    scales: uint8 E4M3 bytes `[..., Kp/16]`.
    global_scale: float32 `[]`.
    shape: the logical shape `[..., K]`.
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        *lead, cols = self.shape
        blocks = -(-cols // NVFP4_BLOCK)
        for what, tensor, expected in (
            ("codes", self.codes, (*lead, blocks * NVFP4_BLOCK // 2)),
            ("scales", self.scales, (*lead, blocks)),
        ):
            if tensor.dtype != torch.uint8 or tuple(tensor.shape) != expected:
                raise FormatError(
                    f"NVFP4 {what} are {tensor.dtype} of shape {tuple(tensor.shape)}, "
                    f"expected torch.uint8 of shape {expected}"
                )


def global_scale_for(amax: float) -> float:
    """The power of two g with `amax / (6 g)` in (128, 256], at least 2^-126; 1 for `amax` 0."""
    if not math.isfinite(amax) or amax < 0.0:
        raise FormatError(f"the largest magnitude is {amax}, expected a finite one")
    if amax == 0.0:
        return 1.0
    mantissa, exponent = math.frexp(amax / (E2M1_MAX * _LARGEST_SCALE))
    return math.ldexp(1.0, max(exponent - (mantissa == 0.5), MIN_GLOBAL_EXPONENT))


def quantize_nvfp4(
    w: Tensor,
    *,
    importance: Tensor | None = None,
    global_scale: float | None = None,
    name: str = "tensor",
) -> NVFP4Tensor:
    """Quantise `w` `[..., K]` (float32, bfloat16 or float16) with the least squared error.

    `importance` `[K]` weighs the squared error per column (for instance mean squared
    activations); finite and non-negative. `global_scale` is for parts of a larger matrix:
    `global_scale_for` its amax. Raises FormatError for a non-finite value, naming the tensor
    and the value's index, and for other dtypes and shapes.
    """
    w = w.detach()
    amax = largest_magnitude(w, name)
    scale = global_scale_for(amax) if global_scale is None else global_scale
    _check_global_scale(scale, amax, name)
    rows = w.reshape(-1, w.shape[-1])
    weights = None if importance is None else _column_weights(importance, w.shape[-1], name)
    blocks = -(-w.shape[-1] // NVFP4_BLOCK)
    codes = rows.new_empty((rows.shape[0], blocks, NVFP4_BLOCK // 2), dtype=torch.uint8)
    scales = rows.new_empty((rows.shape[0], blocks), dtype=torch.uint8)
    tile = _TILE_BLOCKS * torch.get_num_threads() if w.device.type == "cpu" else _GPU_TILE_BLOCKS
    tile = min(tile, scales.numel())
    encoder = BlockEncoder(tile, w.device)
    for part, span in _tiles(rows.shape[0], blocks, tile):
        cols = slice(span.start * NVFP4_BLOCK, span.stop * NVFP4_BLOCK)
        values = rows[part, cols]
        lane_weights = None if weights is None else _lanes(weights[cols].expand(len(values), -1))
        packed, raw = encoder.encode(_lanes(values).mul_(1.0 / scale), lane_weights)
        codes[part, span] = packed.view(codes[part, span].shape)
        scales[part, span] = raw.view(scales[part, span].shape)
    return NVFP4Tensor(
        codes=codes.view(*w.shape[:-1], blocks * NVFP4_BLOCK // 2),
        scales=scales.view(*w.shape[:-1], blocks),
        global_scale=torch.tensor(scale, dtype=torch.float32, device=w.device),
        shape=tuple(w.shape),
    )


def dequantize_nvfp4(t: NVFP4Tensor) -> Tensor:
    """Float32 tensor of `t.shape`; every product is exact when the global scale is 2^m."""
    blocks = e2m1_decode(unpack_nibbles(t.codes)).view(*t.scales.shape, NVFP4_BLOCK)
    values = blocks.mul_(e4m3_decode(t.scales).unsqueeze(-1)).mul_(t.global_scale).flatten(-2)
    return values[..., : t.shape[-1]].contiguous()


def _tiles(rows: int, blocks: int, size: int) -> Iterator[tuple[slice, slice]]:
    """(rows, blocks) cut into tiles of at most `size` blocks: whole rows where they fit."""
    wide = min(blocks, size)
    tall = size // wide
    for row in range(0, rows, tall):
        for block in range(0, blocks, wide):
            yield slice(row, row + tall), slice(block, min(block + wide, blocks))


def _lanes(part: Tensor) -> Tensor:
    """Rows `[R, C]` -> float32 `[16, R * ceil(C / 16)]`, the last block of a row zero-padded."""
    padded = pad(part, (0, -part.shape[1] % NVFP4_BLOCK)) if part.shape[1] % NVFP4_BLOCK else part
    blocks = padded.reshape(-1, NVFP4_BLOCK)
    lanes = torch.empty(NVFP4_BLOCK, blocks.shape[0], device=part.device)
    return lanes.copy_(blocks.t())


def largest_magnitude(w: Tensor, name: str, first_row: int = 0) -> float:
    """The largest magnitude in `w`, which may be rows `first_row` on of a matrix called `name`.

    Raises FormatError for a non-finite value, with its index, and for other dtypes and shapes.
    """
    if (
        w.dtype not in (torch.float32, torch.bfloat16, torch.float16)
        or w.dim() == 0
        or not w.numel()
    ):
        raise FormatError(
            f"{name}: cannot quantise {w.dtype} of shape {tuple(w.shape)}, expected float32, "
            f"bfloat16 or float16 with at least one value"
        )
    low, high = w.aminmax()
    amax = max(-float(low), float(high))
    if not math.isfinite(amax):
        row, *rest = (~w.isfinite()).nonzero()[0].tolist()
        raise FormatError(
            f"{name}: the value at {[first_row + row, *rest]} is {float(w[row, *rest])}, expected "
            "finite weights"
        )
    return amax


def _check_global_scale(scale: float, amax: float, name: str) -> None:
    mantissa, exponent = math.frexp(scale)
    if mantissa != 0.5 or not MIN_GLOBAL_EXPONENT < exponent <= MAX_GLOBAL_EXPONENT + 1:
        raise FormatError(f"{name}: global scale {scale} is no power of two that float32 holds")
    if amax > E2M1_MAX * _LARGEST_SCALE * scale:
        raise FormatError(
            f"{name}: the largest magnitude {amax} exceeds 1536 times the global scale {scale}; "
            f"pass global_scale_for of the whole matrix"
        )


def _column_weights(importance: Tensor, cols: int, name: str) -> Tensor:
    """Importance as float32 `[Kp]`, the largest of each block 1 (all 1 where all 0)."""
    if tuple(importance.shape) != (cols,):
        raise FormatError(
            f"{name}: importance has shape {tuple(importance.shape)}, expected ({cols},)"
        )
    if not bool((importance.isfinite() & (importance >= 0)).all()):
        raise FormatError(f"{name}: importance must be finite and non-negative everywhere")
    wide = pad(importance.to(torch.float32), (0, -cols % NVFP4_BLOCK)).view(-1, NVFP4_BLOCK)
    largest = wide.amax(dim=1, keepdim=True)
    return torch.where(largest > 0, wide / largest, torch.ones_like(wide)).flatten()
