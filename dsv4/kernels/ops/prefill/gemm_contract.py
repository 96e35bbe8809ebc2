"""`y = x wᵀ` for more than 8 rows: a packed or plain weight against a chunk of a prompt.

Reference: `dsv4.kernels.reference.linear`, like `gemv`, whose weights these are. A packed weight
is multiplied in another order of columns, so the activations are arranged alike first, once for
all weights that meet them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.core.bounds import blocked
from dsv4.kernels.core.contract import Buffers, Case, Expected, Launch
from dsv4.kernels.core.signature import Argument, Kernel, kernel
from dsv4.kernels.core.sizes import MULTIPROCESSORS
from dsv4.kernels.ops.gemv import contract as gemv
from dsv4.kernels.ops.gemv.contract import MAX_ROWS, Weight
from dsv4.kernels.reference.linear import dequantize_rows

MODULE = "dsv4.kernels.ops.prefill"
ROWS_AT_ONCE = 8192  # of a weight, for the reference
RAGGED = (1, 8, 17, 300)
WEIGHT_ROWS = 128  # of a tile, 64 a warpgroup
CTAS = MULTIPROCESSORS
NARROW = {"warpgroups": 2, "m_each": 1, "n_tile": 128, "runs": 2, "stages": 4}
WIDE = {"warpgroups": 2, "m_each": 1, "n_tile": 256, "runs": 1, "unroll": 2, "stages": 5}


def gemm(weight: Weight, out: str = "bfloat16", tuning: Mapping[str, int] | None = None) -> Kernel:
    """The kernel for one weight and any number of rows. out: "float32" or "bfloat16".

    Arguments: x bfloat16 `[M, G, K]`, arranged unless the weight is plain; the weight's operands;
    y `[M, N]`.
    """
    return kernel(
        "gemm",
        f"{MODULE}.gemm:Gemm",
        {**weight._asdict(), "out": out, **(tuning or tuned(weight))},
        (
            Argument("x", torch.bfloat16, ("rows", weight.groups, weight.k)),
            weight.operands(),
            Argument("y", getattr(torch, out), ("rows", weight.n), "out"),
        ),
    )


def arrange(groups: int, k: int) -> Kernel:
    """Reorders columns for packed weights. Arguments: x, arranged bfloat16 `[M, G, K]`."""
    shape = ("rows", groups, k)
    return kernel(
        "gemm_arrange",
        f"{MODULE}.permute:Arrange",
        {"groups": groups, "k": k},
        (
            Argument("x", torch.bfloat16, shape),
            Argument("arranged", torch.bfloat16, shape, "out"),
        ),
    )


def tuned(weight: Weight, rows: int = 0) -> Mapping[str, int]:
    """How the work is cut: rows of the weight and tokens of a tile, columns of a stage.

    Packed weights are unpacked once for each tile of tokens, so wide tiles multiply faster; they
    are taken where there are enough of them for the device.
    """
    if weight.kind == "bf16" or weight.n % WEIGHT_ROWS:
        warpgroups, stages = (1 if weight.n % WEIGHT_ROWS else 2), 3 if weight.kind == "bf16" else 4
        return {**NARROW, "warpgroups": warpgroups, "stages": stages}
    waves = [
        -(-(-(-rows // cut["n_tile"]) * weight.n // WEIGHT_ROWS) // CTAS) for cut in (NARROW, WIDE)
    ]
    # As measured, a wide tile takes 1.4 times as long as a narrow one.
    return WIDE if 7 * waves[1] < 5 * waves[0] else NARROW


def weights_of(config: ModelConfig) -> dict[str, Weight]:
    """Every shape and format of a layer's dense products, and the shared expert in NVFP4."""
    found = {
        weight
        for launch, weights in gemv.weights_of(config).items()
        for weight in weights
        if launch not in ("lm_head", "draft markov_w2")
    }
    hidden, inter = config.hidden_size, config.moe_intermediate_size
    found |= {Weight("nvfp4", inter, hidden), Weight("nvfp4", hidden, inter, slabs=8)}
    return {_name(weight): weight for weight in sorted(found)}


def _name(weight: Weight) -> str:
    slabs = f" {weight.slabs} slabs" if weight.slabs > 1 else ""
    groups = f" {weight.groups} groups" if weight.groups > 1 else ""
    return f"{weight.kind} {weight.n}x{weight.k}{slabs}{groups}"


