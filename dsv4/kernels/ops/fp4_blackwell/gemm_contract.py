"""`y = x wᵀ` of NVFP4 activations with an NVFP4 weight, on Blackwell's block-scaled tensor cores.

x comes from `quantize_activations`, w lies as in the store. Reference: both dequantised, multiplied
in FP64. No Blackwell GPU was at hand: the kernels are compiled, inspected and run by an interpreter
of their PTX (tests), but not timed; they exist for sm_100a alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.numeric.layouts import untile_scales
from dsv4.formats.numeric.operands import SF_ROWS, Nvfp4Matrix
from dsv4.kernels.core.contract import Buffers, Case, Expected, Launch
from dsv4.kernels.core.signature import Argument, Kernel, kernel
from dsv4.kernels.ops.fp4_blackwell.reference import Activations, dequantize_activations
from dsv4.kernels.ops.fp4_blackwell.tiles import TILE_BYTES, TILE_COLUMNS, row_tiles
from dsv4.kernels.reference.accumulate import WIDE
from dsv4.kernels.reference.linear import dequantize_rows

OPERATION = "fp4_gemm"
MODULE = "dsv4.kernels.ops.fp4_blackwell.gemm"
ARCHITECTURES = ("sm_100a",)
MULTIPROCESSORS = 148  # of a B200: a CTA on each
TILE_N = 128
_ROWS_AT_ONCE = 8192


class Product(NamedTuple):
    """A weight `[N, K]` in K-slabs; out: "float32" or "bfloat16"; per_row: x has a scale a row."""

    n: int
    k: int
    slabs: int = 1
    out: str = "float32"
    per_row: bool = False

    def x(self) -> tuple[Argument, ...]:
        """Activations: codes, tiled scales, global scale."""
        u8, columns = torch.uint8, self.k // TILE_COLUMNS
        return (
            Argument("x_codes", u8, ("rows", self.k // 2)),
            Argument("x_scales", u8, ("tiles", columns, TILE_BYTES)),
            Argument("x_global", torch.float32, ("rows" if self.per_row else 1,), align=4),
        )

    def w(self, lead: tuple[int, ...] = (), projections: int = 1) -> tuple[Argument, ...]:
        """The weight as it lies in the store, `lead` times."""
        u8, slab = torch.uint8, self.k // self.slabs
        scales = (self.slabs, -(-self.n // SF_ROWS), slab // TILE_COLUMNS, TILE_BYTES)
        return (
            Argument("codes", u8, (*lead, self.slabs, self.n, slab // 2)),
            Argument("scales", u8, (*lead, *scales)),
            Argument("global_scales", torch.float32, (*lead, projections), align=4),
        )

    def config(self, tile_n: int, pdl: bool) -> dict[str, int | float | str | bool]:
        """What the kernel's class is made with."""
        if self.k % (self.slabs * TILE_COLUMNS) or self.n % 8:
            raise ValueError(f"{self}: expected N in eights and slabs of a multiple of 64 columns")
        return {**self._asdict(), "tile_n": tile_n, "ctas": MULTIPROCESSORS, "pdl": pdl}


def fp4_gemm(product: Product, tile_n: int = TILE_N, pdl: bool = True) -> Kernel:
    """Arguments: (x_codes uint8 `[T, K/2]`, x_scales uint8 `[tiles, K/64, 512]`, x_global float32
    `[1]` or `[T]`); (codes, scales, global_scales float32 `[1]`) of the weight; y `[T, N]`.
    """
    y = Argument("y", getattr(torch, product.out), ("rows", product.n), "out")
    arguments = (product.x(), product.w(), y)
    config = product.config(tile_n, pdl)
    return kernel(OPERATION, f"{MODULE}:Fp4Gemm", config, arguments, ARCHITECTURES)


def products_of(config: ModelConfig) -> dict[str, Product]:
    """The matrices of a layer and the head under recipe `nvfp4`."""
    c = config
    heads, rank = c.num_attention_heads * c.head_dim, c.o_groups * c.o_lora_rank
    inter, hidden = c.moe_intermediate_size, c.hidden_size
    return {
        "lm_head": Product(c.vocab_size, hidden),
        "gate": Product(c.n_routed_experts, hidden),
        "wq_a": Product(c.q_lora_rank, hidden, out="bfloat16"),
        "wkv": Product(c.head_dim, hidden, out="bfloat16"),
        "wq_b": Product(heads, c.q_lora_rank, out="bfloat16"),
        "wo_b": Product(hidden, rank, slabs=8, out="bfloat16"),
        "shared w1": Product(inter, hidden, out="bfloat16"),
        "shared w2": Product(hidden, inter, slabs=8, out="bfloat16"),
    }


