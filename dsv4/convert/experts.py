"""Expert stacks: every routed expert of a layer, carried from MXFP4 into NVFP4.

`w13` stacks gate (w1) and up (w3), their rows interleaved for the fused SwiGLU epilogue; `w2`
is cut into K-slabs. An expert's projections keep their own global scales, so the cast is exact
whenever each projection's exponents span at most 17 octaves (facts: MXFP4 -> NVFP4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv4.convert.dense import nvfp4_arrays
from dsv4.convert.outputs import Emit, FileIndex, Output, Result, Unit
from dsv4.convert.partition import expert_shards, interleave_of, nvfp4_row_units, nvfp4_slabs
from dsv4.convert.source import Source
from dsv4.formats.layouts import pack_nvfp4
from dsv4.formats.mxfp4 import CastReport, cast_mxfp4_to_nvfp4
from dsv4.formats.nvfp4 import NVFP4Tensor
from dsv4.formats.source_tensor import SourceTensor
from dsv4.formats.store.contents import EXPERT, LINEAGE_COLUMNS
from dsv4.formats.store.schema import NVFP4_LAYOUT, ArraySpec, path_of


@dataclasses.dataclass(frozen=True)
class ExpertsOutput(Output):
    """One stack of a layer. `experts[e]` holds its projections: (w1, w3) or (w2,)."""

    prefix: str  # "layers.2.ffn.experts"
    stack: str  # "w13" or "w2"
    experts: tuple[tuple[SourceTensor, ...], ...]
    files: tuple[str, ...]  # source files, in the manifest's order

    @property
    def path(self) -> str:
        return f"{path_of(self.prefix)}/{self.stack}"

    @property
    def projections(self) -> int:
        return len(self.experts[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Logical [N, K] of one projection."""
        rows, cols = self.experts[0][0].shape
        return rows, cols

    @property
    def interleave(self) -> int:
        return interleave_of(self.shape[0]) if self.projections == 2 else 0

    @property
    def slabs(self) -> int:
        return nvfp4_slabs(*self.shape) if self.stack == "w2" else 1

    @property
    def shards(self) -> int:
        rows, cols = self.shape
        return expert_shards(len(self.experts), self.projections * rows * cols // 2)

    def arrays(self) -> tuple[ArraySpec, ...]:
        rows, cols = self.shape[0] * self.projections, self.shape[1]
        count, shards = len(self.experts), self.shards
        units = 1 if self.stack == "w2" else nvfp4_row_units(rows, cols)
        codes, scales = nvfp4_arrays(self.path, (count,), rows, cols, units, self.slabs, shards)
        globals_ = (count, self.projections)
        lineage = (*globals_, LINEAGE_COLUMNS)
        return (
            codes,
            scales,
            _whole(f"{self.path}/global_scale", globals_, "float32", shards),
            _whole(f"{self.path}/lineage", lineage, "int64", shards),
        )

    def units(self) -> tuple[Unit, ...]:
        per_shard = len(self.experts) // self.shards
        by_shard = zip(*(array.files() for array in self.arrays()), strict=True)
        return tuple(
            Unit(
                f"{self.path}#{shard}",
                self,
                tuple(
                    tensor
                    for expert in self.experts[shard * per_shard : (shard + 1) * per_shard]
                    for tensor in expert
                ),
                files,
                shard,
            )
            for shard, files in enumerate(by_shard)
        )

    def produce(self, unit: Unit, source: Source, emit: Emit) -> Result:
        per_shard = len(self.experts) // self.shards
        experts = self.experts[unit.shard * per_shard : (unit.shard + 1) * per_shard]
        scales: list[Tensor] = []
        global_scales: list[Tensor] = []
        lineage: list[list[int]] = []
        reports: list[CastReport] = []

        def codes() -> Iterator[Tensor]:
            for expert in experts:
                parts: list[NVFP4Tensor] = []
                for tensor in expert:
                    part, report = cast_mxfp4_to_nvfp4(
                        *_read_mxfp4(source, tensor), name=tensor.name
                    )
                    parts.append(part)
                    reports.append(report)
                    lineage.append(self._lineage(tensor, report))
                packed = pack_nvfp4(parts, slabs=self.slabs, interleave=self.interleave)
                scales.append(packed.scales)
                global_scales.append(packed.global_scales)
                yield packed.codes

        codes_file, scales_file, globals_file, lineage_file = unit.files
        emit(codes_file, codes())
        emit(scales_file, scales)
        emit(globals_file, global_scales)
        emit(lineage_file, [torch.tensor(lineage, dtype=torch.int64)])
        return {
            "blocks": sum(report.blocks for report in reports),
            "recoded_blocks": sum(report.recoded_blocks for report in reports),
            "rounded_blocks": sum(report.rounded_blocks for report in reports),
            "rel_mse": max(report.rel_mse for report in reports),
        }

    def _lineage(self, tensor: SourceTensor, report: CastReport) -> list[int]:
        weight, scale = tensor.weight, tensor.scale
        assert scale is not None
        return [
            self.files.index(weight.file),
            weight.begin,
            weight.end,
            self.files.index(scale.file),
            scale.begin,
            scale.end,
            report.recoded_blocks,
            report.rounded_blocks,
        ]

    def attributes(self, results: Sequence[Result], files: FileIndex) -> dict[str, Any]:
        totals = {
            key: sum(result[key] for result in results)
            for key in ("blocks", "recoded_blocks", "rounded_blocks")
        }
        return {
            "format": "nvfp4",
            "layout": NVFP4_LAYOUT,
            "parameters": {"slabs": self.slabs, "interleave": self.interleave},
            "shape": list(self.shape),
            "names": [
                f"{self.prefix}.{EXPERT}.{tensor.name.split('.')[-2]}.weight"
                for tensor in self.experts[0]
            ],
            "exact": totals["rounded_blocks"] == 0,
            "rel_mse": max(result["rel_mse"] for result in results),
            **totals,
        }

    def peak_bytes(self) -> int:
        rows, cols = self.shape
        per_expert = self.projections * rows * cols
        shard_scales = per_expert // NVFP4_SCALE_SHARE * (len(self.experts) // self.shards)
        return 4 * per_expert + shard_scales

    @property
    def rounded(self) -> bool:
        return False


NVFP4_SCALE_SHARE = 16


def _whole(path: str, shape: tuple[int, ...], element: str, shards: int) -> ArraySpec:
    """A small array that follows the stack's files along dimension 0, uncut otherwise."""
    per_shard = (shape[0] // shards, *shape[1:])
    return ArraySpec(path, shape, element, per_shard, per_shard)


def _read_mxfp4(source: Source, tensor: SourceTensor) -> tuple[Tensor, Tensor]:
    """-> (codes uint8 [N, K/2], E8M0 bytes uint8 [N, K/32]), bit views, never value casts."""
    assert tensor.scale is not None
    codes = source.read(tensor.weight).view(torch.uint8)
    return codes, source.read(tensor.scale).view(torch.uint8)
