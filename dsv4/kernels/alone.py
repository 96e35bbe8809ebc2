"""Does a token's result depend on the tokens beside it? Byte for byte it must not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.kernels.case import Buffers, Case
from dsv4.kernels.check import guard_outputs, launcher
from dsv4.kernels.library import Library


def check_alone(
    case: Case, library: Library, device: torch.device, per_row: Sequence[str], seed: int = 0
) -> list[str]:
    """-> a sentence for every token whose outputs differ when it is computed alone.

    per_row: buffers whose first dimension are the tokens; the others stay what they are.
    """
    buffers = case.make(torch.Generator(device).manual_seed(seed))
    together = _run(case, library, dict(buffers))
    faults = []
    for row in range(case.rows):
        own = buffers | {name: buffers[name][row : row + 1].clone() for name in per_row}
        alone = _run(case, library, own)
        for name in per_row:
            if not torch.equal(_bytes(together[name][row]), _bytes(alone[name][0])):
                faults.append(f"{name}: token {row} differs alone and beside the others")
    return faults


def _run(case: Case, library: Library, buffers: Buffers) -> Buffers:
    guard_outputs(case, buffers)
    launcher(case, library, buffers)()
    return buffers


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
