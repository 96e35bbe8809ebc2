"""Rounding a matrix to NVFP4 a tile of rows at a time, so that memory does not grow with it.

The global scale needs the largest magnitude of the whole matrix, so every tile is read twice.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from dsv4.convert.outputs.base import tile_rows
from dsv4.convert.outputs.decode import read_value_rows
from dsv4.convert.sources.base import Reader
from dsv4.formats.model.source_tensor import SourceTensor
from dsv4.formats.numeric.nvfp4 import (
    NVFP4Tensor,
    global_scale_for,
    largest_magnitude,
    quantize_nvfp4,
)
from dsv4.formats.numeric.operands import SF_ROWS

TILE_BYTES = 8 << 20  # of float32
PEAK_BYTES = 10 * TILE_BYTES  # what rounding a tile takes, temporaries included


def round_tiles(source: Reader, tensor: SourceTensor) -> Iterator[tuple[int, Tensor, NVFP4Tensor]]:
    """-> (first row, values float32, rounded) of every tile; tiles begin at scale tiles.

    Raises FormatError for a value that is not finite, naming the tensor and the value's place.
    """
    rows, cols = tensor.shape
    step = tile_rows(rows, cols * 4, SF_ROWS, TILE_BYTES)
    spans = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    amax = max(
        largest_magnitude(read_value_rows(source, tensor, *span), tensor.name, span[0])
        for span in spans
    )
    global_scale = global_scale_for(amax)
    for span in spans:
        values = read_value_rows(source, tensor, *span)
        yield span[0], values, quantize_nvfp4(values, global_scale=global_scale, name=tensor.name)
