"""`silu(min(g, limit)) · clamp(u, -limit, limit)`: the shared expert's gate, for many rows.

Reference: `dsv4.kernels.ops.experts.reference.activated`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.core.bounds import rounded_range
from dsv4.kernels.core.contract import Buffers, Case, Expected, Launch
from dsv4.kernels.core.signature import Argument, Kernel, kernel
from dsv4.kernels.ops.experts.reference import activated
from dsv4.kernels.ops.gemv.contract import MAX_ROWS
from dsv4.kernels.ops.prefill.gemm_contract import MODULE

RAGGED = (1, 17, 300)
FLUSHED = 2.0**-119  # of silu, where its reciprocal is below 2^-126


def swiglu(config: ModelConfig) -> Kernel:
    """gate, up float32 `[T, I]` -> h bfloat16 `[T, I]`, I of one expert."""
    inter = config.moe_intermediate_size
    return kernel(
        "swiglu",
        f"{MODULE}.swiglu:Swiglu",
        {"inter": inter, "limit": config.swiglu_limit},
        (
            Argument("gate", torch.float32, ("rows", inter)),
            Argument("up", torch.float32, ("rows", inter)),
            Argument("h", torch.bfloat16, ("rows", inter), "out"),
        ),
    )


def cases(config: ModelConfig, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """The shared expert's, for each number of rows above 8."""
    for count in rows:
        if count > MAX_ROWS:
            yield case(config, model, count, 4.0)


def checks(config: ModelConfig, model: str) -> Iterator[Case]:
    """Ragged numbers of rows; sums far beyond the limit, zeros of both signs."""
    for count in RAGGED:
        yield case(config, model, count, 4.0)
    yield case(config, model, 9, 300.0)


def case(config: ModelConfig, model: str, rows: int, size: float) -> Case:
    """size: deviation of the sums."""
    inter = config.moe_intermediate_size

    def make(rng: torch.Generator) -> Buffers:
        shape = (2, rows, inter)
        sums = torch.randn(shape, generator=rng, device=rng.device) * size
        sums[:, :, ::5] = 0.0
        sums[:, :, ::10] *= -1.0
        h = torch.empty(rows, inter, device=rng.device, dtype=torch.bfloat16)
        return {"gate": sums[0].contiguous(), "up": sums[1].contiguous(), "h": h}

    def expect(buffers: Buffers) -> dict[str, Expected]:
        return {"h": expected(config, buffers)}

    name = "shared expert" if size < 100 else "far beyond the limit"
    launches = (Launch(swiglu(config)),)
    nbytes = rows * inter * 10
    return Case("swiglu", name, model, rows, launches, nbytes, make, expect, ("gate", "up"))


def expected(config: ModelConfig, buffers: Buffers) -> Expected:
    """The exact value rounded, and how far what float32 makes of it may be; see `activated`."""
    gate, up = (buffers[name].to(torch.float64) for name in ("gate", "up"))
    none = torch.zeros_like(gate)
    value, error = activated((gate, none), (up, none), config.swiglu_limit)
    largest = up.abs().clamp(max=config.swiglu_limit) if config.swiglu_limit else up.abs()
    middle, spread = rounded_range(value, error + FLUSHED * largest)
    return Expected(middle, spread + 2.0**-133)
