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

from dsv4.convert.source import Reader
from dsv4.formats.codecs import dequantize_fp8, dequantize_mxfp4
from dsv4.formats.errors import FormatError
from dsv4.formats.matrices import FP8_BLOCK
from dsv4.formats.nvfp4 import NVFP4Tensor, dequantize_nvfp4
from dsv4.formats.safetensors_header import TensorEntry
from dsv4.formats.source_tensor import Encoding, SourceTensor

_E4M3_NAN = 0x7F
_SMALLEST_NORMAL = 2.0**-126


def read_values(source: Reader, tensor: SourceTensor) -> Tensor:
    """The values of a tensor of any encoding as float32, in its logical shape."""
    match tensor.encoding:
        case Encoding.MXFP4:
            return dequantize_mxfp4(*read_mxfp4(source, tensor))
        case Encoding.NVFP4:
            return dequantize_nvfp4(read_nvfp4(source, tensor))
        case Encoding.FP8:
            return dequantize_fp8(*read_fp8(source, tensor))
        case Encoding.PLAIN:
            return source.read(tensor.weight).to(torch.float32)


def read_value_rows(source: Reader, tensor: SourceTensor, start: int, stop: int) -> Tensor:
    """Rows `[start, stop)` of an unquantised or FP8 matrix as float32 `[stop - start, K]`.

    `start` is a multiple of 128, the rows of an FP8 scale.
    """
    rows = source.read_rows(tensor.weight, start, stop)
    if tensor.encoding is not Encoding.FP8:
        return rows.to(torch.float32)
    scales = source.read_rows(_scale(tensor), start // FP8_BLOCK, -(-stop // FP8_BLOCK))
    return dequantize_fp8(rows, scales)


def read_mxfp4(source: Reader, tensor: SourceTensor) -> tuple[Tensor, Tensor]:
    """-> (codes uint8 `[N, K/2]`, E8M0 bytes uint8 `[N, K/32]`), bit views, never value casts."""
    codes = source.read(tensor.weight).view(torch.uint8)
    return codes, source.read(_scale(tensor)).view(torch.uint8)


def read_fp8(source: Reader, tensor: SourceTensor) -> tuple[Tensor, Tensor]:
    """-> (codes float8_e4m3fn `[N, K]`, scales as stored `[ceil(N/128), ceil(K/128)]`)."""
    return source.read(tensor.weight), source.read(_scale(tensor))


def read_nvfp4(source: Reader, tensor: SourceTensor) -> NVFP4Tensor:
    """The source's own bytes and its global scale as a factor.

    Raises FormatError for a NaN or negative block scale and for a global scale no writer means.
    """
    assert tensor.global_scale is not None
    codes = source.read(tensor.weight).view(torch.uint8)
    scales = source.read(_scale(tensor)).view(torch.uint8)
    if scales.numel() and int(scales.max()) >= _E4M3_NAN:
        row, block = (scales >= _E4M3_NAN).nonzero()[0].tolist()
        raise FormatError(
            f"{tensor.name}: the block scale of row {row}, block {block} is byte "
            f"{int(scales[row, block]):#04x}, expected a positive E4M3 number; the source is "
            "damaged"
        )
    return NVFP4Tensor(codes, scales, _global_scale(source, tensor), tensor.shape)


def _global_scale(source: Reader, tensor: SourceTensor) -> Tensor:
    """g as float32 `[]`. Raises FormatError when it is not in [2^-126, 1]."""
    assert tensor.global_scale is not None
    stored = source.read(tensor.global_scale).reshape(())
    g = stored.reciprocal() if tensor.reciprocal else stored
    if not _SMALLEST_NORMAL <= float(g) <= 1.0:  # weights of magnitude 2688 would have 1
        bounds = "at least 1" if tensor.reciprocal else "in (0, 1]"
        raise FormatError(
            f"{tensor.name}: {tensor.global_scale.name} is {float(stored):g}, expected a number "
            f"{bounds}: weight_scale_2 multiplies, weight_global_scale divides, and this one seems "
            "to be written the other way round"
        )
    return g


def _scale(tensor: SourceTensor) -> TensorEntry:
    assert tensor.scale is not None
    return tensor.scale
