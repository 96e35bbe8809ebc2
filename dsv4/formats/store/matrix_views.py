"""Arrays as weights: tensors, matrices and expert stacks by hub name, wherever the bytes lie.

A store's files are mapped (`reader.PackedStore`), a loaded model's lie on a device
(`dsv4.runtime.load`). Both give the same operands, without copying.
"""

from __future__ import annotations

import abc
import dataclasses
from pathlib import Path
from typing import Protocol

from torch import Tensor

from dsv4.formats.errors import StoreError
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.numeric.operands import Fp8Matrix, Matrix, Nvfp4Matrix
from dsv4.formats.store.mapped_files import StoredArray
from dsv4.formats.store.nodes import Contents, QuantizedGroup
from dsv4.formats.store.specs import path_of
from dsv4.formats.store.zarr_json import Hierarchy


class Nodes(Protocol):
    """A store's nodes and what they mean: enough for sizes and places, without any bytes."""

    @property
    def root(self) -> Path: ...

    @property
    def hierarchy(self) -> Hierarchy: ...

    @property
    def contents(self) -> Contents: ...

    @property
    def config(self) -> ModelConfig: ...


@dataclasses.dataclass(frozen=True)
class PlannedNodes:
    """The nodes of a store that is not there yet. root: what it is called in messages."""

    root: Path
    hierarchy: Hierarchy
    contents: Contents
    config: ModelConfig


@dataclasses.dataclass(frozen=True)
class ExpertStack:
    """The routed experts of one layer. Every matrix is a zero-copy view of the mapped files."""

    w13_stack: Stack
    w2_stack: Stack

    def __len__(self) -> int:
        """Number of experts."""
        return self.w13_stack.group.experts or 0

    @property
    def interleave(self) -> int:
        """Rows of gate and then of up that alternate in w13; 0: all of gate's come first."""
        return self.w13_stack.group.interleave

    def w13(self, expert: int) -> Matrix:
        """Gate and up projection of `expert`: `[2I, D]`, see `interleave`."""
        return self.w13_stack.matrix(expert)

    def w2(self, expert: int) -> Matrix:
        """Down projection of `expert`: `[D, I]`."""
        return self.w2_stack.matrix(expert)


@dataclasses.dataclass(frozen=True)
class Stack:
    """One expert stack with its arrays; `scales` is None when it is unquantised."""

    group: QuantizedGroup
    weights: StoredArray
    scales: StoredArray | None
    global_scale: Tensor | None

    def matrix(self, expert: int) -> Matrix:
        """The operand of one expert, zero-copy."""
        group, weights = self.group, self.weights.row(expert)
        if self.scales is None:
            return weights.squeeze(0)
        scales = self.scales.row(expert)
        if self.global_scale is None:
            return Fp8Matrix(weights, scales.squeeze(0), group.packed_rows, group.cols)
        return _nvfp4(group, weights, scales, self.global_scale[expert])


class StoredWeights(abc.ABC):
    """What the arrays of a store mean. root: its directory. config: the model's."""

    root: Path
    contents: Contents
    config: ModelConfig

    @abc.abstractmethod
    def array(self, path: str) -> StoredArray:
        """The array at node path `path`. Raises StoreError when there is none."""

    def tensor(self, name: str) -> Tensor:
        """The unquantised tensor of hub name `name`, in its logical shape.

        Raises StoreError when it is not stored or is quantised.
        """
        if name in self.contents.matrices:
            kind = self.contents.matrices[name].format
            raise StoreError(f"{self.root}: tensor {name} is quantised ({kind}); ask for matrix()")
        if name not in self.contents.plain:
            raise StoreError(f"{self.root}: there is no tensor {name!r}")
        return self.array(self.contents.plain[name]).tensor()

    def matrix(self, name: str) -> Matrix:
        """The weight operand of hub name `name`, quantised or not, as kernels read it.

        Two projections stored with interleaved rows give the same matrix for either name.
        Raises StoreError when it is not stored.
        """
        group = self.contents.matrices.get(name)
        if group is None:
            return self.tensor(name)
        codes = self.array(f"{group.path}/codes").slabs()
        scales = self.array(f"{group.path}/scales")
        if group.format == "fp8":
            return Fp8Matrix(codes, scales.tensor(), group.rows, group.cols)
        return _nvfp4(
            group, codes, scales.slabs(), self.array(f"{group.path}/global_scale").tensor()
        )

    def experts(self, prefix: str) -> ExpertStack:
        """The expert stack of hub prefix `prefix`, e.g. `layers.0.ffn.experts`.

        Raises StoreError when there is none.
        """
        path = path_of(prefix, StoreError)
        groups = [self.contents.stacks.get(f"{path}/{name}") for name in ("w13", "w2")]
        w13, w2 = groups
        if w13 is None or w2 is None:
            raise StoreError(f"{self.root}: there is no stack of experts {prefix!r}")
        if w13.experts != w2.experts or (len(w13.names), len(w2.names)) != (2, 1):
            raise StoreError(
                f"{self.root}: experts {prefix!r} have {w13.experts} w13 of {len(w13.names)} "
                f"projections and {w2.experts} w2 of {len(w2.names)}, expected as many, 2 and 1"
            )
        return ExpertStack(self.stack(w13), self.stack(w2))

    def stack(self, group: QuantizedGroup) -> Stack:
        """The expert stack `group` (one of `contents.stacks`), ready to hand out matrices."""
        path, format = group.path, group.format
        return Stack(
            group,
            self.array(f"{path}/{group.weights}"),
            None if format == "plain" else self.array(f"{path}/scales"),
            self.array(f"{path}/global_scale").tensor() if format == "nvfp4" else None,
        )


def _nvfp4(
    group: QuantizedGroup, codes: Tensor, scales: Tensor, global_scale: Tensor
) -> Nvfp4Matrix:
    return Nvfp4Matrix(
        codes=codes,
        scales=scales.view(codes.dtype),
        global_scales=global_scale,
        rows=group.packed_rows,
        cols=group.cols,
        interleave=group.interleave,
    )
