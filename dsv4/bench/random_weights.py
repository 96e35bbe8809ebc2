"""Weights of a real model's shapes and formats without a checkpoint: made on the device, by name.

What recipe `standard` stores, in its layouts, with magnitudes that keep activations near 1: so a
step has real bytes to read and logits that mean something to compare. Every name has its own seed.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import DraftKind, Kind, parameters
from dsv4.formats.model.recipes import cut_by_columns, make_recipe
from dsv4.formats.numeric.operands import (
    FP8_BLOCK,
    NVFP4_K_ALIGN,
    SF_ROWS,
    SF_TILE_BYTES,
    SLABS,
    Fp8Matrix,
    Matrix,
    Nvfp4Matrix,
)
from dsv4.kernels.ops.experts.record import Record
from dsv4.kernels.ops.experts.reference import record_parts
from dsv4.runtime.gpu.weights import LayerRecords, Nvfp4Stack

CODE_RMS = 8.5625**0.5  # of uniform E2M1 codes
E4M3_ONE, E4M3_TWO = 0x38, 0x40  # codes of 1 and 2
SCALE_RMS = 1.52  # of uniform E4M3 codes from 1 to 2
STANDARD = make_recipe("standard")


class RandomWeights:
    """See `DeviceWeights`; `experts` as well, so that the reference runs on the same bytes. With
    DSpark's draft layers where the configuration has them.
    """

    def __init__(self, config: ModelConfig, device: torch.device, seed: int = 0) -> None:
        self.config, self.device, self.seed = config, device, seed
        draft = DraftKind.NONE if config.dspark_block_size is None else DraftKind.DSPARK
        stages = config.num_draft_layers if draft is not DraftKind.NONE else 0
        self._shapes = {p.name: p for p in parameters(config, draft, stages)}
        self._made: dict[str, Tensor | Matrix] = {}
        self._records: dict[int, LayerRecords] = {}

    def tensor(self, name: str) -> Tensor:
        """An unquantised tensor of the real model, made when it is first asked for."""
        if name not in self._made:
            self._made[name] = self._plain(name)
        found = self._made[name]
        assert isinstance(found, Tensor)
        return found

    def matrix(self, name: str) -> Matrix:
        """A matrix in the format that recipe `standard` stores."""
        if name not in self._made:
            parameter = self._shapes[name]
            rows, cols = parameter.shape
            if STANDARD.rounds(name):
                self._made[name] = self._nvfp4(name, rows, cols)
            elif parameter.kind is Kind.LINEAR:
                self._made[name] = self._fp8(name, rows, cols)
            else:
                self._made[name] = self._plain(name)
        return self._made[name]

    @property
    def memory(self) -> None:
        """All experts are on the device."""
        return None

    def layer_records(self, layer: int) -> LayerRecords:
        """All experts of a layer, each in its own place."""
        if layer not in self._records:
            c, name = self.config, f"{self.config.block_name(layer)}.ffn.experts"
            record, rng = Record(c.hidden_size, c.moe_intermediate_size), self._generator(name)
            records = self._bytes(rng, 0, 256, c.n_routed_experts, record.nbytes)
            for part in ("13", "2"):
                scales = record_parts(record, records, part)[1]
                scales.copy_(self._bytes(rng, E4M3_ONE, E4M3_TWO, *scales.shape))
            places = torch.arange(c.n_routed_experts, dtype=torch.int32, device=self.device)
            factors = (
                self._globals(cols, c.n_routed_experts, count)
                for cols, count in ((record.hidden, 2), (record.inter, 1))
            )
            self._records[layer] = LayerRecords(places, places.clone(), records, *factors)
        return self._records[layer]

    def experts(self, prefix: str) -> RandomExperts:
        """The same for the reference, expert by expert."""
        c, (where, number, *_) = self.config, prefix.split(".")
        found = self.layer_records(int(number) + (c.num_hidden_layers if where == "mtp" else 0))
        return RandomExperts(*found.stacks(Record(c.hidden_size, c.moe_intermediate_size)))

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest[:7], "little"))

    def _bytes(self, rng: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=rng, device=self.device, dtype=torch.uint8)

    def _plain(self, name: str) -> Tensor:
        parameter, rng = self._shapes[name], self._generator(name)
        shape, c = parameter.shape, self.config
        if parameter.kind is Kind.TABLE:
            scores = torch.rand(shape[0], c.n_routed_experts, generator=rng, device=self.device)
            return scores.topk(shape[1], 1).indices
        values = torch.randn(shape, generator=rng, device=self.device)
        if "norm" in name:
            values = 1 + values / 8
        elif name.endswith("_scale"):
            values = 1 + values / 4
        elif name.endswith("bias"):
            values = values / 64  # scores of a token spread by 0.3: it chooses, not the bias
        elif len(shape) == 2 and name != "embed.weight" and not name.endswith("ape"):
            values = values * shape[1] ** -0.5
        plain = parameter.kind is Kind.FLOAT32
        return values if plain else values.to(torch.bfloat16)

    def _nvfp4(self, name: str, rows: int, cols: int) -> Nvfp4Matrix:
        rng = self._generator(name)
        codes = self._bytes(rng, 0, 256, 1, rows, cols // 2)
        tiles = (1, -(-rows // SF_ROWS), cols // NVFP4_K_ALIGN, SF_TILE_BYTES)
        scales = self._bytes(rng, E4M3_ONE, E4M3_TWO, *tiles)
        return Nvfp4Matrix(codes, scales, self._globals(cols, 1), rows, cols)

    def _globals(self, cols: int, *shape: int) -> Tensor:
        return torch.full(shape, 1 / (CODE_RMS * SCALE_RMS * cols**0.5), device=self.device)

    def _fp8(self, name: str, rows: int, cols: int) -> Fp8Matrix:
        rng = self._generator(name)
        slabs = SLABS if cut_by_columns(name) else 1
        values = torch.randn(slabs, rows, cols // slabs, generator=rng, device=self.device)
        codes = (values * 64).to(torch.float8_e4m3fn)
        exponent = 127 - 6 - round(0.5 * (cols - 1).bit_length())
        tiles = (-(-rows // FP8_BLOCK), -(-cols // FP8_BLOCK))
        scales = self._bytes(rng, exponent, exponent + 2, *tiles).view(torch.float8_e8m0fnu)
        return Fp8Matrix(codes, scales, rows, cols)


class RandomExperts:
    """See `runtime.weights.ExpertStack`."""

    def __init__(self, w13: Nvfp4Stack, w2: Nvfp4Stack) -> None:
        self._w13, self._w2 = w13, w2
        self.interleave = w13.interleave

    def __len__(self) -> int:
        return len(self._w13)

    def w13(self, expert: int) -> Matrix:
        """Gate and up projection of `expert`."""
        return self._w13.matrix(expert)

    def w2(self, expert: int) -> Matrix:
        """Down projection of `expert`."""
        return self._w2.matrix(expert)
