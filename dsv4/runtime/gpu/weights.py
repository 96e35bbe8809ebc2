"""All weights of a model in the memory of one device, by their names: where operands come from."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal, StoreError
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.numeric.operands import SF_ROWS, SF_TILE_BYTES, Matrix, Nvfp4Matrix
from dsv4.formats.store.specs import path_of
from dsv4.runtime.load import LoadedWeights
from dsv4.runtime.load.outline import OutlinedWeights


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

    def stacks(self, prefix: str) -> tuple[Nvfp4Stack, Nvfp4Stack]:
        """w13 and w2 of the experts `prefix`, as "layers.0.ffn.experts"."""
        ...


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A loaded store as `DeviceWeights`: nothing is copied. Or the outline of one."""

    weights: LoadedWeights | OutlinedWeights

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

    def stacks(self, prefix: str) -> tuple[Nvfp4Stack, Nvfp4Stack]:
        """See `DeviceWeights`. Raises RuntimeRefusal when the experts are not NVFP4."""
        path = path_of(prefix, StoreError)
        w13, w2 = (self._stack(f"{path}/{name}") for name in ("w13", "w2"))
        return w13, w2

    def _stack(self, path: str) -> Nvfp4Stack:
        group = self.weights.contents.stacks.get(path)
        if group is None or group.format != "nvfp4":
            found = "absent" if group is None else group.format
            raise RuntimeRefusal(
                f"{path} is {found}, kernels read NVFP4; convert with --recipe standard"
            )
        experts, slabs, rows = group.experts or 0, group.slabs, group.packed_rows
        codes = self.weights.share_of(f"{path}/codes").view(experts, slabs, rows, -1)
        tiles = -(-rows // SF_ROWS)
        scales = self.weights.share_of(f"{path}/scales").view(torch.uint8)
        return Nvfp4Stack(
            codes,
            scales.view(experts, slabs, tiles, -1, SF_TILE_BYTES),
            self.weights.array(f"{path}/global_scale").tensor(),
            rows,
            group.cols,
            group.interleave,
        )
