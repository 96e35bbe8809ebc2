"""A checkpoint's tensors, dequantised into memory: what a packed store is compared with.

Nothing of the packed store's path is used: values come straight from the checkpoint's own encoding
and stay float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers import amax_rounding
from dsv4.convert.outputs.decode import read_values
from dsv4.convert.sources.open import open_source
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.recipes import Recipe
from dsv4.formats.model.source_inventory import check_inventory
from dsv4.formats.model.source_tensor import Encoding

_FOUR_BITS = (Encoding.MXFP4, Encoding.NVFP4)


@dataclasses.dataclass(frozen=True)
class PlainExperts:
    """The routed experts of one layer as float32, gate above up."""

    w13s: tuple[Tensor, ...]
    w2s: tuple[Tensor, ...]
    interleave: int = 0

    def __len__(self) -> int:
        return len(self.w2s)

    def w13(self, expert: int) -> Tensor:
        """`[2·I, D]` of one expert."""
        return self.w13s[expert]

    def w2(self, expert: int) -> Tensor:
        """`[D, I]` of one expert."""
        return self.w2s[expert]


@dataclasses.dataclass(frozen=True)
class SourceWeights:
    """The runtime's `Weights`, from values by hub name."""

    config: ModelConfig
    values: Mapping[str, Tensor]

    @classmethod
    def read(cls, directory: str | Path) -> SourceWeights:
        """Every tensor of the checkpoint `directory`, as it means it."""
        return cls._read(directory, None)

    @classmethod
    def read_amax_rounded(cls, directory: str | Path, recipe: Recipe) -> SourceWeights:
        """The same, what `recipe` rounds to NVFP4 rounded by the plain amax rule instead."""
        return cls._read(directory, recipe)

    @classmethod
    def _read(cls, directory: str | Path, recipe: Recipe | None) -> SourceWeights:
        source = open_source(directory)
        config = ModelConfig.from_hf(source.config)
        values = {}
        for name, tensor in check_inventory(source.entries, config).by_name.items():
            if tensor.encoding is Encoding.PLAIN:
                values[name] = source.read(tensor.weight)
            else:
                values[name] = read_values(source, tensor)
            if recipe and recipe.rounds(name) and tensor.encoding not in _FOUR_BITS:
                values[name] = amax_rounding(values[name])
        return cls(config, values)

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        return self.values[name]

    def matrix(self, name: str) -> Tensor:
        """A weight as float32 `[out, in]`."""
        return self.values[name].to(torch.float32)

    def experts(self, prefix: str) -> PlainExperts:
        """The routed experts of one layer."""

        def each(projection: str) -> list[Tensor]:
            count = self.config.n_routed_experts
            return [self.matrix(f"{prefix}.{n}.{projection}.weight") for n in range(count)]

        pairs = zip(each("w1"), each("w3"), strict=True)
        return PlainExperts(tuple(torch.cat(pair) for pair in pairs), tuple(each("w2")))
