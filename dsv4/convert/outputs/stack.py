"""Expert stacks: every routed expert of a layer under one leading dimension.

`w13` stacks gate (w1) and up (w3), `w2` the down projections. What a stack holds depends on what
the experts are and on the recipe:

    from MXFP4    NVFP4, exact whenever a projection's exponents span at most 17 octaves
    from NVFP4    NVFP4, the source's bytes with the source's global scales
    from FP8      carried by `native`, else rounded to NVFP4 at the optimum
    from BF16/F32 carried by `native`, else rounded to NVFP4 at the optimum

An expert's projections keep their own global scales. Rows of w1 and w3 are interleaved for the
fused SwiGLU epilogue; in FP8, whose scales cover 128 rows, w1's rows come first, then w3's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv4.convert.outputs.base import (
    FileIndex,
    Losses,
    Output,
    Target,
    Unit,
    is_weight,
)
from dsv4.convert.outputs.decode import read_fp8, read_mxfp4, read_nvfp4
from dsv4.convert.outputs.dense import nvfp4_arrays
from dsv4.convert.outputs.partition import (
    expert_shards,
    fp8_slabs,
    interleave_of,
    nvfp4_row_units,
    nvfp4_slabs,
    row_units,
)
from dsv4.convert.outputs.plain import ELEMENT_OF, fp8_scales_are_zero
from dsv4.convert.outputs.results import Outcome, Result
from dsv4.convert.outputs.rounding import PEAK_BYTES, round_tiles
from dsv4.convert.outputs.verbatim import checked
from dsv4.convert.sources.base import Reader
from dsv4.formats.errors import SourceError
from dsv4.formats.model.recipes import cut_by_columns
from dsv4.formats.model.source_tensor import Encoding, SourceTensor
from dsv4.formats.numeric.layouts import interleave_rows, pack_fp8, pack_nvfp4
from dsv4.formats.numeric.loss import Loss
from dsv4.formats.numeric.mxfp4 import CastReport, cast_mxfp4_to_nvfp4
from dsv4.formats.numeric.nvfp4 import NVFP4Tensor, dequantize_nvfp4
from dsv4.formats.numeric.operands import FP8_BLOCK, NVFP4_BLOCK
from dsv4.formats.numeric.zeros import is_zero, nvfp4_is_zero
from dsv4.formats.store.extents import Sink
from dsv4.formats.store.nodes import EXPERT, LINEAGE_COLUMNS
from dsv4.formats.store.specs import ALIGNMENT, ELEMENTS, LAYOUT_OF, ArraySpec, path_of

_ABSENT = (-1, -1, -1)  # lineage of a scale that the source does not have


@dataclasses.dataclass(frozen=True)
class ExpertsOutput(Output):
    """One stack of a layer. `experts[e]` holds its projections: (w1, w3) or (w2,).

    carried: FP8 and unquantised experts stay what they are; otherwise everything becomes NVFP4.
    Raises SourceError when experts to be carried cannot share one stack.
    """

    prefix: str  # "layers.2.ffn.experts"
    stack: str  # "w13" or "w2"
    experts: tuple[tuple[SourceTensor, ...], ...]
    files: tuple[str, ...]  # source files, in the manifest's order
    carried: bool = False

    def __post_init__(self) -> None:
        if self.carried and (self.rounded or self.format is not Encoding.NVFP4):
            self._check_uniform()

    @property
    def path(self) -> str:
        return f"{path_of(self.prefix)}/{self.stack}"

    @property
    def projections(self) -> int:
        return len(self.experts[0])

    @property
    def format(self) -> Encoding:
        """What the stack is stored as."""
        encoding = self.experts[0][0].encoding
        kept = self.carried and encoding is not Encoding.MXFP4
        return encoding if kept else Encoding.NVFP4

    @property
    def shape(self) -> tuple[int, int]:
        """Logical [N, K] of one projection."""
        rows, cols = self.experts[0][0].shape
        return rows, cols

    @property
    def interleave(self) -> int:
        if self.projections == 1 or self.format is Encoding.FP8:
            return 0
        return interleave_of(self.shape[0])

    @property
    def slabs(self) -> int:
        cut = {Encoding.NVFP4: nvfp4_slabs, Encoding.FP8: fp8_slabs}.get(self.format)
        return cut(*self.shape) if cut and self._by_columns else 1

    @property
    def shards(self) -> int:
        count = len(self.experts)
        rows, cols = self.shape
        per_element = {Encoding.NVFP4: 0.5, Encoding.FP8: 1}.get(self.format, 2)
        return expert_shards(count, int(self.projections * rows * cols * per_element))

    @property
    def rounded(self) -> bool:
        return any(self.rounds(tensor) for expert in self.experts for tensor in expert)

    def rounds(self, tensor: SourceTensor) -> bool:
        """Whether the plan rounds `tensor`; of a stack that mixes encodings, not all are."""
        wide = tensor.encoding in (Encoding.FP8, Encoding.PLAIN)
        return wide and self.format is Encoding.NVFP4

    @property
    def _by_columns(self) -> bool:
        return cut_by_columns(self.experts[0][0].name)

    def arrays(self) -> tuple[ArraySpec, ...]:
        count, shards = len(self.experts), self.shards
        per_projection = (count, self.projections)
        lineage = ArraySpec.whole(
            f"{self.path}/lineage", (*per_projection, LINEAGE_COLUMNS), "int64"
        )
        rows, cols = self.shape[0] * self.projections, self.shape[1]
        if self.format is Encoding.NVFP4:
            units = 1 if self._by_columns else nvfp4_row_units(rows, cols)
            codes, scales = nvfp4_arrays(self.path, (count,), rows, cols, units, self.slabs, shards)
            globals_ = ArraySpec.whole(f"{self.path}/global_scale", per_projection, "float32")
            return codes, scales, globals_, lineage
        first = self.experts[0][0]
        element = ELEMENT_OF[first.weight.dtype]
        multiple = FP8_BLOCK if self.format is Encoding.FP8 else 2 * self.interleave
        row_bytes = cols * ELEMENTS[element].nbytes
        units = 1 if self._by_columns else row_units(rows, row_bytes, multiple)
        cut = units > 1 or self.slabs > 1 or shards > 1 or rows * row_bytes % ALIGNMENT == 0
        weights = ArraySpec(
            f"{self.path}/{'codes' if first.scale else 'weight'}",
            (count, rows, cols),
            element,
            (1 if cut else count, rows // units, cols // self.slabs),
            (count // shards, rows, cols),
        )
        if first.scale is None:
            return weights, lineage
        tiles = (count, -(-rows // FP8_BLOCK), -(-cols // FP8_BLOCK))
        scale_element = ELEMENT_OF[first.scale.dtype]
        return weights, _whole(f"{self.path}/scales", tiles, scale_element, shards), lineage

    def _late_arrays(self) -> int:
        """How many of the last arrays are small and written whole, once every shard is done."""
        return 2 if self.format is Encoding.NVFP4 else 1

    def units(self) -> tuple[Unit, ...]:
        """One unit an expert: its place in every file is a contiguous range."""
        sharded = [array.files() for array in self.arrays()[: -self._late_arrays()]]
        per_shard = len(self.experts) // self.shards
        units = []
        for index, expert in enumerate(self.experts):
            shard, place = divmod(index, per_shard)
            files = [files[shard] for files in sharded]
            sizes = [file.payload_nbytes // per_shard for file in files]
            targets = (
                Target(file, place * size, (place + 1) * size)
                for file, size in zip(files, sizes, strict=True)
            )
            units.append(Unit(f"{self.path}#{index}", self, expert, tuple(targets), index))
        return tuple(units)

    def produce(self, unit: Unit, source: Reader, sink: Sink) -> Result:
        parts, outcomes = self._pack(source, self.experts[unit.index])
        for target, part in zip(unit.targets, parts, strict=True):
            sink.write_at(target.file, target.begin, [part])
        return Result(tuple(outcomes))

    def complete(self, results: Sequence[Result], sink: Sink) -> None:
        """Lineage and global scales are small: one file each, not one per shard."""
        *_, before_last, last = self.arrays()
        lineage = [self._lineage(tensor, outcome) for tensor, outcome in self._outcomes(results)]
        sink.write(last.files()[0], [torch.tensor(lineage, dtype=torch.int64)])
        if self.format is Encoding.NVFP4:
            scales = [[outcome.global_scale for outcome in result.outcomes] for result in results]
            sink.write(before_last.files()[0], [torch.tensor(scales, dtype=torch.float32)])

    def attributes(self, results: Sequence[Result], files: FileIndex) -> dict[str, Any]:
        found = self._outcomes(results)
        totals = {
            "blocks": sum(outcome.blocks for _, outcome in found),
            "recoded_blocks": sum(outcome.recoded_blocks for _, outcome in found),
            "rounded_blocks": sum(outcome.rounded_blocks for _, outcome in found),
        }
        inexact = {
            tensor.name: {"rounded_blocks": outcome.rounded_blocks, **(outcome.loss or {})}
            for tensor, outcome in found
            if not outcome.exact and not self.rounds(tensor)
        }
        zero = [tensor.name for tensor, o in found if o.zero and is_weight(tensor.name)]
        return {
            "format": str(self.format),
            "layout": LAYOUT_OF[self.format],
            "parameters": {"slabs": self.slabs, "interleave": self.interleave},
            "shape": list(self.shape),
            "names": [
                f"{self.prefix}.{EXPERT}.{tensor.name.split('.')[-2]}.weight"
                for tensor in self.experts[0]
            ],
            "exact": all(outcome.exact for _, outcome in found),
            "rel_mse": max(outcome.rel_mse for _, outcome in found),
            **totals,
            **({"inexact": inexact} if inexact else {}),
            **({"zero": zero} if zero else {}),
        }

    def losses(self, results: Sequence[Result]) -> Losses:
        found = [outcome for _, outcome in self._outcomes(results)]
        if not self.rounded and all(outcome.exact for outcome in found):
            return {}
        worst = max(outcome.rel_mse for outcome in found)
        return {f"{self.prefix}.{EXPERT}.{self.stack}": {"rel_mse": worst}}

    def peak_bytes(self) -> int:
        rows, cols = self.shape
        per_expert = self.projections * rows * cols
        return 2 * per_expert + (PEAK_BYTES if self.rounded else 0)  # as read, and as packed

    def _outcomes(self, results: Sequence[Result]) -> list[tuple[SourceTensor, Outcome]]:
        """Every projection with what became of it, expert by expert."""
        return [
            pair
            for expert, result in zip(self.experts, results, strict=True)
            for pair in zip(expert, result.outcomes, strict=True)
        ]

    def _pack(
        self, source: Reader, expert: tuple[SourceTensor, ...]
    ) -> tuple[tuple[Tensor, ...], list[Outcome]]:
        """One expert's part of the arrays that are cut by expert, and what became of it."""
        if self.format is Encoding.NVFP4:
            made = [_to_nvfp4(source, tensor) for tensor in expert]
            parts = [part for part, _ in made]
            packed = pack_nvfp4(parts, slabs=self.slabs, interleave=self.interleave)
            return (packed.codes, packed.scales), [outcome for _, outcome in made]
        if self.format is Encoding.FP8:
            pairs = [
                tuple(checked(part, tensor.name) for part in read_fp8(source, tensor))
                for tensor in expert
            ]
            zeros = [is_zero(codes) or fp8_scales_are_zero(scales) for codes, scales in pairs]
            codes, scales = (torch.cat(list(column)) for column in zip(*pairs, strict=True))
            packed_codes = pack_fp8(codes, scales, slabs=self.slabs).codes
            return (packed_codes, scales), [Outcome(zero=zero) for zero in zeros]
        values = [checked(source.read(tensor.weight), tensor.name) for tensor in expert]
        outcomes = [Outcome(zero=is_zero(value)) for value in values]
        if self.interleave:
            return (interleave_rows(values[0], values[1], self.interleave),), outcomes
        return (values[0],), outcomes

    def _lineage(self, tensor: SourceTensor, outcome: Outcome) -> list[int]:
        weight, scale = tensor.weight, tensor.scale
        return [
            self.files.index(weight.file),
            weight.begin,
            weight.end,
            *((self.files.index(scale.file), scale.begin, scale.end) if scale else _ABSENT),
            outcome.recoded_blocks,
            outcome.rounded_blocks,
        ]

    def _check_uniform(self) -> None:
        """One stack has one encoding and one dtype, and FP8 has whole scale tiles."""
        first, *others = (tensor for expert in self.experts for tensor in expert)
        for tensor in (first, *others):
            if tensor.encoding is Encoding.FP8 and not tensor.tiled:
                raise SourceError(
                    f"{tensor.weight.file}: {tensor.name} is FP8 with scales of shape "
                    f"{list(tensor.scale.shape if tensor.scale else ())}, expected one for each "
                    f"{FP8_BLOCK}x{FP8_BLOCK} tile to be stacked as it is; convert with recipe "
                    "standard, which rounds it to NVFP4"
                )
        for tensor in others:
            if _kind(tensor) != _kind(first):
                raise SourceError(
                    f"{tensor.weight.file}: {tensor.name} is {_kind(tensor)}, but {first.name} is "
                    f"{_kind(first)}, and one stack cannot carry both as they are; convert with "
                    "recipe standard, which rounds them to NVFP4"
                )
        if self.format is Encoding.FP8 and self.projections == 2 and self.shape[0] % FP8_BLOCK:
            raise SourceError(
                f"{first.weight.file}: {first.name} is FP8 with {self.shape[0]} rows, expected a "
                f"multiple of {FP8_BLOCK} to be stacked as it is; convert with recipe standard, "
                "which rounds it to NVFP4"
            )


