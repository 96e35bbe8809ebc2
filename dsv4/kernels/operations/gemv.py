"""`y = x wᵀ` for 1 to 8 rows: a packed or plain weight against few activations.

Reference: `dsv4.kernels.reference.linear`. Used for attention projections, the compressors, the
shared expert and the head; with groups for `wo_a`, whose rows of one group meet only its inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv4.formats.config import ModelConfig
from dsv4.formats.matrices import (
    FP8_BLOCK,
    NVFP4_K_ALIGN,
    SF_ROWS,
    SF_TILE_BYTES,
    Fp8Matrix,
    Matrix,
    Nvfp4Matrix,
)
from dsv4.kernels.case import Buffers, Case, Expected, Launch
from dsv4.kernels.compiled import Argument, Kernel, kernel
from dsv4.kernels.reference.linear import dequantize_rows

MAX_ROWS = 8
IMPLEMENTATION = "dsv4.kernels.sm90.gemv:Gemv"


class Weight(NamedTuple):
    """A weight of one shape. kind: "nvfp4", "fp8" or "bf16"; groups: of rows with own inputs."""

    kind: str
    n: int
    k: int
    slabs: int = 1
    groups: int = 1

    def arguments(self) -> tuple[Argument, Argument]:
        """Codes and scales as they lie in the store."""
        byte, tiles = torch.uint8, -(-self.n // SF_ROWS)
        per_slab = self.k // self.slabs
        match self.kind:
            case "nvfp4":
                scales = (self.slabs, tiles, per_slab // NVFP4_K_ALIGN, SF_TILE_BYTES)
                return (
                    Argument("codes", byte, (self.slabs, self.n, per_slab // 2)),
                    Argument("scales", byte, scales),
                )
            case "fp8":
                return (
                    Argument("codes", byte, (self.slabs, self.n, per_slab)),
                    Argument("scales", byte, (tiles, -(-self.k // FP8_BLOCK)), align=1),
                )
            case _:
                return (
                    Argument("codes", torch.bfloat16, (self.n, self.k)),
                    Argument("scales", byte, (1,), align=1),  # not read
                )

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        per_column = {"nvfp4": 9 / 16, "fp8": 1.0, "bf16": 2.0}[self.kind]
        blocks = -(-self.n // SF_ROWS) * -(-self.k // FP8_BLOCK) if self.kind == "fp8" else 0
        return int(self.n * self.k * per_column) + blocks


def gemv(weight: Weight, out: str = "float32", **tuning: int) -> Kernel:
    """The kernel for one weight. out: "float32" or "bfloat16".

    Arguments: x bfloat16 `[M, G, K]`, M from 1 to 8; codes, scales; global_scales float32 `[1]`
    (1 where the format has none); y `[M, N]`.
    """
    return kernel(
        "gemv",
        IMPLEMENTATION,
        {**weight._asdict(), "out": out, **(tuning or tuned(weight))},
        (
            Argument("x", torch.bfloat16, ("rows", weight.groups, weight.k)),
            *weight.arguments(),
            Argument("global_scales", torch.float32, (1,), align=4),
            Argument("y", getattr(torch, out), ("rows", weight.n), "out"),
        ),
    )


def tuned(weight: Weight) -> Mapping[str, int]:
    """How the work is cut: measured on an H100."""
    return {"row_warps": 1, "k_warps": 8, "unroll": 4 if weight.kind == "nvfp4" else 2}


def weights_of(config: ModelConfig) -> dict[str, Weight]:
    """The matrices of one layer and the head, in the formats of recipe `standard`."""
    c = config
    heads, rank = c.num_attention_heads * c.head_dim, c.o_groups * c.o_lora_rank
    inter, hidden = c.moe_intermediate_size, c.hidden_size
    return {
        "lm_head": Weight("nvfp4", c.vocab_size, hidden),
        "wq_a": Weight("fp8", c.q_lora_rank, hidden),
        "wkv": Weight("fp8", c.head_dim, hidden),
        "wq_b": Weight("fp8", heads, c.q_lora_rank),
        "wo_a": Weight("fp8", rank, heads // c.o_groups, groups=c.o_groups),
        "wo_b": Weight("fp8", hidden, rank, slabs=8),
        "shared w1": Weight("fp8", inter, hidden),
        "shared w2": Weight("fp8", hidden, inter, slabs=8),
        "compressor wkv": Weight("bf16", 2 * c.head_dim, hidden),
        "indexer wq_b": Weight("fp8", c.index_n_heads * c.index_head_dim, c.q_lora_rank),
    }


def cases(config: ModelConfig, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """Every matrix of a model, for each number of rows."""
    for shape, weight in weights_of(config).items():
        for count in rows:
            yield _case(weight, shape, model, count)


def _case(weight: Weight, shape: str, model: str, rows: int) -> Case:
    activations = rows * (weight.groups * weight.k * 2 + weight.n * 4)

    def make(rng: torch.Generator) -> Buffers:
        x = torch.randn(rows, weight.groups, weight.k, generator=rng, device=rng.device)
        return {
            "x": x.to(torch.bfloat16),
            **random_weight(weight, rng),
            "global_scales": torch.full(
                (1,), 2.0**-9 if weight.kind == "nvfp4" else 1.0, device=rng.device
            ),
            "y": torch.empty(rows, weight.n, device=rng.device),
        }

    return Case(
        "gemv",
        shape,
        model,
        rows,
        (Launch(gemv(weight)),),
        weight.nbytes + activations,
        make,
        lambda buffers: {"y": expected(weight, buffers)},
        cold=("codes", "scales"),
    )


def random_weight(weight: Weight, rng: torch.Generator) -> Buffers:
    """Every code and almost every scale there is, none of them NaN."""
    codes, scales = weight.arguments()

    def some(low: int, high: int, shape: tuple[Any, ...]) -> Tensor:
        return torch.randint(low, high, shape, generator=rng, device=rng.device, dtype=torch.uint8)

    if weight.kind == "bf16":
        plain = torch.randn(codes.shape, generator=rng, device=rng.device)  # type: ignore[arg-type]
        return {"codes": plain.to(torch.bfloat16), "scales": some(0, 1, (1,))}
    if weight.kind == "nvfp4":
        return {"codes": some(0, 256, codes.shape), "scales": some(0, 0x7F, scales.shape)}
    raw = some(0, 256, codes.shape)
    raw[(raw & 0x7F) == 0x7F] = 0x01  # E4M3's NaN, which convert refuses
    return {"codes": raw, "scales": some(100, 140, scales.shape)}


def matrix_of(weight: Weight, buffers: Buffers) -> Matrix:
    """The operand that the reference knows."""
    codes: Tensor = buffers["codes"]
    if weight.kind == "bf16":
        return codes
    if weight.kind == "fp8":
        scales = buffers["scales"].view(torch.float8_e8m0fnu)
        return Fp8Matrix(codes.view(torch.float8_e4m3fn), scales, weight.n, weight.k)
    return Nvfp4Matrix(codes, buffers["scales"], buffers["global_scales"], weight.n, weight.k)


def expected(weight: Weight, buffers: Buffers) -> Expected:
    """The correctly rounded product, and how far float32 sums may be from it.

    Products are exact in float32. A row's sum is a chain of MMAs of 16 products and a few sums of
    those; the tensor cores may drop up to two units of the last place of the running sum's
    magnitude at each. With Σ|x w| as that magnitude: |error| <= 2 (K/16 + 16) 2^-23 Σ|x w|.
    """
    x = buffers["x"].to(torch.float64)
    per_group = weight.n // weight.groups
    matrix = matrix_of(weight, buffers)
    values, magnitudes = [], []
    for group in range(weight.groups):
        for start in range(group * per_group, (group + 1) * per_group, 8192):
            stop = min(start + 8192, (group + 1) * per_group)
            rows = dequantize_rows(matrix, start, stop).to(torch.float64)
            values.append(x[:, group] @ rows.T)
            magnitudes.append(x[:, group].abs() @ rows.abs().T)
    bound = torch.cat(magnitudes, 1) * (2.0 * (weight.k / 16 + 16) * 2.0**-23)
    return Expected(torch.cat(values, 1), bound)
