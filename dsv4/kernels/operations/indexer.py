"""The Lightning indexer of a CSA layer: which compressed entries each token attends to.

Two launches: the scores of all visible keys, with the queries rotated, spread (Hadamard) and
rounded to E2M1 on the way; then the best `index_topk` of them. References:
`dsv4.kernels.reference.{rope,indexer,quant_sim}`, with the official rounding. Formula:
DeepSeek-V4's `inference/model.py`.

How far scores may be from the reference's: a product of E2M1 values and their scales is exact, a
dot product is a chain of 8 MMAs that may each drop two units of the running sum's last place, its
product with a weight and the sum over 64 heads round up to 12 times (8 sums in a lane, 3 over
lanes, the product): |error| <= 2^-23 Σ_h |w_h| (2·8 Σ_d |q_d k_d| + 12/2 relu). Where an element of
the query may round to another E2M1 value (see `ranges`), the difference times the key is added.
Where sums fit in 24 bits, scores are exact, hence the choice as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dsv4.formats.codecs import e2m1_decode, e8m0_decode, unpack_nibbles
from dsv4.formats.config import ModelConfig
from dsv4.kernels.case import Buffers, Case, Expected, Launch
from dsv4.kernels.compiled import Argument, Kernel, Role, kernel
from dsv4.kernels.operations import ranges
from dsv4.kernels.operations.ranges import Range
from dsv4.kernels.reference.indexer import top_blocks
from dsv4.kernels.reference.rope import inverse_frequencies, rope_table

SCORES = "dsv4.kernels.sm90.indexer.scores:IndexScores"
TOPK = "dsv4.kernels.sm90.indexer.topk:IndexTopk"
BLOCK = 32  # channels per scale
TURN = 2048  # scores that a CTA of the choice takes at a time
PART = 32768  # and at most


def index_scores(config: ModelConfig, ctas: int = 132, stages: int = 3, pdl: bool = True) -> Kernel:
    """The kernel of scores. ctas: that rows and keys are shared among, the device's.

    Arguments: position, slot int32 `[T]`; cos, sin float32 `[P, rope / 2]`; q float32
    `[T, heads · 128]` and weights float32 `[T, heads]`, both as projected; keys uint8
    `[S, capacity, 64]`, key_scales uint8 `[S, capacity, 4]`; scores float32 `[T, capacity]`, of
    which only those of visible keys are written, where there are more than `index_topk`.
    """
    c = config
    heads, width, rope = c.index_n_heads, c.index_head_dim, c.qk_rope_head_dim
    return kernel(
        "indexer",
        SCORES,
        {
            "heads": heads,
            "width": width,
            "rope": rope,
            "ratio": c.csa_ratio,
            "topk": c.index_topk,
            "ctas": ctas,
            "stages": stages,
            "pdl": pdl,
        },
        (
            Argument("position", torch.int32, ("rows",), align=4),
            Argument("slot", torch.int32, ("rows",), align=4),
            Argument("cos", torch.float32, ("positions", rope // 2)),
            Argument("sin", torch.float32, ("positions", rope // 2)),
            Argument("q", torch.float32, ("rows", heads * width)),
            Argument("weights", torch.float32, ("rows", heads)),
            Argument("keys", torch.uint8, ("slots", "capacity", width // 2)),
            Argument("key_scales", torch.uint8, ("slots", "capacity", width // BLOCK), align=4),
            Argument("scores", torch.float32, ("rows", "capacity"), "inout"),
        ),
    )


def index_topk(config: ModelConfig, stage: str, turns: int, pdl: bool = True) -> Kernel:
    """The kernel of the choice, or of a part of it. turns: of 2048 scores that a CTA takes at most.

    Arguments: position int32 `[T]`, and in a tuple, for stage "whole": scores float32
    `[T, capacity]`, a multiple of 4; blocks int32 `[T, index_topk]`: ascending, -1 where a row
    sees fewer. For "parts": scores; part_scores and part_blocks `[T, parts · index_topk]`, of each
    32768 scores. For "merge": those two; blocks.
    """
    topk = config.index_topk
    scores = Argument("scores", torch.float32, ("rows", "capacity"))
    role: Role = "out" if stage == "parts" else "in"
    parts = (
        Argument("part_scores", torch.float32, ("rows", "chosen"), role),
        Argument("part_blocks", torch.int32, ("rows", "chosen"), role),
    )
    blocks = Argument("blocks", torch.int32, ("rows", topk), "out")
    operands = {"whole": (scores, blocks), "parts": (scores, *parts), "merge": (*parts, blocks)}
    return kernel(
        "indexer",
        TOPK,
        {"ratio": config.csa_ratio, "topk": topk, "stage": stage, "turns": turns, "pdl": pdl},
        (Argument("position", torch.int32, ("rows",), align=4), operands[stage]),
    )


def choice(config: ModelConfig, capacity: int) -> tuple[Launch, ...]:
    """The launches that choose from up to `capacity` scores."""
    if capacity <= PART:
        return (Launch(index_topk(config, "whole", -(-capacity // TURN))),)
    chosen = -(-capacity // PART) * config.index_topk
    return (
        Launch(index_topk(config, "parts", PART // TURN)),
        Launch(index_topk(config, "merge", -(-chosen // TURN))),
    )


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a step: their positions, and the caches that each reads."""

    positions: Sequence[int]
    slots: Sequence[int]

    @classmethod
    def last(cls, context: int, count: int) -> Rows:
        """The last `count` tokens of a sequence of `context`."""
        return cls(range(context - count, context), [0] * count)