def _kind(tensor: SourceTensor) -> str:
    """Encoding and dtypes, such as `fp8 F8_E4M3 F32`."""
    return " ".join((tensor.encoding, *(entry.dtype for entry in tensor.entries.values())))


def _whole(path: str, shape: tuple[int, ...], element: str, shards: int) -> ArraySpec:
    """A small array that follows the stack's files along dimension 0, uncut otherwise."""
    per_shard = (shape[0] // shards, *shape[1:])
    return ArraySpec(path, shape, element, per_shard, per_shard)


def _to_nvfp4(source: Reader, tensor: SourceTensor) -> tuple[NVFP4Tensor, Outcome]:
    """A projection in NVFP4: taken over, cast, or rounded, as its encoding asks for."""
    if tensor.encoding is Encoding.NVFP4:
        part = read_nvfp4(source, tensor)
        report, zero = CastReport(part.scales.numel(), 0, 0, 0.0), nvfp4_is_zero(part)
    elif tensor.encoding is Encoding.MXFP4:
        part, report = cast_mxfp4_to_nvfp4(*read_mxfp4(source, tensor), name=tensor.name)
        zero = nvfp4_is_zero(part)  # the largest block is always exact
    else:
        part, report, zero = _round(source, tensor)
    scale = float(part.global_scale)
    return part, Outcome.of_cast(report, zero=zero, global_scale=scale)


def _round(source: Reader, tensor: SourceTensor) -> tuple[NVFP4Tensor, CastReport, bool]:
    """Round an FP8 or unquantised projection, a tile of rows at a time; -> also if it was zero."""
    loss, blocks, parts = Loss(), 0, []
    for _, values, part in round_tiles(source, tensor):
        rounded = dequantize_nvfp4(part)
        loss.add(values, rounded)
        # NVFP4 could hold -0, but its quantiser writes +0: such a block is not the source's.
        changed = (values != rounded) | (values.signbit() & (values == 0))
        changed = pad(changed, (0, -changed.shape[1] % NVFP4_BLOCK))
        blocks += int(changed.view(-1, NVFP4_BLOCK).any(1).sum())
        parts.append(part)
    codes = torch.cat([part.codes for part in parts])
    scales = torch.cat([part.scales for part in parts])
    whole = NVFP4Tensor(codes, scales, parts[0].global_scale, tensor.shape)
    report = CastReport(scales.numel(), 0, blocks, loss.rel_mse, loss.max_abs_error)
    return whole, report, loss.amax == 0.0
