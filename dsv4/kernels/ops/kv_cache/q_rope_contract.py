"""Query heads before attention: normed without a weight, rotated, rounded to bfloat16.

References: `dsv4.kernels.reference.norm.head_norm` and `rope.apply_rope`. The kernel sums squares
in FP64 and its products are float32's own: its result is the reference's bit for bit, but for the
rare root that `ranges.ROOT_ERROR` leaves between two float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.core import error_intervals
from dsv4.kernels.core.contract import Buffers, Case, Expected, Launch
from dsv4.kernels.core.error_intervals import Range
from dsv4.kernels.core.signature import Argument, Kernel, kernel
from dsv4.kernels.reference.rope import inverse_frequencies, rope_table

IMPLEMENTATION = "dsv4.kernels.ops.kv_cache.q_rope:QRope"


def q_rope(
    config: ModelConfig, inputs: str = "float32", warps: int = 2, pdl: bool = True
) -> Kernel:
    """The kernel of a model's heads. inputs: dtype of `q`.

    Arguments: position int32 `[T]`; cos, sin float32 `[P, rope / 2]`; q `[T, H · head_dim]`;
    out bfloat16 `[T, H, head_dim]`.
    """
    heads, width, rope = config.num_attention_heads, config.head_dim, config.qk_rope_head_dim
    return kernel(
        "q_rope",
        IMPLEMENTATION,
        {
            "heads": heads,
            "width": width,
            "rope": rope,
            "inputs": inputs,
            "eps": config.rms_norm_eps,
            "warps": warps,
            "pdl": pdl,
        },
        (
            Argument("position", torch.int32, ("rows",), align=4),
            Argument("cos", torch.float32, ("positions", rope // 2)),
            Argument("sin", torch.float32, ("positions", rope // 2)),
            Argument("q", getattr(torch, inputs), ("rows", heads * width)),
            Argument("out", torch.bfloat16, ("rows", heads, width), "out"),
        ),
    )


def cases(config: ModelConfig, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """All heads of a layer."""
    for count in rows:
        yield case(config, "heads", model, range(8192 - count, 8192))


def checks(config: ModelConfig, model: str) -> Iterator[Case]:
    """Prefill, first and late positions, both input types, extreme magnitudes."""
    yield case(config, "prefill", model, range(512))
    for inputs in ("float32", "bfloat16"):
        for name, scale in {"": 1.0, " zeros": 0.0, " tiny": 1e-7, " huge": 1e6}.items():
            yield case(config, f"{inputs}{name}", model, (0, 1, 2, 70000), scale, inputs)


def case(
    config: ModelConfig,
    shape: str,
    model: str,
    positions: Sequence[int],
    scale: float = 1.0,
    inputs: str = "float32",
) -> Case:
    """Rows at `positions`. scale: of the projection's results."""
    heads, width, rope = config.num_attention_heads, config.head_dim, config.qk_rope_head_dim
    rows = len(positions)

    def make(rng: torch.Generator) -> Buffers:
        device = rng.device
        q = scale * torch.randn(rows, heads * width, generator=rng, device=device)
        frequencies = inverse_frequencies(rope, config.compress_rope_theta, config.yarn)
        cos, sin = rope_table(frequencies, torch.arange(max(positions) + 1, device=device))
        return {
            "position": torch.tensor(list(positions), dtype=torch.int32, device=device),
            "cos": cos,
            "sin": sin,
            "q": q.to(getattr(torch, inputs)),
            "out": torch.empty(rows, heads, width, dtype=torch.bfloat16, device=device),
        }

    def expect(buffers: Buffers) -> dict[str, Expected]:
        heads_ = Range.exactly(buffers["q"].view(rows, heads, width))
        position = buffers["position"].to(torch.int64)
        normed = error_intervals.normed(heads_, None, config.rms_norm_eps)
        turned = error_intervals.rotated(normed, buffers["cos"][position], buffers["sin"][position])
        return {"out": error_intervals.expected(turned)}

    touched = rows * heads * width * ((4 if inputs == "float32" else 2) + 2)
    launches = (Launch(q_rope(config, inputs)),)
    return Case("q_rope", shape, model, rows, launches, touched, make, expect, note="one launch")
