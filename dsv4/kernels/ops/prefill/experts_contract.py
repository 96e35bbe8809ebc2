"""The routed experts of a layer for a chunk of a prompt, on their NVFP4 records.

    h = silu(min(g, limit)) · clamp(u, -limit, limit) · routing weight,   g, u = w13 x
    y = sum over a token's experts, in ascending order, of bfloat16(w2 bfloat16(h))

Reference: `dsv4.kernels.reference.moe`. Five launches: the list of each expert's tokens; the
activations in the order of columns that packed weights are multiplied in; w13; w2; the sum. What
they hand on has room for at least all of T tokens' k choices. A choice that is not from 0 to E - 1
is an expert that is not here, and chooses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.numeric.operands import SLABS
from dsv4.kernels.core.contract import Buffers, Case, Launch
from dsv4.kernels.core.signature import Argument, Kernel, Role, kernel
from dsv4.kernels.ops.experts.contract import MAX_ROWS, Shape, random_records
from dsv4.kernels.ops.experts.reference import record_parts
from dsv4.kernels.ops.prefill.experts_reference import expected
from dsv4.kernels.ops.prefill.gemm_contract import CTAS, MODULE, RAGGED, arrange

FEW = {"warpgroups": 4, "m_each": 1, "n_tile": 64, "runs": 2, "stages": 6, "narrow": 4}
MANY = {"warpgroups": 2, "m_each": 2, "n_tile": 128, "runs": 2, "stages": 4}
"""How the work is cut: a tile of 256 rows of a weight by 64 tokens of an expert, or by 128."""

Routing = Callable[[torch.Generator, int, Shape], Tensor]


def choices(name: str, dtype: torch.dtype, role: Role = "in", *width: int) -> Argument:
    """Something for each choice of each token, in the order of the list or of tokens."""
    return Argument(name, dtype, ("choices", *width), role)


def offsets(shape: Shape, role: Role = "in") -> Argument:
    """Where an expert's part of the list begins."""
    return Argument("offsets", torch.int32, (shape.experts + 1,), role)


def route(shape: Shape) -> Kernel:
    """topk_idx, topk_weights `[T, k]` -> entries, targets, weights, offsets `[E + 1]`."""
    return kernel(
        "experts_route",
        f"{MODULE}.permute:Route",
        {"experts": shape.experts, "top_k": shape.top_k},
        (
            Argument("topk_idx", torch.int32, ("rows", shape.top_k)),
            Argument("topk_weights", torch.float32, ("rows", shape.top_k)),
            choices("entries", torch.int32, "out"),
            choices("targets", torch.int32, "out"),
            choices("weights", torch.float32, "out"),
            offsets(shape, "out"),
        ),
    )


def up(shape: Shape, tuning: Mapping[str, int] | None = None) -> Kernel:
    """x arranged `[T, 1, D]`, the list, w13 -> h bfloat16 `[choices, I]` in the list's order."""
    return kernel(
        "experts_up",
        f"{MODULE}.expert_gemm:ExpertsUp",
        {**_sizes(shape), "limit": shape.limit, "ctas": CTAS, **(tuning or FEW)},
        (
            Argument("x", torch.bfloat16, ("rows", 1, shape.hidden)),
            choices("entries", torch.int32),
            offsets(shape),
            choices("weights", torch.float32),
            *shape.placed(),
            shape.global_scale("13"),
            choices("h", torch.bfloat16, "out", shape.inter),
        ),
    )


def down(shape: Shape, tuning: Mapping[str, int] | None = None) -> Kernel:
    """h, the list, w2 -> partial bfloat16 `[choices, D]`, by token, its experts ascending."""
    return kernel(
        "experts_down",
        f"{MODULE}.expert_gemm:ExpertsDown",
        {**_sizes(shape), "slabs": SLABS, "ctas": CTAS, **(tuning or FEW)},
        (
            choices("h", torch.bfloat16, "in", shape.inter),
            choices("targets", torch.int32),
            offsets(shape),
            *shape.placed(),
            shape.global_scale("2"),
            choices("partial", torch.bfloat16, "out", shape.hidden),
        ),
    )


def _sizes(shape: Shape) -> dict[str, int]:
    return {
        "experts": shape.experts,
        "hidden": shape.hidden,
        "inter": shape.inter,
        "top_k": shape.top_k,
    }


def combine(shape: Shape, out: str) -> Kernel:
    """partial, topk_idx -> y `[T, D]`, float32 or bfloat16."""
    return kernel(
        "experts_combine",
        f"{MODULE}.permute:Combine",
        {"experts": shape.experts, "hidden": shape.hidden, "top_k": shape.top_k, "out": out},
        (
            choices("partial", torch.bfloat16, "in", shape.hidden),
            Argument("topk_idx", torch.int32, ("rows", shape.top_k)),
            Argument("y", getattr(torch, out), ("rows", shape.hidden), "out"),
        ),
    )


def launches(
    shape: Shape, out: str = "float32", tuning: Mapping[str, int] | None = None
) -> tuple[Launch, ...]:
    """Buffers: x `[T, 1, D]`, topk_idx, topk_weights, the weights; scratch; y."""
    return (
        Launch(route(shape)),
        Launch(arrange(1, shape.hidden)),
        Launch(up(shape, tuning), {"x": "arranged"}),
        Launch(down(shape, tuning)),
        Launch(combine(shape, out)),
    )


def tuned(shape: Shape, rows: int) -> Mapping[str, int]:
    """The cut for `rows` tokens: whether the experts' tokens fit into tiles of 64 on average."""
    return FEW if rows * shape.top_k <= FEW["n_tile"] * shape.experts else MANY


