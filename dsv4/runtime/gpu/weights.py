"""All weights of a model in the memory of one device, by their names: where operands come from."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.numeric.operands import INTERLEAVE, Matrix, Nvfp4Matrix
from dsv4.kernels.ops.experts.record import Record
from dsv4.kernels.ops.experts.reference import record_parts
from dsv4.runtime.gpu.expert_memory import ExpertMemory
from dsv4.runtime.load import LoadedWeights
from dsv4.runtime.load.outline import META, OutlinedWeights
from dsv4.runtime.load.records import record_of


@dataclasses.dataclass(frozen=True)
class Nvfp4Stack:
    """The matrices of all experts, one after another: `Nvfp4Matrix` with a leading dimension.

    codes uint8 `[E, S, N, Ks/2]`, scales uint8 `[E, S, N/128, Ks/64, 512]`, global_scales float32
    `[E, P]`.
    """

    codes: Tensor
    scales: Tensor
    global_scales: Tensor
    rows: int
    cols: int
    interleave: int

    def __len__(self) -> int:
        return self.codes.shape[0]

    def matrix(self, expert: int) -> Nvfp4Matrix:
        """One expert's."""
        parts = self.codes[expert], self.scales[expert], self.global_scales[expert]
        return Nvfp4Matrix(*parts, self.rows, self.cols, self.interleave)


@dataclasses.dataclass(frozen=True, eq=False)
class LayerRecords:
    """The experts of a layer. places, prompt_places: int32 `[E]`, of their records in a step and in
    a prompt; records: uint8 `[R, nbytes]`, of this layer and any others; global_scale13 `[E, 2]`,
    global_scale2 `[E, 1]`: float32.
    """

    places: Tensor
    prompt_places: Tensor
    records: Tensor
    global_scale13: Tensor
    global_scale2: Tensor

    def stacks(self, record: Record) -> tuple[Nvfp4Stack, Nvfp4Stack]:
        """w13 and w2 of all records, which are views; numbered as the records are."""
        (up, up_scales), (down, down_scales) = (
            record_parts(record, self.records, name) for name in ("13", "2")
        )
        rows, cols = 2 * record.inter, record.hidden
        return (
            Nvfp4Stack(up, up_scales, self.global_scale13, rows, cols, INTERLEAVE),
            Nvfp4Stack(down, down_scales, self.global_scale2, cols, record.inter, 0),
        )


class DeviceWeights(Protocol):
    """All weights of a model in the memory of one device, packed."""

    @property
    def config(self) -> ModelConfig: ...

    def tensor(self, name: str) -> Tensor:
        """A tensor that is never quantised."""
        ...

    def matrix(self, name: str) -> Matrix:
        """A `[out, in]` weight."""
        ...

    def layer_records(self, layer: int) -> LayerRecords:
        """The experts of a layer."""
        ...

    @property
    def memory(self) -> ExpertMemory | None:
        """Where all experts lie; None where all are on the device and nobody counts."""
        ...


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A loaded store as `DeviceWeights`: nothing is copied. Or the outline of one, without memory:
    its records have no bytes.
    """

    weights: LoadedWeights | OutlinedWeights
    memory: ExpertMemory | None = None

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.weights.config

    def tensor(self, name: str) -> Tensor:
        """See `DeviceWeights`."""
        return self.weights.tensor(name)

    def matrix(self, name: str) -> Matrix:
        """See `DeviceWeights`."""
        return self.weights.matrix(name)

    def layer_records(self, layer: int) -> LayerRecords:
        """See `DeviceWeights`. Raises RuntimeRefusal for experts that no kernel reads."""
        own, c = self.memory, self.config
        at = c.block_name(layer).replace(".", "/")
        scales = (
            self.weights.array(f"{at}/ffn/experts/{name}/global_scale").tensor()
            for name in ("w13", "w2")
        )
        if own is not None:
            return LayerRecords(own.table[layer], own.prompt_table[layer], own.records, *scales)
        places = torch.empty(c.n_routed_experts, dtype=torch.int32, device=META)
        sizes = c.num_hidden_layers * c.n_routed_experts, record_of(self.weights).nbytes
        records = torch.empty(sizes, dtype=torch.uint8, device=META)
        return LayerRecords(places, places, records, *scales)
