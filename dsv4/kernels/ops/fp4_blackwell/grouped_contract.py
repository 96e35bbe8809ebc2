"""The routed experts in FP4 x FP4, on Blackwell: tokens sorted by expert, all experts in a launch.

    w13:  act[r] = weight[r] * silu(min(gate, limit)) * clamp(up, -limit, limit), by row r of x
    w2:   y[r] = act[r] w2ᵀ, act quantised in between

Rows of expert e are `[offsets[e], offsets[e + 1])`, known to the device alone; the grid does not
depend on them. w13 has gate and up in runs of 8 rows and a global scale for each. The sum over a
token's experts is left to who sorted them. Reference and state of proof as in `fp4_gemm`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.numeric.layouts import untile_scales
from dsv4.formats.numeric.operands import Nvfp4Matrix
from dsv4.kernels.core.contract import Buffers, Case, Expected, Launch
from dsv4.kernels.core.signature import Argument, Kernel, kernel
from dsv4.kernels.ops.fp4_blackwell.gemm_contract import (
    ARCHITECTURES,
    MODULE,
    TILE_N,
    Product,
    multiply,
    random_operands,
    rounded,
)
from dsv4.kernels.ops.fp4_blackwell.quantize_contract import random_offsets
from dsv4.kernels.ops.fp4_blackwell.reference import Activations, dequantize_activations
from dsv4.kernels.ops.fp4_blackwell.tiles import most_row_tiles, row_tiles
from dsv4.kernels.reference.moe import split_gate_up, swiglu

OPERATION = "fp4_gemm_grouped"
RUN = 8  # rows of gate, then of up, in w13


@dataclasses.dataclass(frozen=True)
class Experts:
    """product: of one expert. swiglu: it is a w13, and `limit` its clamp (0: none)."""

    product: Product
    count: int
    swiglu: bool = False
    limit: float = 0.0

    @property
    def columns(self) -> int:
        """Of the result."""
        return self.product.n // 2 if self.swiglu else self.product.n


def fp4_gemm_grouped(experts: Experts, tile_n: int = TILE_N, pdl: bool = True) -> Kernel:
    """Arguments: x as in `fp4_gemm`, its scales tiled by group; (codes `[E, S, N, Ks/2]`, scales
    `[E, S, N/128, Ks/64, 512]`, global_scales float32 `[E, 1]`, w13 `[E, 2]`); offsets int32
    `[E + 1]`; weights float32 `[T]` only for w13; y `[T, N]`, w13 `[T, N/2]`.
    """
    product = experts.product
    if experts.swiglu and product.n % (2 * RUN):
        raise ValueError(f"{product.n} rows of gate and up, expected a multiple of {2 * RUN}")
    config = product.config(tile_n, pdl) | {"groups": experts.count}
    arguments: tuple[Argument | tuple[Argument, ...], ...] = (
        product.x(),
        product.w((experts.count,), 2 if experts.swiglu else 1),
        Argument("offsets", torch.int32, (experts.count + 1,), align=4),
    )
    name = "Fp4GemmGrouped"
    if experts.swiglu:
        name = "Fp4SwigluGrouped"
        config |= {"swiglu": True, "limit": experts.limit}
        arguments += (Argument("weights", torch.float32, ("rows",), align=4),)
    y = Argument("y", getattr(torch, product.out), ("rows", experts.columns), "out")
    return kernel(OPERATION, f"{MODULE}:{name}", config, (*arguments, y), ARCHITECTURES)


def experts_of(config: ModelConfig) -> dict[str, Experts]:
    """Both products of a layer's routed experts."""
    c = config
    up = Product(2 * c.moe_intermediate_size, c.hidden_size, out="bfloat16")
    down = Product(c.hidden_size, c.moe_intermediate_size, slabs=8, out="bfloat16")
    return {
        "experts w13": Experts(up, c.n_routed_experts, True, c.swiglu_limit),
        "experts w2": Experts(down, c.n_routed_experts),
    }


