"""Quantised matrices whose kernels take BF16: dequantised, rounded once where BF16 is too short.

FP8 and NVFP4 with scales that are powers of two fit BF16 exactly; with others a value may need more
than its eight significant bits. What that cost is measured against the values in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4.convert.outputs.base import FileIndex, Losses, Unit, tile_rows
from dsv4.convert.outputs.decode import read_value_rows
from dsv4.convert.outputs.plain import PlainOutput
from dsv4.convert.outputs.results import Outcome, Result
from dsv4.convert.outputs.verbatim import checked
from dsv4.convert.sources.base import Reader
from dsv4.formats.model.source_tensor import Encoding, SourceTensor
from dsv4.formats.numeric.loss import Loss
from dsv4.formats.numeric.operands import SF_ROWS
from dsv4.formats.store.extents import Sink

TILE_BYTES = 8 << 20  # of float32
PEAK_BYTES = 8 * TILE_BYTES  # a tile, its source bytes, and float64 temporaries of the loss


@dataclasses.dataclass(frozen=True)
class ValuesOutput(PlainOutput):
    """The values of an FP8 or NVFP4 matrix `[N, K]` as one BF16 array, the nearest ones."""

    @property
    def element(self) -> str:
        return "bfloat16"

    def produce(self, unit: Unit, source: Reader, sink: Sink) -> Result:
        loss = Loss()
        sink.write(unit.targets[0].file, self._tiles(source, loss))
        exact = loss.errors == 0.0 and not loss.sign_flips
        figures = None if exact else loss.to_dict()
        return Result((Outcome(exact, zero=loss.amax == 0.0, loss=figures),))

    def _tiles(self, source: Reader, loss: Loss) -> Iterator[Tensor]:
        rows, cols = self.tensor.shape
        step = tile_rows(rows, cols * 4, SF_ROWS, TILE_BYTES)
        for start in range(0, rows, step):
            values = read_value_rows(source, self.tensor, start, min(start + step, rows))
            nearest = checked(values, self.tensor.name, start).to(torch.bfloat16)
            loss.add(values, nearest)
            yield checked(nearest, self.tensor.name, start)

    def attributes(self, results: Sequence[Result], files: FileIndex) -> dict[str, Any]:
        own = super().attributes(results, files)
        return own if own["exact"] else own | {"loss": results[0].outcomes[0].loss}

    def losses(self, results: Sequence[Result]) -> Losses:
        (outcome,) = results[0].outcomes
        return {} if outcome.loss is None else {self.tensor.name: outcome.loss}

    def peak_bytes(self) -> int:
        return PEAK_BYTES

    @property
    def rounded(self) -> bool:
        """False where the headers tell that BF16 holds every value: FP8 with E8M0 scales."""
        return not fits_bf16(self.tensor)

    def rounds(self, tensor: SourceTensor) -> bool:
        """True: where BF16 is too short, the nearest value is what was planned."""
        return True


def fits_bf16(tensor: SourceTensor) -> bool:
    """Whether dtypes alone tell that every value has at most eight significant bits."""
    scale = tensor.scale
    return tensor.encoding is Encoding.FP8 and scale is not None and scale.dtype == "F8_E8M0"
