"""Packed weights as the kernels' operands: names and views, no byte is moved or changed."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal, StoreError
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.numeric.operands import SF_ROWS, SF_TILE_BYTES, Matrix, Nvfp4Matrix
from dsv4.formats.store.specs import path_of
from dsv4.kernels.core.contract import Buffers
from dsv4.kernels.ops.experts.reference import INTERLEAVE, SLABS
from dsv4.kernels.ops.gemv.contract import Weight
from dsv4.runtime.gpu.attention_plan import LayerWeights, first_products, second_products
from dsv4.runtime.load import LoadedWeights


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


class Operands:
    """Buffers of all weights by the names that `plan` gives them; the shapes that products read.

    Raises RuntimeRefusal naming a tensor whose format no kernel reads.
    """

    def __init__(self, weights: DeviceWeights) -> None:
        self.config = weights.config
        self.buffers: Buffers = {}
        self.stacks: list[str] = []  # names of the experts' codes and scales
        self._weights = weights
        self.layers = {n: self._layer(n) for n in range(self.config.num_hidden_layers)}
        self._connection("hc_head", "norm.weight", "head_")
        self.buffers["embed"] = self._plain("embed.weight", torch.bfloat16)
        self.head = self._matrix("head")

    def _layer(self, layer: int) -> LayerWeights:
        own, c = f"layers.{layer}.", self.config
        kind = c.attention_kind(layer)
        names = [*first_products(kind), *second_products(kind), "attn.wo_a", "attn.wo_b"]
        found = {name: self._matrix(own + name) for name in (*names, "ffn.gate")}
        found["attn.wo_a"] = found["attn.wo_a"]._replace(groups=c.o_groups)
        self._parameter(f"{own}attn.q_norm.weight", f"{own}q_norm")
        self._parameter(f"{own}attn.kv_norm.weight", f"{own}kv_norm")
        self._parameter(f"{own}attn.attn_sink", f"{own}sinks")
        for prefix, path in (("c", "attn.compressor"), ("i", "attn.indexer.compressor")):
            if f"{path}.wkv" in names:
                self._parameter(f"{own}{path}.ape", f"{own}{prefix}_ape")
                self._parameter(f"{own}{path}.norm.weight", f"{own}{prefix}_norm")
        self._connection(f"{own}hc_attn", f"{own}attn_norm.weight", f"{own}attn_")
        self._connection(f"{own}hc_ffn", f"{own}ffn_norm.weight", f"{own}ffn_")
        if c.is_hash_layer(layer):
            table = f"{own}ffn.gate.tid2eid"
            self.buffers[table] = self._weights.tensor(table).to(torch.int64)
        else:
            self._parameter(f"{own}ffn.gate.bias", f"{own}ffn.gate.bias")
        return found | self._experts(f"{own}ffn.")

    def _connection(self, prefix: str, norm: str, target: str) -> None:
        for name in ("fn", "base", "scale"):
            self._parameter(f"{prefix}_{name}", target + name)
        self._parameter(norm, f"{target}norm")

    def _parameter(self, name: str, target: str) -> None:
        """A small parameter as float32, whatever it was stored in."""
        self.buffers[target] = self._weights.tensor(name).to(torch.float32)

    def _plain(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self._weights.tensor(name)
        if tensor.dtype != dtype:
            raise RuntimeRefusal(f"{name} is {tensor.dtype}, kernels read {dtype}")
        return tensor

    def _matrix(self, name: str) -> Weight:
        """The operands of the matrix `name` under its name."""
        found = self._weights.matrix(f"{name}.weight")
        if isinstance(found, Tensor):
            if found.dtype != torch.bfloat16:
                raise RuntimeRefusal(f"{name}.weight is {found.dtype}, kernels read bfloat16")
            self.buffers[f"{name}.codes"] = found
            return Weight("bf16", *found.shape)
        self.buffers[f"{name}.codes"] = found.codes.view(torch.uint8)
        slabs = found.codes.shape[0]
        if isinstance(found, Nvfp4Matrix):
            self.buffers[f"{name}.scales"] = found.scales
            self.buffers[f"{name}.global_scale"] = found.global_scales
            return Weight("nvfp4", found.rows, found.cols, slabs)
        if found.scales.dtype != torch.float8_e8m0fnu:
            raise RuntimeRefusal(
                f"{name}.weight has {found.scales.dtype} scales, kernels read E8M0"
            )
        self.buffers[f"{name}.scales"] = found.scales.view(torch.uint8)
        return Weight("fp8", found.rows, found.cols, slabs)

    def _experts(self, own: str) -> dict[str, Weight]:
        """The expert stacks and the shared expert of a layer; the latter's matrices."""
        wanted = ((1, INTERLEAVE), (SLABS, 0))
        stacks = self._weights.stacks(f"{own}experts")
        for name, stack, (slabs, interleave) in zip(("13", "2"), stacks, wanted, strict=True):
            if (stack.codes.shape[1], stack.interleave) != (slabs, interleave):
                raise RuntimeRefusal(
                    f"{own}experts.w{name} has {stack.codes.shape[1]} slabs and rows interleaved "
                    f"by {stack.interleave}, kernels read {slabs} and {interleave}"
                )
            # One slab is no dimension to the kernel.
            self.buffers[f"{own}codes{name}"] = stack.codes.squeeze(1)
            self.buffers[f"{own}scales{name}"] = stack.scales.squeeze(1)
            self.buffers[f"{own}global_scale{name}"] = stack.global_scales
            self.stacks += [f"{own}codes{name}", f"{own}scales{name}"]
        found = {}
        for name in "123":
            shared = f"{own}shared_experts.w{name}"
            weight = self._matrix(shared)
            if weight.kind != "fp8":
                raise RuntimeRefusal(f"{shared}.weight is {weight.kind}, kernels read FP8 there")
            for part in ("codes", "scales"):
                self.buffers[f"{own}shared_{part}{name}"] = self.buffers[f"{shared}.{part}"]
            found[f"ffn.shared_experts.w{name}"] = weight
        return found


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A loaded store as `DeviceWeights`: nothing is copied."""

    weights: LoadedWeights

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
