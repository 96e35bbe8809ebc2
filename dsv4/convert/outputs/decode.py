"""Reading a logical tensor of any encoding: verbatim where a format is kept, as values elsewhere.

NVFP4 is taken over byte for byte. Its global scale g multiplies: ModelOpt's `weight_scale_2` is g;
compressed-tensors stores G = 1/g, so g = fl32(1/G), exact when G is a power of two and within half
an ulp otherwise. Our values are code * scale * g, rounded once. ModelOpt's own order of operations
is code * fl(scale * g) and compressed-tensors' code * fl(scale / G): the same when the global scale
is a power of two, else less than 2^-22 of the value away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.convert.sources.base import Reader
from dsv4.formats.errors import FormatError
from dsv4.formats.model.safetensors_header import TensorEntry
from dsv4.formats.model.source_tensor import Encoding, SourceTensor
from dsv4.formats.numeric.codecs import dequantize_fp8, dequantize_mxfp4
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor, dequantize_nvfp4
from dsv4.formats.numeric.operands import FP8_BLOCK

_E4M3_NAN = 0x7F
_SMALLEST_NORMAL = 2.0**-126
_MAGNITUDES = 0x77  # of the two E2M1 codes in a byte, without their signs
_PLAUSIBLE = (2.0**-30, 2.0**-4)  # g of weights whose largest magnitude is 2.5e-6 to 168


def read_values(source: Reader, tensor: SourceTensor) -> Tensor:
    """The values of a tensor of any encoding as float32, in its logical shape."""
    match tensor.encoding:
        case Encoding.MXFP4:
            return dequantize_mxfp4(*read_mxfp4(source, tensor))
        case Encoding.NVFP4:
            return dequantize_nvfp4(read_nvfp4(source, tensor))
        case Encoding.FP8:
            return read_value_rows(source, tensor, 0, tensor.shape[0])
        case Encoding.PLAIN:
            return source.read(tensor.weight).to(torch.float32)


def read_value_rows(source: Reader, tensor: SourceTensor, start: int, stop: int) -> Tensor:
    """Rows `[start, stop)` of a matrix that is not MXFP4 as float32 `[stop - start, K]`.

    `start` is a multiple of 128, the rows of an FP8 tile.
    """
    if tensor.encoding is Encoding.NVFP4:
        return dequantize_nvfp4(read_nvfp4_rows(source, tensor, start, stop))
    rows = source.read_rows(tensor.weight, start, stop)
    if tensor.encoding is not Encoding.FP8:
        return rows.to(torch.float32)
    scale = _scale(tensor)
    if tensor.tiled:
        tiles = source.read_rows(scale, start // FP8_BLOCK, -(-stop // FP8_BLOCK))
        return dequantize_fp8(rows, tiles)
    factors = source.read(scale).to(torch.float32).reshape(-1, 1)
    own = factors[start:stop] if len(factors) == tensor.shape[0] else factors
    return rows.to(torch.float32).mul_(own)


def read_mxfp4(source: Reader, tensor: SourceTensor) -> tuple[Tensor, Tensor]:
    """-> (codes uint8 `[N, K/2]`, E8M0 bytes uint8 `[N, K/32]`), bit views, never value casts."""
    codes = source.read(tensor.weight).view(torch.uint8)
    return codes, source.read(_scale(tensor)).view(torch.uint8)


def read_fp8(source: Reader, tensor: SourceTensor) -> tuple[Tensor, Tensor]:
    """-> (codes float8_e4m3fn `[N, K]`, scales as stored `[ceil(N/128), ceil(K/128)]`)."""
    return source.read(tensor.weight), source.read(_scale(tensor))


def read_nvfp4(source: Reader, tensor: SourceTensor) -> NVFP4Tensor:
    """The source's own bytes and its global scale as a factor.

    A matrix of zeros whose global scale is 0 or infinite has the global scale 1 here, and block
    scales that are NaN are 0: the values are the same. Raises FormatError for another NaN or
    negative block scale and for a global scale no writer means.
    """
    return read_nvfp4_rows(source, tensor, 0, tensor.shape[0])


def read_nvfp4_rows(source: Reader, tensor: SourceTensor, start: int, stop: int) -> NVFP4Tensor:
    """Rows `[start, stop)` of what `read_nvfp4` gives."""
    codes = source.read_rows(tensor.weight, start, stop).view(torch.uint8)
    scales = source.read_rows(_scale(tensor), start, stop).view(torch.uint8)
    shape = (stop - start, *tensor.shape[1:])
    g = read_global_scale(source, tensor)
    meaningless = scales >= _E4M3_NAN
    if float(g) == 0.0:
        if bool((codes & _MAGNITUDES).any()):
            raise FormatError(_nothing_times(tensor, codes, scales))
        return NVFP4Tensor(codes, scales.masked_fill_(meaningless, 0), torch.ones(()), shape)
    if bool(meaningless.any()):
        row, block = meaningless.nonzero()[0].tolist()
        raise FormatError(
            f"{tensor.name}: the block scale of row {start + row}, block {block} is byte "
            f"{int(scales[row, block]):#04x}, expected a positive E4M3 number; the source is "
            "damaged"
        )
    return NVFP4Tensor(codes, scales, g, shape)


def read_global_scale(source: Reader, tensor: SourceTensor) -> Tensor:
    """g as float32 `[]`: in [2^-126, 1], or 0, which only a matrix of zeros may have.

    Raises FormatError for any other.
    """
    assert tensor.global_scale is not None
    stored = source.read(tensor.global_scale).reshape(())
    g = stored.reciprocal() if tensor.reciprocal else stored
    if float(g) == 0.0 or _SMALLEST_NORMAL <= float(g) <= 1.0:  # magnitudes of 2688 would have 1
        return g
    value, expected = float(stored), "at least 1" if tensor.reciprocal else "from 2^-126 to 1"
    inverse = 1.0 / value if value else 0.0
    low, high = (1 / _PLAUSIBLE[1], 1 / _PLAUSIBLE[0]) if tensor.reciprocal else _PLAUSIBLE
    if low <= inverse <= high:
        why = (
            f"weight_scale_2 multiplies, weight_global_scale divides, and 1/{value:g} would be a "
            "usual one: it seems to be written the other way round"
        )
    else:
        why = "the source is damaged"
    raise FormatError(
        f"{tensor.name}: {tensor.global_scale.name} is {value:g}, expected a number {expected}; "
        f"{why}"
    )


def _nothing_times(tensor: SourceTensor, codes: Tensor, scales: Tensor) -> str:
    """What is wrong with codes that are not zero under a global scale that makes them so."""
    assert tensor.global_scale is not None
    whole = (
        f"{tensor.name}: {tensor.global_scale.name} makes every value 0 times its block scale, but "
        "its codes are not zero"
    )
    if bool((scales & _E4M3_NAN == _E4M3_NAN).all()) and bool((codes == 0x77).all()):
        return (
            f"{whole}: every block scale is NaN and every code 7, as ModelOpt 0.47 writes a matrix "
            "of zeros (0 divided by 0); write zeros for its codes and block scales, or export it "
            "again without quantising it"
        )
    return f"{whole}; the source is damaged"


def _scale(tensor: SourceTensor) -> TensorEntry:
    assert tensor.scale is not None
    return tensor.scale
