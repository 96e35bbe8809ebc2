"""The routed experts of a layer for a chunk of a prompt, on the stacked NVFP4 weights.

    h = silu(min(g, limit)) · clamp(u, -limit, limit) · routing weight,   g, u = w13 x
    y = sum over a token's experts, in ascending order, of bfloat16(w2 bfloat16(h))

Reference: `dsv4.kernels.reference.moe`. Five launches: the list of each expert's tokens; the
activations in the order of columns that packed weights are multiplied in; w13; w2; the sum. What
they hand on has room for at least all of T tokens' k choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv4.formats.config import ModelConfig
from dsv4.formats.layouts import dequantize
from dsv4.formats.matrices import NVFP4_K_ALIGN, SF_ROWS, SF_TILE_BYTES, Nvfp4Matrix
from dsv4.kernels.case import Buffers, Case, Expected, Launch
from dsv4.kernels.compiled import Argument, Kernel, Role, kernel
from dsv4.kernels.operations.gemm import MODULE, RAGGED, arrange
from dsv4.kernels.operations.gemv import MAX_ROWS
from dsv4.kernels.reference.moe import split_gate_up, swiglu

ARCHITECTURES = ("sm_90a",)
SLABS = 8
INTERLEAVE = 8
TUNED = {"ctas": 132, "warpgroups": 4, "m_each": 1, "n_tile": 64, "runs": 2, "stages": 6}
"""How the work is cut: a tile of 256 rows of a weight by 64 tokens, 128 columns in a stage."""

Routing = Callable[[torch.Generator, int, "Experts"], Tensor]


class Experts(NamedTuple):
    """The experts of one layer: E of D -> 2 I -> D, top_k a token, gate and up clamped by limit."""

    experts: int
    hidden: int
    inter: int
    top_k: int
    limit: float

    def w13(self) -> tuple[Argument, ...]:
        """Gate and up rows, interleaved by 8."""
        e, d, i = self.experts, self.hidden, self.inter
        tiles = (2 * i // SF_ROWS, d // NVFP4_K_ALIGN, SF_TILE_BYTES)
        return (
            Argument("w13_codes", torch.uint8, (e, 2 * i, d // 2)),
            Argument("w13_scales", torch.uint8, (e, *tiles)),
            Argument("w13_global_scale", torch.float32, (e, 2), align=4),
        )

    def w2(self) -> tuple[Argument, ...]:
        """Down projection, in slabs of columns."""
        e, d, i = self.experts, self.hidden, self.inter // SLABS
        tiles = (SLABS, d // SF_ROWS, i // NVFP4_K_ALIGN, SF_TILE_BYTES)
        return (
            Argument("w2_codes", torch.uint8, (e, SLABS, d, i // 2)),
            Argument("w2_scales", torch.uint8, (e, *tiles)),
            Argument("w2_global_scale", torch.float32, (e, 1), align=4),
        )

    def offsets(self, role: Role = "in") -> Argument:
        """Where an expert's part of the list begins."""
        return Argument("offsets", torch.int32, (self.experts + 1,), role)


def choices(name: str, dtype: torch.dtype, role: Role = "in", *width: int) -> Argument:
    """Something for each choice of each token, in the order of the list or of tokens."""
    return Argument(name, dtype, ("choices", *width), role)


def experts_of(config: ModelConfig) -> Experts:
    """Of a layer of the model."""
    return Experts(
        config.n_routed_experts,
        config.hidden_size,
        config.moe_intermediate_size,
        config.num_experts_per_tok,
        config.swiglu_limit,
    )


def route(e: Experts) -> Kernel:
    """topk_idx (below E), topk_weights `[T, k]` -> entries, places, weights, offsets `[E + 1]`."""
    return kernel(
        "experts_route",
        f"{MODULE}.routing:Route",
        {"experts": e.experts, "top_k": e.top_k},
        (
            Argument("topk_idx", torch.int32, ("rows", e.top_k)),
            Argument("topk_weights", torch.float32, ("rows", e.top_k)),
            choices("entries", torch.int32, "out"),
            choices("places", torch.int32, "out"),
            choices("weights", torch.float32, "out"),
            e.offsets("out"),
        ),
    )


def up(e: Experts, tuning: Mapping[str, int] | None = None) -> Kernel:
    """x arranged `[T, 1, D]`, the list, w13 -> h bfloat16 `[choices, I]` in the list's order."""
    return kernel(
        "experts_up",
        f"{MODULE}.expert_gemm:ExpertsUp",
        {**e._asdict(), **(tuning or TUNED)},
        (
            Argument("x", torch.bfloat16, ("rows", 1, e.hidden)),
            choices("entries", torch.int32),
            e.offsets(),
            choices("weights", torch.float32),
            *e.w13(),
            choices("h", torch.bfloat16, "out", e.inter),
        ),
        ARCHITECTURES,
    )


