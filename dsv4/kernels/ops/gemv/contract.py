"""`y = x wᵀ` for 1 to 8 rows: a packed or plain weight against few activations.

Reference: `dsv4.kernels.reference.linear`. Used for attention projections, the compressors, the
shared expert and the head; with groups for `wo_a`, whose rows of one group meet only its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.numeric.operands import (
    FP8_BLOCK,
    NVFP4_K_ALIGN,
    SF_ROWS,
    SF_TILE_BYTES,
    Fp8Matrix,
    Matrix,
    Nvfp4Matrix,
)
from dsv4.kernels.core.contract import Buffers, Case, Expected, Launch
from dsv4.kernels.core.signature import Argument, Kernel, kernel
from dsv4.kernels.core.sizes import MULTIPROCESSORS, STEP_COLUMNS, STEP_ROWS
from dsv4.kernels.reference.linear import dequantize_rows

MAX_ROWS = STEP_ROWS
STEP = STEP_COLUMNS  # K is a multiple of it
IMPLEMENTATION = "dsv4.kernels.ops.gemv.kernel:Gemv"

SMALL_CUTS = ((2, 2), (2, 3), (4, 2))  # warps and stages, the better one first
MULTIPROCESSOR_BYTES = 228 << 10  # of shared memory,
RESERVED_BYTES = 1 << 10  # of which every CTA takes this much besides its own
FP8_STAGE_BYTES = 6 << 10  # of a warp: 4 KiB of weights and 2 of activations
SUM_BYTES = 1 << 10  # likewise


class Weight(NamedTuple):
    """A weight of one shape. kind: "nvfp4", "fp8" or "bf16"; groups: of rows with own inputs."""

    kind: str
    n: int
    k: int
    slabs: int = 1
    groups: int = 1

    def operands(self, suffix: str = "") -> tuple[Argument, ...]:
        """Codes, scales and global scale as they lie in the store; what the format has of them."""
        byte, tiles, per_slab = torch.uint8, -(-self.n // SF_ROWS), self.k // self.slabs
        match self.kind:
            case "nvfp4":
                scales = (self.slabs, tiles, per_slab // NVFP4_K_ALIGN, SF_TILE_BYTES)
                return (
                    Argument(f"codes{suffix}", byte, (self.slabs, self.n, per_slab // 2)),
                    Argument(f"scales{suffix}", byte, scales),
                    Argument(f"global_scale{suffix}", torch.float32, (1,), align=4),
                )
            case "fp8":
                return (
                    Argument(f"codes{suffix}", byte, (self.slabs, self.n, per_slab)),
                    Argument(f"scales{suffix}", byte, (tiles, self.k // FP8_BLOCK), align=1),
                )
            case _:
                return (Argument(f"codes{suffix}", torch.bfloat16, (self.n, self.k)),)

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        per_column = {"nvfp4": 9 / 16, "fp8": 1.0, "bf16": 2.0}[self.kind]
        blocks = -(-self.n // SF_ROWS) * -(-self.k // FP8_BLOCK) if self.kind == "fp8" else 0
        return int(self.n * self.k * per_column) + blocks


def gemv(
    weights: Sequence[Weight], out: str = "float32", tuning: Mapping[str, int | bool] | None = None
) -> Kernel:
    """The kernel for weights that meet the same activations. out: "float32" or "bfloat16".

    Arguments: x bfloat16 `[M, G, K]`, M from 1 to 8; the operands of all weights; one y `[M, N]`
    for each. Weight number i has the suffix `i`.
    """
    named = list(enumerate(weights))
    return kernel(
        "gemv",
        IMPLEMENTATION,
        {
            "weights": "|".join(":".join(str(field) for field in weight) for weight in weights),
            "out": out,
            **tuned(weights),
            **(tuning or {}),
        },
        (
            Argument("x", torch.bfloat16, ("rows", weights[0].groups, weights[0].k)),
            tuple(one for index, weight in named for one in weight.operands(str(index))),
            tuple(
                Argument(f"y{index}", getattr(torch, out), ("rows", weight.n), "out")
                for index, weight in named
            ),
        ),
    )


def tuned(weights: Sequence[Weight]) -> dict[str, int | bool]:
    """Warps that share a row's columns, and steps in flight: measured on an H100 and an H200.

    Few rows mean few CTAs, which then want more warps; a warp with few steps needs no deep ring.
    NVFP4 is bound by its unpacking: many small CTAs keep all schedulers busy. Where FP8 has many
    CTAs of few steps, their last wave should be a full one.
    """
    steps = max(weight.k for weight in weights) // STEP
    bands = sum(-(-weight.n // SF_ROWS) * 4 for weight in weights)
    if weights[0].kind == "nvfp4" and bands >= 2048:
        return {"warps": 2, "stages": 3, "pdl": True}
    if all(weight.kind == "fp8" for weight in weights) and bands > 512 and steps < 16:
        warps, stages = max(SMALL_CUTS, key=lambda cut: _full_waves(bands, *cut))
        return {"warps": warps, "stages": stages, "pdl": True}
    plain = any(weight.kind == "bf16" for weight in weights)
    warps = 4 if plain or bands >= 256 else 8
    if plain and bands > MULTIPROCESSORS:
        warps = 2  # two CTAs on a multiprocessor
    if steps <= 16 and bands <= 128:
        warps = 16
    deep = 3 if weights[0].kind == "nvfp4" else 4
    return {"warps": warps, "stages": deep if steps >= 4 * warps else 2, "pdl": True}


def _full_waves(bands: int, warps: int, stages: int) -> float:
    """How full the waves of CTAs are that FP8 takes, by the shared memory that a CTA has."""
    nbytes = warps * (stages * FP8_STAGE_BYTES + SUM_BYTES) + RESERVED_BYTES
    waves = bands / (MULTIPROCESSORS * (MULTIPROCESSOR_BYTES // nbytes))
    return waves / math.ceil(waves)


def weights_of(config: ModelConfig) -> dict[str, list[Weight]]:
    """The products of one layer and the head, in the formats of recipe `standard`, by launch."""
    c = config
    heads, rank = c.num_attention_heads * c.head_dim, c.o_groups * c.o_lora_rank
    inter, hidden = c.moe_intermediate_size, c.hidden_size
    csa, index = (
        Weight("bf16", 2 * c.head_dim, hidden),
        Weight("bf16", 2 * c.index_head_dim, hidden),
    )
    hca = Weight("bf16", c.head_dim, hidden)
    low = [Weight("fp8", c.q_lora_rank, hidden), Weight("fp8", c.head_dim, hidden)]
    wq_b = Weight("fp8", heads, c.q_lora_rank)
    draft = {}
    if c.dspark_block_size is not None:
        taps, markov = len(c.dspark_target_layer_ids or ()), c.dspark_markov_rank or 0
        draft = {
            "draft main_proj": [Weight("fp8", hidden, taps * hidden)],
            "draft wkv": [Weight("fp8", c.head_dim, hidden)] * c.num_draft_layers,
            "draft markov_w2": [Weight("bf16", c.vocab_size, markov)],
        }
    return draft | {
        "lm_head": [Weight("nvfp4", c.vocab_size, hidden)],
        "wq_a wkv": low,
        "wq_a wkv HCA": [*low, hca, hca],
        "wq_a wkv CSA": [*low, csa, csa, index, index, Weight("bf16", c.index_n_heads, hidden)],
        "wq_b": [wq_b],
        "wq_b indexer": [wq_b, Weight("fp8", c.index_n_heads * c.index_head_dim, c.q_lora_rank)],
        "wo_a": [Weight("fp8", rank, heads // c.o_groups, groups=c.o_groups)],
        "wo_b": [Weight("fp8", hidden, rank, slabs=8)],
        "shared w1 w3": [Weight("fp8", inter, hidden)] * 2,
        "shared w2": [Weight("fp8", hidden, inter, slabs=8)],
    }


def cases(config: ModelConfig, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """Every product of a model, for each number of rows."""
    for shape, weights in weights_of(config).items():
        for count in rows:
            yield case(weights, shape, model, count)


def case(
    weights: Sequence[Weight],
    shape: str,
    model: str,
    rows: int,
    tuning: Mapping[str, int | bool] | None = None,
) -> Case:
    """`rows` activations against `weights`."""
    groups, k = weights[0].groups, weights[0].k
    touched = sum(weight.nbytes + rows * weight.n * 4 for weight in weights) + rows * groups * k * 2

    def make(rng: torch.Generator) -> Buffers:
        x = torch.randn(rows, groups, k, generator=rng, device=rng.device)
        buffers: Buffers = {"x": x.to(torch.bfloat16)}
        for index, weight in enumerate(weights):
            buffers |= random_weight(weight, str(index), rng)
            buffers[f"y{index}"] = torch.empty(rows, weight.n, device=rng.device)
        return buffers

    def expect(buffers: Buffers) -> dict[str, Expected]:
        return {
            f"y{index}": expected(weight, buffers, str(index))
            for index, weight in enumerate(weights)
        }

    launch = Launch(gemv(weights, tuning=tuning))
    cold = tuple(one.name for index, w in enumerate(weights) for one in w.operands(str(index))[:2])
    return Case("gemv", shape, model, rows, (launch,), touched, make, expect, cold=cold)


def random_weight(weight: Weight, suffix: str, rng: torch.Generator) -> Buffers:
    """Every code and almost every scale there is, none of them NaN."""
    codes, *others = weight.operands(suffix)

    def some(low: int, high: int, shape: tuple[Any, ...]) -> Tensor:
        return torch.randint(low, high, shape, generator=rng, device=rng.device, dtype=torch.uint8)

    if weight.kind == "bf16":
        plain = torch.randn(codes.shape, generator=rng, device=rng.device)  # type: ignore[arg-type]
        return {codes.name: plain.to(torch.bfloat16)}
    if weight.kind == "nvfp4":
        return {
            codes.name: some(0, 256, codes.shape),
            others[0].name: some(0, 0x7F, others[0].shape),
            others[1].name: torch.full((1,), 2.0**-9, device=rng.device),
        }
    raw = some(0, 256, codes.shape)
    raw[(raw & 0x7F) == 0x7F] = 0x01  # E4M3's NaN, which convert refuses
    return {codes.name: raw, others[0].name: some(100, 140, others[0].shape)}


def matrix_of(weight: Weight, buffers: Buffers, suffix: str) -> Matrix:
    """The operand that the reference knows."""
    codes: Tensor = buffers[f"codes{suffix}"]
    if weight.kind == "bf16":
        return codes
    scales: Tensor = buffers[f"scales{suffix}"]
    if weight.kind == "fp8":
        e8m0 = scales.view(torch.float8_e8m0fnu)
        return Fp8Matrix(codes.view(torch.float8_e4m3fn), e8m0, weight.n, weight.k)
    return Nvfp4Matrix(codes, scales, buffers[f"global_scale{suffix}"], weight.n, weight.k)


def expected(weight: Weight, buffers: Buffers, suffix: str) -> Expected:
    """The correctly rounded product, and how far float32 sums may be from it.

    Products are exact in float32. A row's sum is a chain of MMAs of 16 products and a few sums of
    those; the tensor cores may drop up to two units of the last place of the running sum's
    magnitude at each. With Σ|x w| as that magnitude: |error| <= 2 (K/16 + 16) 2^-23 Σ|x w|.
    """
    x = buffers["x"].to(torch.float64)
    per_group = weight.n // weight.groups
    matrix = matrix_of(weight, buffers, suffix)
    values, magnitudes = [], []
    for group in range(weight.groups):
        for start in range(group * per_group, (group + 1) * per_group, 8192):
            stop = min(start + 8192, (group + 1) * per_group)
            rows = dequantize_rows(matrix, start, stop).to(torch.float64)
            values.append(x[:, group] @ rows.T)
            magnitudes.append(x[:, group].abs() @ rows.abs().T)
    bound = torch.cat(magnitudes, 1) * (2.0 * (weight.k / 16 + 16) * 2.0**-23)
    return Expected(torch.cat(values, 1), bound)
