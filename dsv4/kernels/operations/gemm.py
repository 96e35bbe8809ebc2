"""`y = x wᵀ` for more than 8 rows: a packed or plain weight against a chunk of a prompt.

Reference: `dsv4.kernels.reference.linear`, like `gemv`, whose weights these are. A packed weight
is multiplied in another order of columns, so the activations are arranged alike first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from dsv4.formats.config import ModelConfig
from dsv4.kernels.case import Buffers, Case, Expected, Launch
from dsv4.kernels.compiled import Argument, Kernel, kernel
from dsv4.kernels.operations import gemv
from dsv4.kernels.operations.gemv import MAX_ROWS, Weight

IMPLEMENTATION = "dsv4.kernels.sm90.gemm:Gemm"
ARCHITECTURES = ("sm_90a",)
RAGGED = (9, 33, 127, 1000)


def gemm(weight: Weight, rows: int, out: str = "bfloat16", **tuning: int) -> Kernel:
    """The kernel for one weight, cut for about `rows` rows; right for any number.

    Arguments: x bfloat16 `[M, G, K]`, arranged unless the weight is plain; codes, scales;
    global_scales float32 `[1]` (1 where the format has none); y `[M, N]`.
    """
    return kernel(
        "gemm",
        IMPLEMENTATION,
        {**weight._asdict(), "out": out, **(tuning or tuned(weight, rows))},
        (
            Argument("x", torch.bfloat16, ("rows", weight.groups, weight.k)),
            *weight.arguments(),
            Argument("global_scales", torch.float32, (1,), align=4),
            Argument("y", getattr(torch, out), ("rows", weight.n), "out"),
        ),
        ARCHITECTURES,
    )


def arrange(groups: int, k: int) -> Kernel:
    """Reorders columns for packed weights. Arguments: x, arranged bfloat16 `[M, G, K]`."""
    shape = ("rows", groups, k)
    return kernel(
        "arrange",
        "dsv4.kernels.sm90.routing:Arrange",
        {"groups": groups, "k": k},
        (
            Argument("x", torch.bfloat16, shape),
            Argument("arranged", torch.bfloat16, shape, "out"),
        ),
    )


def tuned(weight: Weight, rows: int) -> Mapping[str, int]:
    """How the work is cut: measured on an H100."""
    if weight.kind == "bf16":
        return {"warpgroups": 2, "m_each": 1, "n_tile": 128, "runs": 2, "stages": 3}
    return {"warpgroups": 2, "m_each": 1, "n_tile": 128, "runs": 2, "stages": 4}


def cases(config: ModelConfig, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """Every matrix of a model but the head, for each number of rows above 8."""
    for shape, weight in gemv.weights_of(config).items():
        for count in rows:
            if shape != "lm_head" and count > MAX_ROWS:
                yield case(weight, shape, model, count)


def checks(config: ModelConfig, model: str) -> Iterator[Case]:
    """Ragged numbers of rows, both outputs, and a slabbed NVFP4 weight."""
    weights = gemv.weights_of(config)
    for count in RAGGED:
        for shape in ("wq_a", "wo_a", "wo_b", "compressor wkv"):
            yield case(weights[shape], shape, model, count)
        hidden, inter = config.hidden_size, config.moe_intermediate_size
        yield case(Weight("nvfp4", hidden, inter, slabs=8), "nvfp4 w2", model, count, "float32")
        yield case(Weight("nvfp4", inter, hidden), "nvfp4 w1", model, count)


def launches(weight: Weight, rows: int, out: str = "bfloat16", **tuning: int) -> tuple[Launch, ...]:
    """Arrange where that is needed, then multiply; buffers x, arranged, codes, …, y."""
    product = gemm(weight, rows, out, **tuning)
    if weight.kind == "bf16":
        return (Launch(product),)
    arranged = Launch(arrange(weight.groups, weight.k))
    return arranged, Launch(product, {"x": "arranged"})


def case(
    weight: Weight, shape: str, model: str, rows: int, out: str = "bfloat16", **tuning: int
) -> Case:
    """One weight against `rows` rows."""

    def make(rng: torch.Generator) -> Buffers:
        x = torch.randn(rows, weight.groups, weight.k, generator=rng, device=rng.device)
        x = x.to(torch.bfloat16)
        scale = 2.0**-9 if weight.kind == "nvfp4" else 1.0
        return {
            "x": x,
            "arranged": torch.empty_like(x),
            **gemv.random_weight(weight, rng),
            "global_scales": torch.full((1,), scale, device=rng.device),
            "y": torch.empty(rows, weight.n, device=rng.device, dtype=getattr(torch, out)),
        }

    size = 4 if out == "float32" else 2
    return Case(
        "gemm",
        shape,
        model,
        rows,
        launches(weight, rows, out, **tuning),
        weight.nbytes + rows * (weight.groups * weight.k * 2 + weight.n * size),
        make,
        lambda buffers: {"y": expected(weight, buffers)},
        cold=("codes", "scales"),
        flops=2 * rows * weight.n * weight.k,
        note="" if weight.kind == "bf16" else "arranging x included",
    )


def expected(weight: Weight, buffers: Buffers) -> Expected:
    """The correctly rounded product, and how far the kernel's may be from it.

    As for `gemv`: a chain of K/16 products in float32. A bfloat16 result is rounded once more, by
    half a unit of 8 bits: 2^-8 of its magnitude. FP8 values below 2^-126 lose at most 2^-134 each.
    """
    value, tolerance = gemv.expected(weight, buffers)
    if weight.kind == "fp8":
        lost = buffers["x"].to(torch.float64).abs().sum(-1) * 2.0**-134
        tolerance = tolerance + lost.repeat_interleave(weight.n // weight.groups, 1)
    if buffers["y"].dtype is torch.bfloat16:
        tolerance = tolerance + (value.abs() + tolerance) * 2.0**-8
    return Expected(value, tolerance)