def down(e: Experts, tuning: Mapping[str, int] | None = None) -> Kernel:
    """h, the list, w2 -> partial bfloat16 `[choices, D]`, by token, its experts ascending."""
    config = {**e._asdict(), "slabs": SLABS, **(tuning or TUNED)}
    del config["limit"]
    return kernel(
        "experts_down",
        f"{MODULE}.expert_gemm:ExpertsDown",
        config,
        (
            choices("h", torch.bfloat16, "in", e.inter),
            choices("places", torch.int32),
            e.offsets(),
            *e.w2(),
            choices("partial", torch.bfloat16, "out", e.hidden),
        ),
        ARCHITECTURES,
    )


def combine(e: Experts, out: str) -> Kernel:
    """partial -> y `[T, D]`, float32 or bfloat16."""
    return kernel(
        "experts_combine",
        f"{MODULE}.routing:Combine",
        {"hidden": e.hidden, "top_k": e.top_k, "out": out},
        (
            choices("partial", torch.bfloat16, "in", e.hidden),
            Argument("y", getattr(torch, out), ("rows", e.hidden), "out"),
        ),
    )


def launches(
    e: Experts, out: str = "float32", tuning: Mapping[str, int] | None = None
) -> tuple[Launch, ...]:
    """Buffers: x `[T, 1, D]`, topk_idx, topk_weights, the weights; scratch; y."""
    return (
        Launch(route(e)),
        Launch(arrange(1, e.hidden)),
        Launch(up(e, tuning), {"x": "arranged"}),
        Launch(down(e, tuning)),
        Launch(combine(e, out)),
    )


