"""Weights held in memory, plain or packed: what the runtime's tests load."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.numeric.layouts import interleave_rows, pack_fp8, pack_nvfp4
from dsv4.formats.numeric.nvfp4 import dequantize_nvfp4, quantize_nvfp4
from dsv4.formats.numeric.operands import Matrix

# A packing: the parts that share a matrix (one, or gate and up) -> operand, and what it holds.
Packing = Callable[[tuple[Tensor, ...], int], tuple[Matrix, tuple[Tensor, ...]]]


def plain(parts: tuple[Tensor, ...], interleave: int) -> tuple[Matrix, tuple[Tensor, ...]]:
    """Float32 as it is."""
    matrix = interleave_rows(parts[0], parts[1], interleave) if interleave else parts[0]
    return matrix, parts


def nvfp4(parts: tuple[Tensor, ...], interleave: int) -> tuple[Matrix, tuple[Tensor, ...]]:
    """NVFP4, in as many K-slabs as divide the columns into whole scale tiles."""
    cols = parts[0].shape[1]
    quantised = [quantize_nvfp4(part) for part in parts]
    matrix = pack_nvfp4(quantised, slabs=2 if cols % 128 == 0 else 1, interleave=interleave)
    return matrix, tuple(dequantize_nvfp4(q) for q in quantised)


def fp8(parts: tuple[Tensor, ...], interleave: int) -> tuple[Matrix, tuple[Tensor, ...]]:
    """FP8 with one power-of-two scale per 128x128 tile."""
    (part,) = parts
    rows, cols = part.shape
    grid = (-(-rows // 128), -(-cols // 128))
    scales = torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            tile = part[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            scales[i, j] = torch.exp2(torch.ceil(torch.log2(tile.abs().max() / 448)))
    per_element = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :cols]
    codes = (part / per_element).to(torch.float8_e4m3fn)
    matrix = pack_fp8(codes, scales.to(torch.float8_e8m0fnu), slabs=2 if cols % 2 == 0 else 1)
    return matrix, (codes.to(torch.float32) * per_element,)


@dataclasses.dataclass(frozen=True)
class InMemoryExperts:
    """One layer's experts, packed one by one."""

    w13s: list[Matrix]
    w2s: list[Matrix]
    interleave: int

    def __len__(self) -> int:
        return len(self.w2s)

    def w13(self, expert: int) -> Matrix:
        return self.w13s[expert]

    def w2(self, expert: int) -> Matrix:
        return self.w2s[expert]


class InMemoryWeights:
    """Hub-named tensors as `Weights`.

    expert_packing, dense_packing: how expert and other quantisable matrices are held.
    `held` are the values that remain after packing, under the hub names: what to give an oracle.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        *,
        expert_packing: Packing = plain,
        dense_packing: Packing = plain,
        interleave: int = 4,
    ) -> None:
        self.config = config
        self.held = dict(tensors)
        self._matrices: dict[str, Matrix] = {}
        self._experts: dict[str, InMemoryExperts] = {}
        for name in tensors:
            if _quantisable(name):
                self._matrices[name] = self._pack(dense_packing, [name], 0)
        for layer in range(config.num_hidden_layers + config.num_draft_layers):
            prefix = f"{config.block_name(layer)}.ffn.experts"
            if f"{prefix}.0.w1.weight" not in tensors:
                continue  # draft layers that are not given
            names = [f"{prefix}.{e}" for e in range(config.n_routed_experts)]
            self._experts[prefix] = InMemoryExperts(
                [
                    self._pack(expert_packing, [f"{n}.w1.weight", f"{n}.w3.weight"], interleave)
                    for n in names
                ],
                [self._pack(expert_packing, [f"{n}.w2.weight"], 0) for n in names],
                interleave,
            )

    def _pack(self, packing: Packing, names: list[str], interleave: int) -> Matrix:
        matrix, held = packing(tuple(self.held[name] for name in names), interleave)
        self.held.update(zip(names, held, strict=True))
        return matrix

    def tensor(self, name: str) -> Tensor:
        return self.held[name]

    def matrix(self, name: str) -> Matrix:
        return self._matrices.get(name, self.held[name])

    def experts(self, prefix: str) -> InMemoryExperts:
        return self._experts[prefix]


def _quantisable(name: str) -> bool:
    """What the real checkpoint or a recipe quantises, besides the routed experts."""
    leaf = name.removesuffix(".weight").rpartition(".")[2]
    attention = leaf in ("wq_a", "wq_b", "wo_a", "wo_b") or name.endswith(".attn.wkv.weight")
    return attention or ".shared_experts." in name or name == "head.weight"