def cases(config: ModelConfig, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """At 8k and 128k tokens; values whose scores are exact."""
    for name, context in {"8k": 8192, "128k": 131072}.items():
        for count in rows:
            places = Rows.last(context, count)
            yield case(config, name, model, places, context // config.csa_ratio, coarse)


def checks(config: ModelConfig, model: str) -> Iterator[Case]:
    """Few keys, ties, several sequences, wide values, prefill, a million tokens."""
    edge = config.index_topk * config.csa_ratio  # where the choice begins
    few = Rows((0, 1, 3, 7, edge - 5, edge - 1, edge + 2, edge + 3), [0] * 8)
    mixed = Rows((edge + 40, -1, 9000, 9001, 12287, 5), (2, 0, 1, 1, 3, 0))
    for name, places, capacity, values in (
        ("few", few, edge // 4 + 4, coarse),
        ("sequences", mixed, 3072, coarse),
        ("ties", Rows.last(20000, 3), 5000, equal),
        ("zeros", Rows.last(9000, 2), 2252, zeros),
        ("32k", Rows.last(32768, 1), 8192, coarse),
        ("few normal", few, edge // 4 + 4, normal),
        ("sequences normal", mixed, 3072, normal),
        ("wide", Rows.last(9000, 4), 2252, wide),
        ("prefill", Rows.last(9216, 512), 2304, coarse),
        ("1M", Rows.last(1 << 20, 1), 1 << 18, coarse),
        ("1M ties", Rows.last((1 << 20) - 3, 1), 1 << 18, equal),
    ):
        yield case(config, name, model, places, capacity, values)


Values = Callable[[ModelConfig, "Rows", int, torch.Generator], Buffers]
"""(config, rows, capacity, generator) -> q, weights, keys, key_scales, perhaps cos, sin."""


def case(
    config: ModelConfig, shape: str, model: str, places: Rows, capacity: int, values: Values
) -> Case:
    """`places` against caches of `capacity` keys."""
    rows = len(places.positions)
    visible = sum((p + 1) // config.csa_ratio for p in places.positions)
    key_bytes = config.index_head_dim // 2 + config.index_head_dim // BLOCK
    chosen = (rows, -(-capacity // PART) * config.index_topk)
    seen = max((p + 1) // config.csa_ratio for p in places.positions)

    def make(rng: torch.Generator) -> Buffers:
        device = rng.device
        buffers = values(config, places, capacity, rng)
        length = max(places.positions) + 1
        if "cos" not in buffers:
            frequencies = inverse_frequencies(
                config.qk_rope_head_dim, config.compress_rope_theta, config.yarn
            )
            cos, sin = rope_table(frequencies, torch.arange(length, device=device))
            buffers |= {"cos": cos, "sin": sin}
        return buffers | {
            "position": torch.tensor(list(places.positions), dtype=torch.int32, device=device),
            "slot": torch.tensor(list(places.slots), dtype=torch.int32, device=device),
            "scores": torch.full((rows, capacity), -7.0, device=device),
            "blocks": torch.empty(rows, config.index_topk, dtype=torch.int32, device=device),
            "part_scores": torch.empty(chosen, device=device),
            "part_blocks": torch.empty(chosen, dtype=torch.int32, device=device),
        }

    return Case(
        "indexer",
        shape,
        model,
        rows,
        (Launch(index_scores(config)), *choice(config, capacity)),
        rows * (4 * config.index_n_heads * (config.index_head_dim + 1) + 4 * config.index_topk)
        + seen * key_bytes
        + 8 * visible,
        make,
        lambda buffers: expect(config, buffers),
        cold=("keys", "key_scales"),
        flops=2 * visible * config.index_n_heads * config.index_head_dim,
        note="scores and choice",
    )


def coarse(config: ModelConfig, rows: Rows, capacity: int, rng: torch.Generator) -> Buffers:
    """Values whose sums all fit in 24 bits, so that scores are exact; quarter turns as RoPE."""
    c, device = config, rng.device

    def some(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=rng, device=device)

    count, slots = len(rows.positions), max(rows.slots) + 1
    turn = torch.arange(max(rows.positions) + 1, device=device)[:, None]
    turn = (turn + torch.arange(c.qk_rope_head_dim // 2, device=device)) % 4
    quarters = torch.tensor([1.0, 0.0, -1.0, 0.0], device=device)
    sizes = torch.tensor([-5, -4, -2, -1, 0, 1, 2, 4, 5], device=device)  # come out as they are
    target = sizes[some(0, 9, count, c.index_n_heads)] / 256
    return {
        "q": some(-24, 25, count, c.index_n_heads * c.index_head_dim) / 8,
        "weights": (target / _weight_scale(c)).to(torch.bfloat16).to(torch.float32),
        "keys": some(0, 256, slots, capacity, c.index_head_dim // 2).to(torch.uint8),
        "key_scales": some(126, 128, slots, capacity, c.index_head_dim // BLOCK).to(torch.uint8),
        "cos": quarters[turn],
        "sin": quarters[(turn + 3) % 4],
    }


def equal(config: ModelConfig, rows: Rows, capacity: int, rng: torch.Generator) -> Buffers:
    """The same key everywhere, but for one in sixteen."""
    buffers = coarse(config, rows, capacity, rng)
    for name in ("keys", "key_scales"):
        other = torch.arange(capacity, device=rng.device) % 16 != 5
        buffers[name][:, other] = buffers[name][:, :1].clone()
    return buffers


def zeros(config: ModelConfig, rows: Rows, capacity: int, rng: torch.Generator) -> Buffers:
    """Queries of zeros: every score is 0 or -0."""
    buffers = coarse(config, rows, capacity, rng)
    return buffers | {"q": torch.zeros_like(buffers["q"])}


def normal(config: ModelConfig, rows: Rows, capacity: int, rng: torch.Generator) -> Buffers:
    """Any values, RoPE as it is."""
    buffers = coarse(config, rows, capacity, rng)
    del buffers["cos"], buffers["sin"]
    q = torch.randn(buffers["q"].shape, generator=rng, device=rng.device)
    weights = torch.randn(buffers["weights"].shape, generator=rng, device=rng.device)
    return buffers | {"q": q, "weights": weights}


def wide(config: ModelConfig, rows: Rows, capacity: int, rng: torch.Generator) -> Buffers:
    """Scales of queries and keys far apart, within a vector and between them."""
    buffers = normal(config, rows, capacity, rng)
    shape = (len(rows.positions), config.index_n_heads, config.index_head_dim // BLOCK, 1)
    spread = torch.randint(-40, 20, shape, generator=rng, device=rng.device)
    q = buffers["q"].view(*shape[:3], BLOCK) * torch.exp2(spread)
    scales = torch.randint(
        60, 150, buffers["key_scales"].shape, generator=rng, device=rng.device, dtype=torch.uint8
    )
    return buffers | {"q": q.flatten(1), "key_scales": scales}


def _weight_scale(config: ModelConfig) -> float:
    return float(config.index_head_dim**-0.5 * config.index_n_heads**-0.5)


def queries(config: ModelConfig, buffers: Buffers) -> tuple[Tensor, Tensor]:
    """E2M1 heads times their scales, float64 `[T, h, 128]`, and how far they may be off."""
    position = buffers["position"].to(torch.int64).clamp(min=0)
    heads = buffers["q"].view(-1, config.index_n_heads, config.index_head_dim)
    turned = ranges.rotated(
        Range.exactly(heads), buffers["cos"][position], buffers["sin"][position]
    ).to(torch.bfloat16)
    codes, scales = ranges.fp4_row(ranges.spread(turned))
    ends = [_values(code, scale) for code in codes for scale in scales]
    whole = Range.hull(*ends)
    return _values(codes.low, scales.low), whole.high - whole.low


def _values(codes: Tensor, scales: Tensor) -> Tensor:
    """E2M1 bytes and E8M0 bytes -> float64."""
    values = e2m1_decode(unpack_nibbles(codes.to(torch.uint8))).to(torch.float64)
    powers = e8m0_decode(scales.to(torch.uint8)).to(torch.float64)
    return values * powers.repeat_interleave(BLOCK, -1)


def expect(config: ModelConfig, buffers: Buffers) -> dict[str, Expected]:
    """Scores with their bounds, and the chosen blocks where the scores are exact."""
    q, off = queries(config, buffers)
    weights = (buffers["weights"].to(torch.bfloat16) * _weight_scale(config)).to(torch.float64)
    visible = (buffers["position"].to(torch.int64) + 1) // config.csa_ratio
    scores, bound = buffers["scores"].to(torch.float64), torch.zeros_like(buffers["scores"])
    bound = bound.to(torch.float64)
    exact = True
    for row in range(q.shape[0]):
        seen = int(visible[row])
        if seen <= config.index_topk:
            continue
        cache = int(buffers["slot"][row])
        for first in range(0, seen, 1 << 14):
            part = slice(first, min(first + (1 << 14), seen))
            keys = _values(buffers["keys"][cache, part], buffers["key_scales"][cache, part])
            score, error, certain = _scores(q[row], off[row], weights[row], keys)
            scores[row, part], bound[row, part] = score, error
            exact = exact and certain
    found = {"scores": Expected(scores, bound)}
    if exact:
        best = top_blocks(scores.to(torch.float32), visible, config.index_topk)
        found["blocks"] = Expected(_ascending(best, config.index_topk))
    return found


def _scores(q: Tensor, off: Tensor, weights: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Of one row and some keys: values, bounds, and whether float32 makes no error at all."""
    dots, sizes = q @ keys.T, q.abs() @ keys.abs().T
    hits = dots.clamp(min=0)
    size = weights.abs()[:, None]
    scores = (weights[:, None] * hits).sum(0)
    units = _unit(q).amin() * _unit(keys).amin() * _unit(weights).amin()
    largest = (size * sizes).sum(0).amax()
    certain = bool(largest < units * 2.0**24) and not bool(off.any())
    error = 2.0**-23 * (size * (16 * sizes + 6 * hits)).sum(0)
    error += (size * (off @ keys.abs().T)).sum(0)
    return scores, torch.zeros_like(error) if certain else error, certain


def _unit(values: Tensor) -> Tensor:
    """The power of two that each value is an odd multiple of; infinite for 0."""
    mantissa, exponent = torch.frexp(values)
    whole = (mantissa * 2.0**53).to(torch.int64)
    trailing = (whole & -whole).to(torch.float64)
    unit = torch.ldexp(trailing, exponent.to(torch.float64) - 53)
    return unit.masked_fill(values == 0, float("inf"))


def _ascending(best: Tensor, topk: int) -> Tensor:
    """int32 `[T, topk]`: ascending, then -1."""
    padded = torch.full((best.shape[0], topk), -1, device=best.device)
    padded[:, : best.shape[1]] = best
    last = padded.masked_fill(padded < 0, 1 << 40).sort(-1).values
    return last.masked_fill(last == 1 << 40, -1).to(torch.int32)