def cases(config: ModelConfig, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """A layer's experts, for each number of rows above 8."""
    for count in rows:
        if count > MAX_ROWS:
            yield case(experts_of(config), "experts", model, count)


def checks(config: ModelConfig, model: str) -> Iterator[Case]:
    """Ragged numbers of tokens, both outputs; few experts or one for all; extreme scales."""
    e = experts_of(config)
    for count, out in zip(RAGGED, ("bfloat16", "float32") * 2, strict=True):
        yield case(e, "experts", model, count, out)
    yield case(e, "experts, the last ones", model, 300, routing=last_experts)
    yield case(e, "experts, one for all", model, 130, routing=one_expert)
    yield case(e, "experts hard", model, 300, hard=True)


def any_experts(rng: torch.Generator, rows: int, e: Experts) -> Tensor:
    """Distinct experts for each token."""
    scores = torch.rand(rows, e.experts, generator=rng, device=rng.device)
    return scores.topk(e.top_k, 1).indices.to(torch.int32)


def last_experts(rng: torch.Generator, rows: int, e: Experts) -> Tensor:
    """The same for all tokens, the last one among them."""
    last = torch.arange(e.experts - 1, e.experts - 1 - e.top_k, -1, device=rng.device)
    return last.to(torch.int32).repeat(rows, 1)


def one_expert(rng: torch.Generator, rows: int, e: Experts) -> Tensor:
    """One expert, every time."""
    return torch.full((rows, e.top_k), e.experts // 2, dtype=torch.int32, device=rng.device)


def case(
    e: Experts,
    shape: str,
    model: str,
    rows: int,
    out: str = "float32",
    *,
    routing: Routing = any_experts,
    hard: bool = False,
    tuning: Mapping[str, int] | None = None,
) -> Case:
    """`rows` tokens through one layer's experts. hard: extreme scales, clamped sums, zeros."""
    used = min(e.experts, rows * e.top_k)
    weights = used * e.hidden * e.inter * 3 * 9 // 16
    activations = rows * e.hidden * (2 + (4 if out == "float32" else 2))
    return Case(
        "experts_prefill",
        shape,
        model,
        rows,
        launches(e, out, tuning),
        weights + activations,
        lambda rng: _make(rng, e, rows, routing, out, hard),
        lambda buffers: {"y": expected(e, buffers)},
        cold=tuple(argument.name for argument in (*e.w13(), *e.w2())),
        flops=2 * rows * e.top_k * e.hidden * e.inter * 3,
        note="routing, arranging and the sum included",
    )


def _make(
    rng: torch.Generator, e: Experts, rows: int, routing: Routing, out: str, hard: bool
) -> Buffers:
    device, slots = rng.device, (rows, e.top_k)

    def some(argument: Argument) -> Tensor:
        high = 256 if argument.name.endswith("codes") else 0x7F
        shape: Any = argument.shape
        return torch.randint(0, high, shape, generator=rng, device=device, dtype=torch.uint8)

    def scratch(*width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(rows * e.top_k, *width, dtype=dtype, device=device)

    x = torch.randn(rows, 1, e.hidden, generator=rng, device=device).to(torch.bfloat16)
    # About 1 for gate and up, as sums of random codes and scales.
    spread = 1 + torch.rand(e.experts, 3, generator=rng, device=device)
    buffers = {
        "x": x,
        "topk_idx": routing(rng, rows, e),
        "topk_weights": torch.rand(slots, generator=rng, device=device),
        **{a.name: some(a) for a in (*e.w13(), *e.w2()) if a.dtype is torch.uint8},
        "w13_global_scale": (spread[:, :2] * 2.0**-14).contiguous(),
        "w2_global_scale": (spread[:, 2:] * 2.0**-14).contiguous(),
        "arranged": torch.empty_like(x),
        "entries": scratch(dtype=torch.int32),
        "places": scratch(dtype=torch.int32),
        "weights": scratch(dtype=torch.float32),
        "offsets": torch.empty(e.experts + 1, dtype=torch.int32, device=device),
        "h": scratch(e.inter),
        "partial": scratch(e.hidden),
        "y": torch.empty(rows, e.hidden, dtype=getattr(torch, out), device=device),
    }
    if hard:
        _harden(buffers)
    return buffers


def _harden(buffers: Buffers) -> None:
    """Gate and up far beyond the clamps or tiny, weights of 0, zeros of both signs."""
    x = buffers["x"]
    x[:, :, ::7] = 0.0
    x[:, :, ::14] *= -1.0
    x[-1] = -0.0
    buffers["topk_weights"][::3, ::2] = 0.0
    for name in ("w13", "w2"):
        buffers[f"{name}_scales"][..., ::3] = 0x7E  # 448
        buffers[f"{name}_scales"][..., 1::3] &= 0x01  # 2^-9 or 0
    buffers["w13_global_scale"][::2] *= 2.0**10
    buffers["w13_global_scale"][1::4] *= 2.0**-40
    buffers["w2_global_scale"][::3] *= 2.0**60


def expected(e: Experts, buffers: Buffers) -> Expected:
    """The reference's sum before its roundings of y, and how far the kernel's may be from it.

    gate and up: chains of D/16 products in float32, as for `gemv`: |error| <= 2 (D/16 + 16) 2^-23
    Σ|x w|. They move h by at most weight (1.1 |u| δg + |silu(g)| δu) (1.1 bounds silu's slope, the
    clamps move nothing further apart), and float32 arithmetic on the way by 2^-19 |h|: exp2 and
    reciprocal have errors of 2^-22, exp2's argument one of 2^-24 of itself, hence 2^-22 |g h|
    more; a reciprocal below 2^-126 may be 0, and |g| is then below 128. Only where rounding to
    bfloat16 can then go another way do the two h differ, by what it is there. w2 carries that on
    and adds its own I/16 products, then half a unit of bfloat16, 2^-8, on each expert's row; the
    sum's k roundings are of float32.
    """
    x, idx = buffers["x"][:, 0].to(torch.float64), buffers["topk_idx"].to(torch.int64)
    value = torch.zeros_like(x)
    bound = torch.zeros_like(x)
    for expert in idx.unique().tolist():
        tokens, choices = (idx == expert).nonzero(as_tuple=True)
        weight = buffers["topk_weights"][tokens, choices].to(torch.float64)[:, None]
        h, moved = _activation(e, buffers, expert, x[tokens], weight)
        w2 = _w2(e, buffers, expert)
        part, magnitude = h @ w2.T, h.abs() @ w2.abs().T
        error = moved @ w2.abs().T
        error += (magnitude + error) * (2.0 * (e.inter / 16 + 16) * 2.0**-23)
        value.index_add_(0, tokens, part)
        bound.index_add_(0, tokens, error + (part.abs() + error) * (2.0**-8 + e.top_k * 2.0**-24))
    if buffers["y"].dtype is torch.bfloat16:
        bound = bound + (value.abs() + bound) * 2.0**-8
    return Expected(value, bound)


def _activation(
    e: Experts, buffers: Buffers, expert: int, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """-> (the reference's h, how far another may be), float64 `[t, I]`."""
    w13 = _w13(e, buffers, expert)
    unit = 2.0 * (e.hidden / 16 + 16) * 2.0**-23
    gate, up = split_gate_up(x @ w13.T, INTERLEAVE)
    gate_error, up_error = split_gate_up(x.abs() @ w13.abs().T * unit, INTERLEAVE)
    exact = swiglu(gate, up, e.limit).to(torch.float64) * weight
    u, g = up.clamp(-e.limit, e.limit), gate.clamp(max=e.limit)
    silu = g * torch.sigmoid(g)
    error = weight * (1.1 * (u.abs() + up_error) * gate_error + silu.abs() * up_error)
    error += exact.abs() * (2.0**-19 + g.abs() * 2.0**-22) + weight * u.abs() * 2.0**-119
    h, low, high = (
        v.to(torch.float32).to(torch.bfloat16).to(torch.float64)
        for v in (exact, exact - error, exact + error)
    )
    return h, torch.maximum(high - h, h - low)


def _w13(e: Experts, buffers: Buffers, expert: int) -> Tensor:
    matrix = Nvfp4Matrix(
        buffers["w13_codes"][expert][None],
        buffers["w13_scales"][expert][None],
        buffers["w13_global_scale"][expert],
        2 * e.inter,
        e.hidden,
        INTERLEAVE,
    )
    return dequantize(matrix).to(torch.float64)


def _w2(e: Experts, buffers: Buffers, expert: int) -> Tensor:
    matrix = Nvfp4Matrix(
        buffers["w2_codes"][expert],
        buffers["w2_scales"][expert],
        buffers["w2_global_scale"][expert],
        e.hidden,
        e.inter,
    )
    return dequantize(matrix).to(torch.float64)
