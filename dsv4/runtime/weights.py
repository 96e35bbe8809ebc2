"""What the model reads: named tensors and packed matrices, each checked once, by name.

`Weights` is the only thing the runtime knows of a checkpoint. A packed store satisfies it, and so
does a dictionary of tensors. Names are the hub's: "layers.0.attn.wq_b.weight".
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.numeric.operands import Fp8Matrix, Matrix, Nvfp4Matrix
from dsv4.kernels.reference.linear import matrix_shape
from dsv4.kernels.reference.moe import ExpertStack


class Weights(Protocol):
    """A checkpoint as the runtime sees it. Everything stays packed and may be memory-mapped."""

    @property
    def config(self) -> ModelConfig: ...

    def tensor(self, name: str) -> Tensor:
        """A tensor that is never quantised: norm, embedding, bias, sink, table, hc_*."""
        ...

    def matrix(self, name: str) -> Matrix:
        """A `[out, in]` weight: NVFP4, FP8, or a plain bfloat16 or float32 tensor."""
        ...

    def experts(self, prefix: str) -> ExpertStack:
        """The routed experts of one layer, e.g. of "layers.0.ffn.experts"."""
        ...


@dataclasses.dataclass(frozen=True)
class WeightReader:
    """Reads `Weights` for one device and refuses a tensor of the wrong shape or type by name."""

    weights: Weights
    device: torch.device

    def parameter(self, name: str, *shape: int) -> Tensor:
        """A small parameter as float32, whatever it was stored in."""
        tensor = self.table(name, *shape)
        if not tensor.is_floating_point():
            raise RuntimeRefusal(f"{name}: found {tensor.dtype}, expected a floating-point tensor")
        return tensor.to(torch.float32)

    def table(self, name: str, *shape: int) -> Tensor:
        """A tensor in its stored dtype."""
        tensor = self.weights.tensor(name)
        if tuple(tensor.shape) != shape:
            raise RuntimeRefusal(
                f"{name}: found shape {tuple(tensor.shape)}, expected {shape} by the model config"
            )
        return tensor.to(self.device)

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        """A weight operand, still packed."""
        matrix = self.weights.matrix(name)
        _check_matrix(name, matrix, rows, cols)
        return place(matrix, self.device)

    def experts(self, prefix: str, count: int, hidden: int, inter: int) -> ExpertStack:
        """The layer's expert stack; its matrices stay where they are until an expert is used."""
        stack = self.weights.experts(prefix)
        if len(stack) != count:
            raise RuntimeRefusal(f"{prefix}: found {len(stack)} experts, expected {count}")
        if stack.interleave and inter % stack.interleave:
            raise RuntimeRefusal(
                f"{prefix}: rows interleave by {stack.interleave}, expected a divisor of {inter}"
            )
        _check_matrix(f"{prefix}.w13", stack.w13(0), 2 * inter, hidden)
        _check_matrix(f"{prefix}.w2", stack.w2(0), hidden, inter)
        return PlacedExperts(stack, self.device)


@dataclasses.dataclass(frozen=True)
class PlacedExperts:
    """An expert stack whose matrices are brought to `device` one by one, as they are used."""

    stack: ExpertStack
    device: torch.device

    @property
    def interleave(self) -> int:
        return self.stack.interleave

    def __len__(self) -> int:
        return len(self.stack)

    def w13(self, expert: int) -> Matrix:
        return place(self.stack.w13(expert), self.device)

    def w2(self, expert: int) -> Matrix:
        return place(self.stack.w2(expert), self.device)


def place(matrix: Matrix, device: torch.device) -> Matrix:
    """`matrix` on `device`: itself if it is there already, else a copy."""
    if isinstance(matrix, Tensor):
        return matrix.to(device)
    if matrix.codes.device == device:
        return matrix
    codes, scales = matrix.codes.to(device), matrix.scales.to(device)
    if isinstance(matrix, Fp8Matrix):
        return dataclasses.replace(matrix, codes=codes, scales=scales)
    return dataclasses.replace(
        matrix, codes=codes, scales=scales, global_scales=matrix.global_scales.to(device)
    )


def _check_matrix(name: str, matrix: Matrix, rows: int, cols: int) -> None:
    if isinstance(matrix, Tensor):
        if matrix.dim() != 2 or matrix.dtype not in (torch.bfloat16, torch.float32):
            raise RuntimeRefusal(
                f"{name}: found {matrix.dtype} of rank {matrix.dim()}, "
                "expected a bfloat16 or float32 matrix, or a packed one"
            )
    elif not isinstance(matrix, Nvfp4Matrix | Fp8Matrix):
        raise RuntimeRefusal(f"{name}: found a {type(matrix).__name__}, expected a weight matrix")
    if matrix_shape(matrix) != (rows, cols):
        raise RuntimeRefusal(
            f"{name}: found shape {matrix_shape(matrix)}, "
            f"expected {(rows, cols)} by the model config"
        )