def cases(config: ModelConfig, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """A layer's experts, for each number of rows above 8."""
    for count in rows:
        if count > MAX_ROWS:
            shape = Shape.of(config)
            yield case(shape, model, count, tuning=tuned(shape, count))


def checks(config: ModelConfig, model: str) -> Iterator[Case]:
    """Ragged numbers of tokens, both outputs and cuts; few experts, one for all; extreme scales."""
    shape = Shape.of(config)
    for count, out in zip(RAGGED, ("bfloat16", "float32") * 2, strict=True):
        yield case(shape, model, count, out)
    yield case(shape, model, 300, name="the last experts", routing=last_experts)
    yield case(shape, model, 130, name="one expert", routing=one_expert)
    yield case(shape, model, 300, name="some not here", routing=some_experts)
    yield case(shape, model, 300, name="hard", hard=True)
    yield case(shape, model, 300, name="the last experts, wide", routing=last_experts, tuning=MANY)
    yield case(shape, model, 300, name="hard, wide", hard=True, tuning=MANY)


def any_experts(rng: torch.Generator, rows: int, shape: Shape) -> Tensor:
    """Distinct experts for each token."""
    scores = torch.rand(rows, shape.experts, generator=rng, device=rng.device)
    return scores.topk(shape.top_k, 1).indices.to(torch.int32)


def last_experts(rng: torch.Generator, rows: int, shape: Shape) -> Tensor:
    """The same for all tokens, the last one among them."""
    last = torch.arange(shape.experts - 1, shape.experts - 1 - shape.top_k, -1, device=rng.device)
    return last.to(torch.int32).repeat(rows, 1)


def some_experts(rng: torch.Generator, rows: int, shape: Shape) -> Tensor:
    """Half of them are not here; the second token has none."""
    chosen = any_experts(rng, rows, shape)
    draw = torch.rand(chosen.shape, generator=rng, device=rng.device)
    chosen[draw < 0.25] = -1
    chosen[draw > 0.75] = shape.experts
    chosen[1:2] = -1
    return chosen


def one_expert(rng: torch.Generator, rows: int, shape: Shape) -> Tensor:
    """One expert, every time."""
    return torch.full((rows, shape.top_k), shape.experts // 2, dtype=torch.int32, device=rng.device)


def case(
    shape: Shape,
    model: str,
    rows: int,
    out: str = "float32",
    *,
    name: str = "routed",
    routing: Routing = any_experts,
    hard: bool = False,
    tuning: Mapping[str, int] | None = None,
) -> Case:
    """`rows` tokens through one layer's experts. hard: extreme scales, clamped sums, zeros."""
    used = min(shape.experts, rows * shape.top_k)
    activations = rows * shape.hidden * (2 + (4 if out == "float32" else 2))
    return Case(
        "experts_prefill",
        name,
        model,
        rows,
        launches(shape, out, tuning),
        used * shape.expert_nbytes + activations,
        lambda rng: _make(rng, shape, rows, routing, out, hard),
        lambda buffers: {"y": expected(shape, buffers)},
        cold=("records",),
        flops=2 * rows * shape.top_k * shape.hidden * shape.inter * 3,
        note="routing, arranging and the sum included",
    )


def _make(
    rng: torch.Generator, shape: Shape, rows: int, routing: Routing, out: str, hard: bool
) -> Buffers:
    device, choices_ = rng.device, rows * shape.top_k

    placed = random_records(shape, rng, (0, 0x7F))

    def scratch(*width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(choices_, *width, dtype=dtype, device=device)

    x = torch.randn(rows, 1, shape.hidden, generator=rng, device=device).to(torch.bfloat16)
    # About 1 for gate and up, as sums of random codes and scales.
    spread = 1 + torch.rand(shape.experts, 3, generator=rng, device=device)
    buffers = {
        "x": x,
        "topk_idx": routing(rng, rows, shape),
        "topk_weights": torch.rand(rows, shape.top_k, generator=rng, device=device),
        **{name: placed[name] for name in ("places", "records")},
        "global_scale13": (spread[:, :2] * 2.0**-14).contiguous(),
        "global_scale2": (spread[:, 2:] * 2.0**-14).contiguous(),
        "arranged": torch.empty_like(x),
        "entries": scratch(dtype=torch.int32),
        "targets": scratch(dtype=torch.int32),
        "weights": scratch(dtype=torch.float32),
        "offsets": torch.empty(shape.experts + 1, dtype=torch.int32, device=device),
        "h": scratch(shape.inter),
        "partial": scratch(shape.hidden),
        "y": torch.empty(rows, shape.hidden, dtype=getattr(torch, out), device=device),
    }
    if hard:
        _harden(shape, buffers)
    return buffers


def _harden(shape: Shape, buffers: Buffers) -> None:
    """Gate and up far beyond the clamps or tiny, weights of 0, zeros of both signs."""
    x = buffers["x"]
    x[:, :, ::7] = 0.0
    x[:, :, ::14] *= -1.0
    x[-1] = -0.0
    buffers["topk_weights"][::3, ::2] = 0.0
    buffers["topk_weights"][1::3, ::2] = -0.0
    for name in ("13", "2"):
        scales = record_parts(shape.record, buffers["records"], name)[1]
        scales[..., ::3] = 0x7E  # 448
        scales[..., 1::3] &= 0x01  # 2^-9 or 0
    buffers["global_scale13"][::2] *= 2.0**10
    buffers["global_scale13"][1::4] *= 2.0**-40
    buffers["global_scale2"][::3] *= 2.0**60