def cases(config: ModelConfig, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """Both products, for each number of tokens, each of which visits top_k experts."""
    for shape, experts in experts_of(config).items():
        for count in rows:
            yield case(experts, shape, model, count * config.num_experts_per_tok)


def case(experts: Experts, shape: str, model: str, rows: int, tile_n: int = TILE_N) -> Case:
    """One product of random codes. rows: of x, sorted by expert."""
    product = experts.product
    tiles = most_row_tiles(rows, experts.count)

    def make(rng: torch.Generator) -> Buffers:
        w = product.w((experts.count,), 2 if experts.swiglu else 1)
        buffers = {
            **random_operands(product.x(), rows, tiles, rng),
            **random_operands(w, rows, 0, rng),
            "offsets": random_offsets(rows, experts.count, rng),
            "weights": torch.rand(rows, generator=rng, device=rng.device),
            "y": torch.empty(
                rows, experts.columns, dtype=getattr(torch, product.out), device=rng.device
            ),
        }
        # Gate and up of a few units, where SwiGLU is neither linear nor clamped everywhere.
        reach = 2.0**-16 / product.k if experts.swiglu else 2.0**-9
        buffers["global_scales"] *= reach * 2.0**9
        return buffers

    hit = min(rows, experts.count)
    item = 4 if product.out == "float32" else 2
    weights = int(hit * product.n * product.k * 9 / 16)
    return Case(
        OPERATION,
        shape,
        model,
        rows,
        (Launch(fp4_gemm_grouped(experts, tile_n)),),
        weights + int(rows * product.k * 9 / 16) + rows * experts.columns * item,
        make,
        lambda buffers: {"y": expected(experts, buffers)},
        cold=("codes", "scales"),
        flops=2 * rows * product.n * product.k,
        note="FP4 x FP4; bytes if every row had an expert of its own",
        joint=True,  # a tile of scales holds many tokens'
    )


def expected(experts: Experts, buffers: Buffers) -> Expected:
    """The reference's result and its bound, expert by expert."""
    product = experts.product
    spans = itertools.pairwise(buffers["offsets"].tolist())
    values, bounds, tile = [], [], 0
    for expert, (begin, end) in enumerate(spans):
        if begin == end:
            continue
        own = buffers["x_scales"][tile : tile + row_tiles(end - begin)]
        tile += row_tiles(end - begin)
        x_global = buffers["x_global"][begin:end] if product.per_row else buffers["x_global"]
        scales = untile_scales(own, end - begin, product.k // 16)
        x = Activations(buffers["x_codes"][begin:end], scales, x_global)
        w = Nvfp4Matrix(
            buffers["codes"][expert],
            buffers["scales"][expert],
            buffers["global_scales"][expert],
            product.n,
            product.k,
            RUN if experts.swiglu else 0,
        )
        value, bound = multiply(dequantize_activations(x), w)
        if experts.swiglu:
            weights = buffers["weights"][begin:end].to(value.dtype).unsqueeze(1)
            value, bound = _swiglu(value, bound, experts.limit, weights)
        values.append(value)
        bounds.append(bound)
    return rounded(torch.cat(values), torch.cat(bounds), product.out)


def _swiglu(gate_up: Tensor, bound: Tensor, limit: float, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Value and bound after SwiGLU.

    |silu'| <= 1.1 and |silu(g)| <= |g|. The kernel's exp is off by at most (|g| + 4) 2^-22 of it
    (2^-22.5 the instruction's own, the rest the rounding of g log2 e), and everything else is a
    handful of float32 operations; where exp overflows the result is -0 as it should be.
    """
    (gate, up), (gate_off, up_off) = split_gate_up(gate_up, RUN), split_gate_up(bound, RUN)
    value = swiglu(gate, up, limit).to(gate.dtype) * weights
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    off = 1.1 * gate_off * (up.abs() + up_off) + gate.abs().clamp(max=1e4) * up_off
    own = value.abs() * (gate.abs() + 12) * 2.0**-22
    return value, weights * off + own + 2.0**-120