def cases(config: ModelConfig, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """Every matrix, for each number of tokens."""
    for shape, product in products_of(config).items():
        for count in rows:
            yield case(product, shape, model, count)


def case(product: Product, shape: str, model: str, rows: int, tile_n: int = TILE_N) -> Case:
    """One product of random codes."""

    def make(rng: torch.Generator) -> Buffers:
        out = getattr(torch, product.out)
        return {
            **random_operands(product.x(), rows, row_tiles(rows), rng),
            **random_operands(product.w(), rows, 0, rng),
            "y": torch.empty(rows, product.n, dtype=out, device=rng.device),
        }

    item = 4 if product.out == "float32" else 2
    return Case(
        OPERATION,
        shape,
        model,
        rows,
        (Launch(fp4_gemm(product, tile_n)),),
        int((product.n + rows) * product.k * 9 / 16) + rows * product.n * item,
        make,
        lambda buffers: {"y": expected(product, buffers)},
        cold=("codes", "scales"),
        flops=2 * rows * product.n * product.k,
        note="FP4 x FP4; the matrix bound is bfloat16's",
        joint=True,  # a tile of scales holds many tokens'
    )


def random_operands(
    arguments: Sequence[Argument], rows: int, tiles: int, rng: torch.Generator
) -> Buffers:
    """Every code and every scale there is but NaN; global scales of a few octaves."""
    sizes = {"rows": rows, "tiles": tiles}
    buffers: Buffers = {}
    for one in arguments:
        shape = [sizes[size] if isinstance(size, str) else size for size in one.shape]
        if one.dtype is torch.float32:
            octaves = torch.randn(shape, generator=rng, device=rng.device)
            buffers[one.name] = octaves.exp2() * 2.0**-9
            continue
        high = 0x7F if one.name.endswith("scales") else 0x100
        buffers[one.name] = torch.randint(
            high, shape, generator=rng, device=rng.device, dtype=torch.uint8
        )
    return buffers


def activations(buffers: Buffers, blocks: int) -> Tensor:
    """x in FP64, `[T, K]`, from plainly tiled scales."""
    codes = buffers["x_codes"]
    scales = untile_scales(buffers["x_scales"], codes.shape[0], blocks)
    return dequantize_activations(Activations(codes, scales, buffers["x_global"]))


def multiply(x: Tensor, w: Nvfp4Matrix) -> tuple[Tensor, Tensor]:
    """(product, bound of its error) in FP64.

    Products of codes and of scales are exact. A row's sum is a chain of blocks of 16; the tensor
    cores may drop up to two units of the last place of the running sum's magnitude at each. With
    Σ|x w| as that magnitude: |error| <= 2 (K/16 + 16) 2^-23 Σ|x w|, the factors' rounding included.
    """
    values, sizes = [], []
    for start in range(0, w.rows, _ROWS_AT_ONCE):
        rows = dequantize_rows(w, start, min(start + _ROWS_AT_ONCE, w.rows)).to(WIDE)
        values.append(x @ rows.T)
        sizes.append(x.abs() @ rows.abs().T)
    return torch.cat(values, 1), torch.cat(sizes, 1) * (2 * (w.cols / 16 + 16) * 2.0**-23)


def rounded(value: Tensor, bound: Tensor, out: str) -> Expected:
    """The bound with the result's own rounding: half a unit of bfloat16's last place."""
    if out == "bfloat16":
        bound = bound + (value.abs() + bound) * 2.0**-8
    return Expected(value, bound)


def expected(product: Product, buffers: Buffers) -> Expected:
    """The reference's product and its bound."""
    w = Nvfp4Matrix(
        buffers["codes"], buffers["scales"], buffers["global_scales"], product.n, product.k
    )
    value, bound = multiply(activations(buffers, product.k // 16), w)
    return rounded(value, bound, product.out)
