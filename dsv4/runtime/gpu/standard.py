"""Weights as recipe `standard` stores them, without their bytes: tensors on the device "meta".

From them come the kernels that have to be built, and those that are looked for before a store is
loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import DraftKind, Kind, parameters
from dsv4.formats.model.recipes import cut_by_columns, make_recipe
from dsv4.formats.numeric.operands import SLABS, Fp8Matrix, Matrix, Nvfp4Matrix
from dsv4.kernels.ops.experts.contract import Shape
from dsv4.kernels.ops.gemv.contract import Weight
from dsv4.runtime.gpu.operands import Model, read_model
from dsv4.runtime.gpu.weights import LayerRecords

META = torch.device("meta")
STANDARD = make_recipe("standard")


def standard_model(config: ModelConfig) -> Model:
    """The operands of a model of recipe `standard`: shapes and formats. With DSpark's draft layers
    where the configuration has them.
    """
    return read_model(StandardWeights(config), drafts=config.dspark_block_size is not None)


class StandardWeights:
    """See `DeviceWeights`."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        draft = DraftKind.NONE if config.dspark_block_size is None else DraftKind.DSPARK
        stages = config.num_draft_layers if draft is not DraftKind.NONE else 0
        self._parameters = {one.name: one for one in parameters(config, draft, stages)}

    def tensor(self, name: str) -> Tensor:
        """Tables are int64, what is plain bfloat16."""
        one = self._parameters[name]
        plain = torch.float32 if one.kind is Kind.FLOAT32 else torch.bfloat16
        dtype = torch.int64 if one.kind is Kind.TABLE else plain
        return torch.empty(one.shape, dtype=dtype, device=META)

    def matrix(self, name: str) -> Matrix:
        """The head and the gates are NVFP4, compressors and the like plain, all others FP8."""
        one = self._parameters[name]
        rows, cols = one.shape
        if STANDARD.rounds(name):
            codes, scales, factors = _tensors(Weight("nvfp4", rows, cols))
            return Nvfp4Matrix(codes, scales, factors, rows, cols)
        if one.kind is not Kind.LINEAR:
            return self.tensor(name)
        slabs = SLABS if cut_by_columns(name) else 1
        codes, scales = _tensors(Weight("fp8", rows, cols, slabs))
        fp8 = codes.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu)
        return Fp8Matrix(*fp8, rows, cols)

    @property
    def memory(self) -> None:
        """All experts are on the device."""
        return None

    def layer_records(self, layer: int) -> LayerRecords:
        """As many records as the layer has experts."""
        shape = Shape.of(self.config)
        sizes = {"records": shape.experts}
        arguments = (*shape.placed(), shape.global_scale("13"), shape.global_scale("2"))
        made = {
            one.name: torch.empty(
                [n if isinstance(n, int) else sizes[n] for n in one.shape],
                dtype=_dtype(one.dtype),
                device=META,
            )
            for one in arguments
        }
        return LayerRecords(prompt_places=torch.empty_like(made["places"]), **made)


def _tensors(weight: Weight) -> tuple[Tensor, ...]:
    """The tensors of a packed weight."""
    return tuple(
        torch.empty([int(n) for n in one.shape], dtype=_dtype(one.dtype), device=META)
        for one in weight.operands()
    )


def _dtype(found: object) -> torch.dtype:
    assert isinstance(found, torch.dtype)
    return found
