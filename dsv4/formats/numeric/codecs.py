"""Element and scale encodings: E2M1, E4M3 and E8M0 bytes, and the matrices made of them.

E2M1 (4 bits): sign, two exponent bits (bias 1), one mantissa bit; no infinities, no NaN. Two
codes share a byte, the even column in the low nibble.
E4M3 (8 bits, the "FN" variant): largest value 448, NaN at 0x7F and 0xFF.
E8M0 (8 bits): the power of two 2^(b-127); 255 is NaN.
Rounding is to nearest, ties to the even code. Sources: OCP Microscaling Formats v1.0, PTX
`cvt.rn.satfinite.e2m1x2.f32`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.formats.errors import FormatError
from dsv4.formats.numeric.operands import FP8_BLOCK

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E8M0_NAN = 255
MXFP4_BLOCK = 32

FP32_EXPONENT = 0x7F800000
ROUND_TO_HALF_OCTAVE = 1.5 * 2.0**22  # adding this times 2^e keeps multiples of 2^(e-1)
_CODE_ZERO = (2 * (127 + 22)) + 1  # (fp32 bits of that number) >> 22


def e2m1_encode(x: Tensor) -> Tensor:
    """Encode floats of any shape to E2M1 codes 0..15 (uint8), saturating at +-6.

    What rounds to zero becomes +0 (code 0), whatever its sign. Float64 is rounded to float32
    first. Raises FormatError on NaN.
    """
    if bool(x.isnan().any()):
        raise FormatError("E2M1 has no NaN, and the values to encode hold one")
    return e2m1_codes_of(x.to(torch.float32).contiguous()).to(torch.uint8)


def e2m1_codes_of(x: Tensor) -> Tensor:
    """`e2m1_encode` of float32 `x` known to hold no NaN, as int32."""
    y = x.abs().clamp_(max=E2M1_MAX)
    power = (y.view(torch.int32) & FP32_EXPONENT).view(torch.float32).clamp_(min=1.0)
    # The sum's last bits count steps of half of `power`; its exponent counts the octaves below,
    # two codes each.
    bits = y.add_(power, alpha=ROUND_TO_HALF_OCTAVE).view(torch.int32)
    codes = torch.bitwise_right_shift(bits, 22, out=power.view(torch.int32)).sub_(_CODE_ZERO)
    codes.add_(bits.bitwise_and_(7))
    sign = torch.bitwise_right_shift(x.view(torch.int32), 28, out=bits).bitwise_and_(8)
    return codes.bitwise_or_(sign.bitwise_and_(codes + 7))


def e2m1_decode(codes: Tensor) -> Tensor:
    """Decode E2M1 codes 0..15 (uint8, any shape) to float32; code 8 is -0.0."""
    wide = codes.to(torch.int16)
    # As float16 bits a code is its value times 2^-14, the subnormal 0.5 included.
    bits = ((wide & 8) << 12).bitwise_or_((wide & 7) << 9)
    return bits.view(torch.float16).to(torch.float32).mul_(2.0**14)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack codes uint8 `[..., K]` (K even) to bytes `[..., K/2]`, even columns low."""
    if codes.shape[-1] % 2:
        raise FormatError(f"{codes.shape[-1]} codes do not pair into bytes; expected an even count")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Unpack bytes `[..., K/2]` to codes uint8 `[..., K]`, the inverse of `pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def e4m3_encode(x: Tensor) -> Tensor:
    """Encode floats to E4M3 bytes (uint8), saturating at +-448; NaN stays NaN."""
    clamped = x.to(torch.float32).clamp(-E4M3_MAX, E4M3_MAX)
    return clamped.to(torch.float8_e4m3fn).view(torch.uint8)


def e4m3_decode(raw: Tensor) -> Tensor:
    """Decode E4M3 bytes (uint8) to float32; 0x7F and 0xFF are NaN."""
    return raw.view(torch.float8_e4m3fn).to(torch.float32)


def e8m0_decode(raw: Tensor) -> Tensor:
    """Decode E8M0 bytes (uint8) to float32: 2^(b-127), exact also for b = 0; 255 is NaN."""
    return raw.view(torch.float8_e8m0fnu).to(torch.float32)


def dequantize_mxfp4(codes: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 codes uint8 `[..., N, K/2]`, E8M0 scales uint8 `[..., N, K/32]` -> float32.

    The result is `[..., N, K]`, exact wherever float32 can hold the value; scale 255 gives NaN.
    """
    if (*codes.shape[:-1], codes.shape[-1] * 2) != (*scales.shape[:-1], scales.shape[-1] * 32):
        raise FormatError(
            f"MXFP4 codes of shape {tuple(codes.shape)} come with scales of shape "
            f"{tuple(scales.shape)}, expected one scale per {MXFP4_BLOCK} columns"
        )
    blocks = e2m1_decode(unpack_nibbles(codes)).view(*scales.shape, MXFP4_BLOCK)
    return blocks.mul_(e8m0_decode(scales).unsqueeze(-1)).flatten(-2)


def dequantize_fp8(codes: Tensor, scales: Tensor) -> Tensor:
    """FP8 codes float8_e4m3fn `[N, K]`, one scale per 128x128 tile -> float32 `[N, K]`.

    `scales` is `[ceil(N/128), ceil(K/128)]` in float8_e8m0fnu, float32 or bfloat16; tiles at
    the edges are partial.
    """
    rows, cols = codes.shape
    expected = (-(-rows // FP8_BLOCK), -(-cols // FP8_BLOCK))
    if tuple(scales.shape) != expected:
        raise FormatError(
            f"FP8 codes of shape {tuple(codes.shape)} come with scales of shape "
            f"{tuple(scales.shape)}, expected {expected}"
        )
    out = codes.to(torch.float32)
    per_column = scales.to(torch.float32).repeat_interleave(FP8_BLOCK, dim=1)[:, :cols]
    for tile, scale in zip(torch.split(out, FP8_BLOCK), per_column, strict=True):
        tile.mul_(scale)
    return out
