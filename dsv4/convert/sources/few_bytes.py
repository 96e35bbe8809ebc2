"""What a few bytes of a checkpoint tell before its weights are read: the global scales of NVFP4.

One number a matrix: tens of thousands of small reads, nothing on a disk and far too many requests
on the hub, so only a source whose files are here is asked. On the hub a wrong scale is
found when its matrix is converted, as a wrong block scale always is.
"""

from __future__ import annotations

from collections.abc import Iterable

from dsv4.convert.outputs.decode import read_global_scale, read_nvfp4
from dsv4.convert.sources.base import Source
from dsv4.formats.errors import FormatError
from dsv4.formats.model.source_tensor import Encoding, SourceTensor

SHOWN = 3


def check_global_scales(source: Source, tensors: Iterable[SourceTensor]) -> tuple[str, ...]:
    """-> sentences about NVFP4 matrices that are zero throughout, by their global scale.

    Raises FormatError with the number of global scales no writer means and the first of them, or
    for a global scale of 0 under codes that are not zero.
    """
    zero: list[SourceTensor] = []
    wrong: list[str] = []
    for tensor in tensors:
        if tensor.encoding is not Encoding.NVFP4:
            continue
        try:
            if float(read_global_scale(source, tensor)) == 0.0:
                read_nvfp4(source, tensor)  # the few of them whole: their codes must be zero too
                zero.append(tensor)
        except FormatError as error:
            wrong.append(str(error))
    if wrong:
        more = f" (and {len(wrong) - 1} more such matrices)" if len(wrong) > 1 else ""
        raise FormatError(wrong[0] + more)
    return (_all_zero(zero),) if zero else ()


def _all_zero(tensors: list[SourceTensor]) -> str:
    names = ", ".join(tensor.name for tensor in tensors[:SHOWN])
    more = ", ..." if len(tensors) > SHOWN else ""
    return (
        f"{len(tensors)} NVFP4 matrices are zero throughout ({names}{more}): their global scale "
        "and all their codes say so, as ModelOpt writes a matrix whose largest value is 0; they "
        "are carried as zeros"
    )