def cases(config: ModelConfig, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """Every matrix of a model but the head, for each number of rows above 8."""
    for shape, weight in weights_of(config).items():
        for count in rows:
            if count > MAX_ROWS:
                yield case(weight, shape, model, count, tuning=tuned(weight, count))


def checks(config: ModelConfig, model: str) -> Iterator[Case]:
    """Ragged numbers of rows, both outputs and cuts, scales of all sizes, zeros of both signs."""
    for shape, weight in weights_of(config).items():
        for count, out in zip(RAGGED, ("bfloat16", "float32") * 2, strict=True):
            yield case(weight, shape, model, count, out)
        yield case(weight, f"{shape} hard", model, 130, "float32", hard=True)
        if (cut := tuned(weight, 1 << 20)) != tuned(weight):
            yield case(weight, f"{shape} wide", model, 300, hard=True, tuning=cut)


def case(
    weight: Weight,
    shape: str,
    model: str,
    rows: int,
    out: str = "bfloat16",
    *,
    hard: bool = False,
    tuning: Mapping[str, int] | None = None,
) -> Case:
    """One weight against `rows` rows. hard: extreme scales, zeros."""

    def make(rng: torch.Generator) -> Buffers:
        x = torch.randn(rows, weight.groups, weight.k, generator=rng, device=rng.device)
        buffers = {"x": x.to(torch.bfloat16), **gemv.random_weight(weight, "", rng)}
        if hard:
            harden(weight, buffers, rng)
        if weight.kind != "bf16":
            buffers["arranged"] = torch.empty_like(buffers["x"])
        y = torch.empty(rows, weight.n, device=rng.device, dtype=getattr(torch, out))
        return buffers | {"y": y}

    product = gemm(weight, out, tuning)
    plain = weight.kind == "bf16"
    packed = (Launch(arrange(weight.groups, weight.k)), Launch(product, {"x": "arranged"}))
    size = 4 if out == "float32" else 2
    return Case(
        "gemm",
        shape,
        model,
        rows,
        (Launch(product),) if plain else packed,
        weight.nbytes + rows * (weight.groups * weight.k * 2 + weight.n * size),
        make,
        lambda buffers: {"y": expected(weight, buffers)},
        cold=tuple(one.name for one in weight.operands()[:2]),
        flops=2 * rows * weight.n * weight.k,
        note="" if plain else "arranging x included",
    )


def harden(weight: Weight, buffers: Buffers, rng: torch.Generator) -> None:
    """Scales of all sizes whose products float32 can hold; some columns and a token of zeros."""
    x = buffers["x"]
    x[:, :, ::7] = 0.0
    x[:, :, ::14] *= -1.0
    x[-1] = -0.0
    if weight.kind == "fp8":
        shape = buffers["scales"].shape
        scales = torch.randint(0, 220, shape, generator=rng, device=rng.device, dtype=torch.uint8)
        scales[0] %= 24  # tiny numbers among themselves
        buffers["scales"] = scales
    elif weight.kind == "nvfp4":
        buffers["scales"][..., ::3] = 0x7E  # 448
        buffers["scales"][..., 1::3] &= 0x01  # 2^-9 or 0
        buffers["global_scale"].fill_(2.0**100)


def expected(weight: Weight, buffers: Buffers) -> Expected:
    """The correctly rounded product, and how far the kernel's may be from it.

    One chain of sums in float32 (`blocked`), then the global scale. FP8 values below 2^-126 lose at
    most 2^-134 each when they become bfloat16. A bfloat16 result is rounded once more, by half a
    unit of 8 bits: 2^-8 of its magnitude, or 2^-134 where it is subnormal.
    """
    x = buffers["x"].to(torch.float64)
    factor = torch.ones((), dtype=torch.float64, device=x.device)
    if weight.kind == "nvfp4":
        factor = buffers["global_scale"].to(torch.float64)
        buffers = buffers | {"global_scale": torch.ones_like(buffers["global_scale"])}
    matrix, per_group = gemv.matrix_of(weight, buffers, ""), weight.n // weight.groups
    sums = []
    for start in range(0, weight.n, per := min(per_group, ROWS_AT_ONCE)):
        rows = dequantize_rows(matrix, start, min(start + per, weight.n)).to(torch.float64)
        sums.append(blocked(x[:, start // per_group], rows))
    value, tolerance = (torch.cat(parts, 1) * factor for parts in zip(*sums, strict=True))
    tolerance += value.abs() * 2.0**-23
    if weight.kind == "fp8":
        lost = x.abs().sum(-1) * 2.0**-134
        tolerance = tolerance + lost.repeat_interleave(weight.n // weight.groups, 1)
    tolerance = tolerance + weight.k * 2.0**-148  # subnormal sums
    if buffers["y"].dtype is torch.bfloat16:
        tolerance = tolerance + (value.abs() + tolerance) * 2.0**-8 + 2.0**-134
    return Expected(value, tolerance)
