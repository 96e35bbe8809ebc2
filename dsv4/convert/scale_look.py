"""What a plan can say of exactness: the block scales of MXFP4 tensors, looked at where it is cheap.

NVFP4 holds a tensor whose block scales span at most 17 octaves; of a wider one the codes are read
too, and cast as the conversion would. The scales take a byte for 16 of codes (9 GB of Flash), so:

    in a local file    read for at most LOCAL_SECONDS, tensors of all layers alike
    on the hub         read if they take at most REMOTE_BYTES together, else left alone

What was not looked at is said, never guessed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from dsv4.convert.exactness import Inexact
from dsv4.convert.outputs.decode import read_mxfp4
from dsv4.convert.outputs.results import Outcome
from dsv4.convert.plan import Plan
from dsv4.convert.sources.base import Source
from dsv4.formats.model.source_tensor import Encoding, SourceTensor
from dsv4.formats.numeric.codecs import E8M0_NAN
from dsv4.formats.numeric.mxfp4 import MAX_OCTAVES, cast_mxfp4_to_nvfp4

LOCAL_SECONDS = 10.0
REMOTE_BYTES = 16 << 20
THREADS = 4
_STRIDE = 0x9E3779B1  # an order in which a part of the tensors is of all layers alike


@dataclasses.dataclass(frozen=True)
class Look:
    """tensors: how many are MXFP4. looked_at: of how many it is known whether they fit.

    inexact: those that do not, in the plan's order. reason: why not all were looked at.
    """

    tensors: int
    looked_at: int
    inexact: tuple[Inexact, ...]
    reason: str | None

    @property
    def complete(self) -> bool:
        """Whether nothing was left out."""
        return self.looked_at == self.tensors

    def to_dict(self, plan: Plan) -> dict[str, Any]:
        """For `--json`, over what `plan` says without having looked."""
        document = plan.to_dict()
        return {
            "exact_tensors": document["exact_tensors"] - len(self.inexact),
            "rounded_tensors": document["rounded_tensors"] + [one.name for one in self.inexact],
            "inexact_tensors": [dataclasses.asdict(one) for one in self.inexact],
            "block_scales": {
                "tensors": self.tensors,
                "looked_at": self.looked_at,
                "reason": self.reason,
            },
        }


def look_at_scales(plan: Plan, source: Source) -> Look:
    """Look at the block scales of `source` as far as that is cheap.

    Raises FormatError for a NaN scale, naming tensor, row and block; SourceError.
    """
    tensors = [t for unit in plan.units for t in unit.inputs if t.encoding is Encoding.MXFP4]
    remote = [t for t in tensors if any(source.remote_bytes(e.file) for e in t.entries.values())]
    remote_bytes = sum(t.scale.nbytes for t in remote if t.scale)
    reason = None
    if remote_bytes > REMOTE_BYTES:
        away = set(map(id, remote))
        order = [t for t in tensors if id(t) not in away]
        reason = f"{remote_bytes / 1e9:.1f} GB of block scales would have to be downloaded"
    else:
        order = list(tensors)
    found, late = _judge(order, source, time.monotonic() + LOCAL_SECONDS)
    if late:
        reason = f"{LOCAL_SECONDS:.0f} s were over"
    inexact = (found[t.name] for t in tensors if t.name in found)
    known = tuple(one for one in inexact if one is not None)
    return Look(len(tensors), len(found), known, reason)


def _judge(
    tensors: Sequence[SourceTensor], source: Source, deadline: float
) -> tuple[dict[str, Inexact | None], bool]:
    """-> (name -> what is not exact of it, or None; of those judged in time), whether it was late.

    Of remote tensors that are wide, the codes are read as well, within the same time.
    """
    order = sorted(range(len(tensors)), key=lambda index: index * _STRIDE % (1 << 32))

    def wide(index: int) -> bool | None:
        return None if time.monotonic() > deadline else _is_wide(tensors[index], source)

    with ThreadPoolExecutor(THREADS) as pool:
        known = dict(zip(order, pool.map(wide, order), strict=True))
    found: dict[str, Inexact | None] = {}
    late = None in known.values()
    for index, is_wide in known.items():
        tensor = tensors[index]
        if is_wide is None:
            continue
        if is_wide and time.monotonic() > deadline:
            late = True
            continue
        found[tensor.name] = _cast(tensor, source) if is_wide else None
    return found, late


def _is_wide(tensor: SourceTensor, source: Source) -> bool:
    """Whether the block scales alone do not prove that the tensor is carried exactly."""
    assert tensor.scale is not None
    scales = source.read(tensor.scale).view(torch.uint8)
    if not scales.numel():
        return False
    low, high = map(int, scales.aminmax())
    return high - low > MAX_OCTAVES or high == E8M0_NAN


def _cast(tensor: SourceTensor, source: Source) -> Inexact | None:
    """Whether the codes fit after all, as the conversion will find."""
    part, report = cast_mxfp4_to_nvfp4(*read_mxfp4(source, tensor), name=tensor.name)
    scale = float(part.global_scale)
    outcome = Outcome.of_cast(report, zero=False, global_scale=scale)
    return None if outcome.exact else Inexact.of(tensor.name, outcome)
