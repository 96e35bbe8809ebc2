"""MXFP4 -> NVFP4 without rounding: codes verbatim, E8M0 scales become E4M3 powers of two.

MXFP4 has one scale 2^k per 32 columns, NVFP4 one E4M3 scale per 16 and a global scale. E4M3 holds
the powers of two 2^-9 .. 2^8, so with the global scale 2^m, m = k_max - 8, every block with
k_max - 17 <= k <= k_max is carried exactly by copying its nibbles (-0 included). Of a block below
that window each half of 16 columns is looked at by itself: it is carried exactly when its codes
divided by 2^d are codes again (d octaves below; the scale is then 2^-9), and rounded at the
optimum otherwise. k_max is taken over blocks with a code other than +-0.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from dsv4.formats.errors import FormatError
from dsv4.formats.numeric.codecs import (
    E8M0_NAN,
    MXFP4_BLOCK,
    e2m1_codes_of,
    e2m1_decode,
    e4m3_decode,
    pack_nibbles,
    unpack_nibbles,
)
from dsv4.formats.numeric.nvfp4 import (
    MAX_GLOBAL_EXPONENT,
    MIN_GLOBAL_EXPONENT,
    NVFP4Tensor,
)
from dsv4.formats.numeric.operands import NVFP4_BLOCK
from dsv4.formats.numeric.scale_search import ONE_BYTE, BlockEncoder

_E8M0_BIAS = 127
_MAX_SCALE_EXPONENT = 8  # 2^8 is the largest power of two in E4M3
_MIN_SCALE_EXPONENT = -9  # 2^-9 the smallest (subnormal, byte 0x01)
MAX_OCTAVES = _MAX_SCALE_EXPONENT - _MIN_SCALE_EXPONENT  # of block scales, always exact
_MIN_NORMAL = -6
_E4M3_BIAS = 7
_TWO_NORMALS = 0x0808  # times a biased exponent: that power of two as two E4M3 bytes
_MAGNITUDE_NIBBLES = 0x7777777777777777
_CHUNK = 1 << 16
_PARTS = 64


@dataclasses.dataclass(frozen=True)
class CastReport:
    """What became of a tensor's 16-wide blocks.

    `recoded_blocks` have other codes but equal values, `rounded_blocks` have other values;
    `rel_mse` is sum((w' - w)^2) / sum(w^2) over the tensor, `max_abs_error` the largest |w' - w|.
    """

    blocks: int
    recoded_blocks: int
    rounded_blocks: int
    rel_mse: float
    max_abs_error: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether every value was carried exactly."""
        return self.rounded_blocks == 0


def cast_mxfp4_to_nvfp4(
    codes: Tensor, scales: Tensor, *, name: str
) -> tuple[NVFP4Tensor, CastReport]:
    """Cast MXFP4 codes uint8 `[N, K/2]` with E8M0 scales uint8 `[N, K/32]` to NVFP4.

    The result may share the memory of `codes`. Raises FormatError for shapes that do not match
    and for a NaN scale, naming the tensor, its row and its block of 32 columns.
    """
    low, high = _check(codes, scales, name)
    top = _largest_exponent(codes, scales)
    shift = min(max(top - _MAX_SCALE_EXPONENT, MIN_GLOBAL_EXPONENT), MAX_GLOBAL_EXPONENT)
    out_scales = _scale_bytes(scales, shift, low, high)
    out_codes, recoded, rounded, lost, worst = codes, 0, 0, 0.0, 0.0
    unit = shift + _E8M0_BIAS
    if low < unit + _MIN_SCALE_EXPONENT or high > unit + _MAX_SCALE_EXPONENT:
        halves = _as_halves(codes)
        exponents = scales.to(torch.int16).sub_(_E8M0_BIAS)
        outside = (out_scales == 0).flatten().nonzero().flatten()
        out_codes = codes.clone(memory_format=torch.contiguous_format)
        for index in torch.split(outside, _CHUNK):
            octaves = (exponents.flatten()[index // 2] - shift).double()
            fit = _fit(halves.flatten()[index], octaves.exp2())
            _as_halves(out_codes).view(-1)[index] = fit.codes
            out_scales.view(-1)[index] = fit.scales
            recoded, rounded, lost = recoded + fit.recoded, rounded + fit.rounded, lost + fit.lost
            worst = max(worst, fit.worst)
        if lost:
            lost /= _energy(codes, exponents - shift)
    tensor = NVFP4Tensor(
        codes=out_codes,
        scales=out_scales,
        global_scale=torch.tensor(2.0**shift, dtype=torch.float32, device=codes.device),
        shape=(codes.shape[0], codes.shape[1] * 2),
    )
    worst = math.ldexp(worst, shift)
    return tensor, CastReport(out_scales.numel(), recoded, rounded, lost, worst)


def _check(codes: Tensor, scales: Tensor, name: str) -> tuple[int, int]:
    """-> the least and the largest scale byte, (255, 0) of none."""
    for what, tensor in (("codes", codes), ("scales", scales)):
        if tensor.dtype != torch.uint8 or tensor.dim() != 2:
            raise FormatError(
                f"{name}: MXFP4 {what} are {tensor.dtype} of rank {tensor.dim()}, "
                f"expected torch.uint8 of rank 2"
            )
    expected = (codes.shape[0], codes.shape[1] * 2 // MXFP4_BLOCK)
    if codes.shape[1] * 2 % MXFP4_BLOCK or tuple(scales.shape) != expected:
        raise FormatError(
            f"{name}: MXFP4 codes of shape {tuple(codes.shape)} come with scales of shape "
            f"{tuple(scales.shape)}, expected one scale per {MXFP4_BLOCK} columns"
        )
    if not scales.numel():
        return E8M0_NAN, 0
    low, high = int(scales.amin()), int(scales.amax())
    if high == E8M0_NAN:
        row, block = (scales == E8M0_NAN).nonzero()[0].tolist()
        raise FormatError(
            f"{name}: the E8M0 scale of row {row}, block {block} (columns {block * MXFP4_BLOCK} "
            f"to {block * MXFP4_BLOCK + MXFP4_BLOCK - 1}) is 255 (NaN), expected 0 to 254; "
            f"the source is damaged"
        )
    return low, high


def _as_halves(codes: Tensor) -> Tensor:
    """Codes as int64 `[N, K/16]`: the 16 nibbles of an NVFP4 block in one word."""
    if not codes.is_contiguous() or codes.storage_offset() % 8:
        codes = codes.clone(memory_format=torch.contiguous_format)
    return codes.view(torch.int64)


def _scale_bytes(scales: Tensor, shift: int, low: int, high: int) -> Tensor:
    """E8M0 bytes `[N, K/32]` -> E4M3 bytes of 2^(k - shift) `[N, K/16]`, 0 where there is none.

    All of `scales` lie between `low` and `high`.
    """
    unit = shift + _E8M0_BIAS  # the E8M0 byte of 2^shift
    if low - unit >= _MIN_NORMAL and high - unit <= _MAX_SCALE_EXPONENT:
        pairs = scales.to(torch.int16, memory_format=torch.contiguous_format)
        pairs = pairs.sub_(unit - _E4M3_BIAS).mul_(_TWO_NORMALS)
        return pairs.view(torch.uint8)
    table = torch.zeros(256, dtype=torch.int16)
    for exponent in range(_MIN_SCALE_EXPONENT, _MAX_SCALE_EXPONENT + 1):
        normal = exponent >= _MIN_NORMAL
        byte = (exponent + _E4M3_BIAS) << 3 if normal else 1 << (exponent - _MIN_SCALE_EXPONENT)
        if 0 <= exponent + unit < E8M0_NAN:
            table[exponent + unit] = byte << 8 | byte
    pairs = table.to(scales.device).index_select(0, scales.flatten().to(torch.int32))
    return pairs.view(torch.uint8).view(scales.shape[0], -1)


def _largest_exponent(codes: Tensor, scales: Tensor) -> int:
    """k_max over the blocks of 32 with a non-zero code; 8, for a global scale of 1, if none.

    One block with the largest scale decides, as a rule, so that the codes are not read.
    """
    if not scales.numel():
        return _MAX_SCALE_EXPONENT
    row, block = _where_largest(scales)
    width = MXFP4_BLOCK // 2
    if any(byte & 0x77 for byte in codes[row, block * width : (block + 1) * width].tolist()):
        return int(scales[row, block]) - _E8M0_BIAS
    live = (_as_halves(codes) & _MAGNITUDE_NIBBLES).view(*scales.shape, 2).any(dim=-1)
    return int(scales[live].max()) - _E8M0_BIAS if bool(live.any()) else _MAX_SCALE_EXPONENT


def _where_largest(x: Tensor) -> tuple[int, int]:
    """Row and column of a largest byte: a maximum is found much faster than its place."""
    flat = x.flatten()
    parts = flat.view(math.gcd(flat.numel(), _PARTS), -1)
    part = int(parts.amax(dim=1).argmax())
    return divmod(part * parts.shape[1] + int(parts[part].argmax()), x.shape[1])


@dataclasses.dataclass(frozen=True)
class _Fit:
    """Blocks whose scale E4M3 cannot hold, expressed otherwise.

    `lost` is the squared error, `worst` the largest one of an element, in units of 2^shift.
    """

    codes: Tensor  # int64 [blocks]
    scales: Tensor  # uint8 [blocks]
    recoded: int
    rounded: int
    lost: float
    worst: float


def _fit(halves: Tensor, scale: Tensor) -> _Fit:
    """Fit blocks of 16 (one int64 each) with float64 scales outside E4M3's powers of two."""
    before = _values(halves, scale)
    zero = (halves & _MAGNITUDE_NIBBLES) == 0
    smallest = 2.0**_MIN_SCALE_EXPONENT
    shifted = e2m1_codes_of((before / smallest).float()).to(torch.uint8)
    shifted |= unpack_nibbles(halves.view(torch.uint8).view(-1, 8)) & 8  # keep -0
    shifted = pack_nibbles(shifted).view(torch.int64).flatten()
    same = (_values(shifted, torch.full_like(scale, smallest)) == before).all(dim=1)
    codes = torch.where(same & ~zero, shifted, halves)
    scales = torch.ones_like(zero, dtype=torch.uint8).masked_fill_(zero, ONE_BYTE)
    rounded, lost, worst = ~(same | zero), 0.0, 0.0
    if bool(rounded.any()):
        lanes = before[rounded].float().t().contiguous()
        packed, scales[rounded] = BlockEncoder(lanes.shape[1], lanes.device).encode(lanes)
        codes[rounded] = packed.reshape(-1).view(torch.int64)  # one block has odd strides
        after = _values(codes[rounded], e4m3_decode(scales[rounded]).double())
        error = after.sub_(before[rounded])
        lost, worst = float(error.square().sum()), float(error.abs().amax())
    return _Fit(codes, scales, int((same & ~zero).sum()), int(rounded.sum()), lost, worst)


def _values(halves: Tensor, scale: Tensor) -> Tensor:
    """Float64 values `[blocks, 16]` of blocks given as int64 words, at float64 scales."""
    codes = unpack_nibbles(halves.view(torch.uint8).view(-1, NVFP4_BLOCK // 2))
    return e2m1_decode(codes).double().mul_(scale.unsqueeze(1))


def _energy(codes: Tensor, octaves: Tensor) -> float:
    """Sum of squared values of MXFP4 codes at scales 2^octave, row by chunk of rows."""
    total = 0.0
    rows = max(1, _CHUNK // max(1, codes.shape[1]))
    for part, octave in zip(torch.split(codes, rows), torch.split(octaves, rows), strict=True):
        squares = e2m1_decode(unpack_nibbles(part)).square_().view(*octave.shape, MXFP4_BLOCK)
        total += float((squares.sum(dim=-1).double() * (2.0 * octave.double()).exp2()).sum())
    return total
