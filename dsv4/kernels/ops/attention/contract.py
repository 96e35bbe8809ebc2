"""Sparse attention over the FP8 caches: sinks, one key/value row for all heads, rotated back.

A token at position p sees the window's rows `max(0, p - 127) .. p` and some compressed entries of
its sequence: none (mode "none"), every b < (p + 1) // ratio ("all", HCA), or those listed in
`blocks` ("list", CSA; -1 is padding). Scores are `q · k / sqrt(512)`; a head's sink takes part in
the softmax and has no value; the output's rotary dimensions are rotated back by the token's angle.

Reference: `dsv4.kernels.reference.{attention,rope}` on the rows that are seen, in FP64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.core.contract import Buffers, Case, Launch
from dsv4.kernels.core.signature import Argument, Kernel, Role, kernel
from dsv4.kernels.core.sizes import MULTIPROCESSORS
from dsv4.kernels.ops.attention.inputs import Plan, make
from dsv4.kernels.ops.attention.reference import (
    ROW_BYTES,
    SCALE_BYTES,
    Shape,
    expected,
    shapes_of,
)

SOURCES = "dsv4.kernels.ops.attention"
DECODE_ROWS = 16  # up to here a token's rows are cut into parts
TILE = 64  # rows that are multiplied at once
HEADS = 64  # likewise
CONTEXTS = {"8k": 8 << 10, "128k": 128 << 10, "1M": 1 << 20}


def attention(
    shape: Shape, rows: int, tuning: Mapping[str, int | bool] | None = None, turned: bool = False
) -> tuple[Kernel, ...]:
    """The kernels, in order, for one kind of layer and about that many tokens.

    Up to DECODE_ROWS tokens a token's rows are cut into parts, and a second kernel joins them; a
    result is the same, bit for bit, whatever the number of tokens. So it is beyond, where a token
    is one part, in another order of sums.

    q bfloat16 `[T, H, 512]`, normed and rotated; caches: window_kv uint8 `[slots, ring, 576]`,
    window_scales uint8 `[slots, ring, 8]`, and unless the mode is "none" compressed_kv,
    compressed_scales `[slots, capacity, …]`, and for "list" blocks int32 `[T, topk]`; position,
    slot int32 `[T]`; sinks float32 `[H]`; cos, sin float32 `[positions, 32]`; o bfloat16
    `[T, H, 512]`. Scratch: sums float32 `[T, splits, H, 512]`, statistics `[T, splits, H, 2]`.
    Scales are at most 2^7, rows at most 57344: a normed row times its weight is far below.

    turned: outputs are rotated back by angles of positions of their own, turn int32 `[T]`, so that
    tokens of several positions see the same rows. Raises ValueError where nothing joins parts.
    """
    cut = {**tuned(shape, rows), **(tuning or {})}
    number, wide = torch.int32, torch.float32
    vectors = ("rows", shape.heads, shape.head_dim)
    position = Argument("position", number, ("rows",), align=4)
    end = (
        Argument("sinks", wide, (shape.heads,)),
        Argument("cos", wide, ("positions", shape.rotary // 2)),
        Argument("sin", wide, ("positions", shape.rotary // 2)),
        Argument("o", torch.bfloat16, vectors, "out"),
    )
    splits = parts(shape, int(cut["most_splits"]))
    common = _common(shape, splits)
    sizes = ("rows", splits, shape.heads)

    def scratch(role: Role) -> tuple[Argument, ...]:
        return (
            Argument("sums", wide, (*sizes, shape.head_dim), role),
            Argument("statistics", wide, (*sizes, 2), role),
        )

    first = kernel(
        "attention",
        f"{SOURCES}.kernel:Attention",
        {**common, **{name: cut[name] for name in ("stages", "cuts", "pdl")}},
        (
            Argument("q", torch.bfloat16, vectors),
            caches(shape),
            position,
            Argument("slot", number, ("rows",), align=4),
            scratch("out") if splits > 1 else end,
        ),
    )
    if splits == 1:
        if turned:
            raise ValueError(f"{shape}: one part, whose positions are those of its angles")
        return (first,)
    turn = (Argument("turn", number, ("rows",), align=4),) if turned else ()
    config = {**common, "warps": cut["warps"], "pdl": cut["pdl"]}
    join = (*scratch("in"), position, *turn, *end)
    made = "TurnedJoin" if turned else "Join"
    return first, kernel("attention_join", f"{SOURCES}.combine:{made}", config, join)


def _common(shape: Shape, splits: int) -> dict[str, int | bool | str]:
    return {
        "mode": shape.mode,
        "heads": shape.heads,
        "window": shape.window,
        "ratio": shape.ratio,
        "topk": shape.topk,
        "splits": splits,
    }


def caches(shape: Shape) -> tuple[Argument, ...]:
    """What a kind of layer reads: the window, compressed entries, which of them."""
    byte = torch.uint8
    found = [
        Argument("window_kv", byte, ("slots", "ring", ROW_BYTES)),
        Argument("window_scales", byte, ("slots", "ring", SCALE_BYTES)),
    ]
    if shape.mode != "none":
        found += [
            Argument("compressed_kv", byte, ("slots", "capacity", ROW_BYTES)),
            Argument("compressed_scales", byte, ("slots", "capacity", SCALE_BYTES)),
        ]
    if shape.mode == "list":
        found.append(Argument("blocks", torch.int32, ("rows", shape.topk)))
    return tuple(found)


def parts(shape: Shape, most: int) -> int:
    """Parts that a token's rows are cut into at most, whole tiles each."""
    if shape.mode == "all":
        return most
    tiles = -(-(shape.window + shape.topk) // TILE)
    return -(-tiles // -(-tiles // most))


def tuned(shape: Shape, rows: int) -> dict[str, int | bool]:
    """How the work is cut, by measurement: so that a wave of CTAs does it, and each soon ends.

    most_splits decides what is summed with what: it is the same for all `rows` up to DECODE_ROWS.
    """
    splits = (16 if shape.mode == "all" else 10) if rows <= DECODE_ROWS else 1
    ctas = parts(shape, splits) * rows * shape.heads // HEADS
    cuts = max((cut for cut in (2, 4) if ctas * cut <= MULTIPROCESSORS), default=1)
    return {"most_splits": splits, "cuts": cuts, "stages": 2, "warps": 4, "pdl": True}


def cases(config: ModelConfig, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """Every kind of layer at each context that changes what it reads.

    Up to DECODE_ROWS tokens are of as many sequences; more are one sequence's prompt.
    """
    for kind, shape in shapes_of(config).items():
        for context, length in CONTEXTS.items():
            if (shape.mode == "none" and context != "8k") or (
                shape.mode == "list" and context == "1M"
            ):
                continue
            for count in rows:
                last = range(length - 1, length - 1 - count, -1)
                positions = tuple(last) if count <= DECODE_ROWS else tuple(reversed(last))
                slots = tuple(range(count)) if count <= DECODE_ROWS else (0,) * count
                plan = Plan(positions, slots)
                yield case(config, shape, f"{kind} {context}", model, plan)


def checks(config: ModelConfig, model: str) -> Iterator[Case]:
    """Adversarial inputs: edges of the window and of blocks, padding, sinks, extreme numbers."""
    window = config.sliding_window
    for kind, shape in shapes_of(config).items():
        sequence = tuple(range(5000, 5008))
        plans = {
            "first token": Plan((0,), (0,)),
            "first tokens": Plan(tuple(range(8)), (0,) * 8),
            "window filling": Plan((window - 2, window - 1, window), (0,) * 3),
            "block edge": Plan(tuple(range(1020, 1028)), (1,) * 8),
            "one sequence": Plan(sequence, (2,) * 8),
            "sequences": Plan((3, 700, 701, 8191, 20000), (0, 1, 1, 2, 4)),
            "far sinks": Plan((9000, 100), (1, 0), sinks="far"),
            "equal scores": Plan((4095, 60), (0, 1), looks="equal"),
            "extreme scales": Plan((6001, 77), (1, 0), extreme=True),
            "prompt": Plan(tuple(range(40)), (0,) * 40),
            "prompts": Plan((*range(7000, 7030), *range(3)), (1,) * 30 + (0,) * 3),
        }
        if shape.mode == "list":
            for listed in ("none", "one", "scattered"):
                plans[f"listed {listed}"] = Plan((30000, 0, 9), (1, 0, 2), listed=listed)
        for name, plan in plans.items():
            yield case(config, shape, f"{kind} {name}", model, plan)
    yield from _blocks(config, model)


def _blocks(config: ModelConfig, model: str) -> Iterator[Case]:
    """Of a draft: tokens that see the window before the first of them, and each other."""
    c, count = config, config.dspark_block_size or 5
    own = c.num_attention_heads, c.head_dim, c.qk_rope_head_dim, c.sliding_window + count
    for name, first in {"at the start": 1, "window filling": 126, "": 8000}.items():
        turns = tuple(range(first, first + count))
        plan = Plan((turns[-1],) * count, (1,) * count, turns=turns)
        yield case(config, Shape("none", *own), f"draft block {name}".strip(), model, plan)


def case(
    config: ModelConfig,
    shape: Shape,
    name: str,
    model: str,
    plan: Plan,
    tuning: Mapping[str, int | bool] | None = None,
) -> Case:
    """Tokens at given positions of given sequences."""
    count = len(plan.positions)
    vectors = 2 * count * shape.heads * shape.head_dim * 2
    caches = ["window_kv", "window_scales"]
    if shape.mode != "none":
        caches += ["compressed_kv", "compressed_scales"]

    kernels = attention(shape, count, tuning, turned=bool(plan.turns))

    def inputs(rng: torch.Generator) -> Buffers:
        buffers = make(config, shape, plan, rng)
        for one in kernels[0].leaves():
            if one.name in ("sums", "statistics"):
                buffers[one.name] = torch.empty(count, *one.shape[1:], device=rng.device)  # type: ignore[arg-type]
        return buffers

    return Case(
        "attention",
        name,
        model,
        count,
        tuple(Launch(one) for one in kernels),
        vectors + seen(shape, plan) * (ROW_BYTES + SCALE_BYTES),
        inputs,
        lambda buffers: {"o": expected(shape, buffers)},
        cold=tuple(caches),
        flops=4 * shape.heads * shape.head_dim * sum(seen_each(shape, plan)),
    )


def seen_each(shape: Shape, plan: Plan) -> list[int]:
    """Rows that each token attends to."""
    counts = []
    for place in plan.positions:
        blocks = (place + 1) // shape.ratio if shape.ratio else 0
        if shape.mode == "list":
            blocks = min(blocks, shape.topk)
        counts.append(min(place + 1, shape.window) + blocks)
    return counts


def seen(shape: Shape, plan: Plan) -> int:
    """Rows that all tokens attend to, one that several of a sequence see counted once.

    Listed ones are counted as often as they are listed.
    """
    total = 0
    for slot in set(plan.slots):
        own = [p for p, s in zip(plan.positions, plan.slots, strict=True) if s == slot]
        total += min(max(own) + 1, shape.window + max(own) - min(own))
        if shape.mode == "list":
            total += sum(min((p + 1) // shape.ratio, shape.topk) for p in own)
        elif shape.mode == "all":
            total += (max(own) + 1) // shape.ratio
    return total
