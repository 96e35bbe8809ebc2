"""The Lightning indexer of a CSA layer: which compressed entries each token attends to.

The scores of all visible keys, with the queries rotated, spread (Hadamard) and rounded to E2M1 on
the way; then the best `index_topk` of them: two launches, three where a row may have more than
8192 keys. References:
`dsv4.kernels.reference.{rope,indexer,quant_sim}`, with the official rounding. Formula:
DeepSeek-V4's `inference/model.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.core.contract import Buffers, Case, Expected, Launch
from dsv4.kernels.core.signature import Argument, Kernel, Role, kernel
from dsv4.kernels.core.sizes import MULTIPROCESSORS
from dsv4.kernels.ops.indexer.inputs import (
    Rows,
    Values,
    coarse,
    equal,
    hard_scores,
    normal,
    wide,
    zeros,
)
from dsv4.kernels.ops.indexer.reference import BLOCK, chosen, expect
from dsv4.kernels.reference.rope import inverse_frequencies, rope_table

SCORES = "dsv4.kernels.ops.indexer.scores:IndexScores"
TOPK = "dsv4.kernels.ops.indexer.topk"
TURN = 2048  # scores that a CTA of the choice takes at a time
WHOLE = 4 * TURN  # scores that one CTA chooses from alone
PARTS = 16  # of a longer row at most, if parts of 2 turns do


def index_scores(
    config: ModelConfig, ctas: int = MULTIPROCESSORS, stages: int = 3, pdl: bool = True
) -> Kernel:
    """The kernel of scores. ctas: that rows and keys are shared among, the device's: with twice as
    many they took 6.4 us for 3.4.

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


def row_topk(config: ModelConfig, turns: int, pdl: bool = True) -> Kernel:
    """The kernel of the choice from rows that one CTA takes. turns: of 2048 scores it has at most.

    Arguments: position int32 `[T]`; scores float32 `[T, capacity]`, a multiple of 4; blocks int32
    `[T, index_topk]`: ascending, -1 where a row sees fewer.
    """
    return _topk("RowTopk", config, {"turns": turns, "pdl": pdl}, (_SCORES, _blocks(config)))


def part_topk(config: ModelConfig, turns: int, part: int, pdl: bool = True) -> Kernel:
    """The kernel of the choice from each `part` scores, at most `turns` of 2048.

    Arguments: position and scores as of `row_topk`; part_scores float32 and part_blocks int32
    `[T, parts · index_topk]`.
    """
    cut = {"turns": turns, "part": part, "pdl": pdl}
    return _topk("PartTopk", config, cut, (_SCORES, *_chosen("out")))


def merge_topk(config: ModelConfig, turns: int, part: int, pdl: bool = True) -> Kernel:
    """The kernel of the choice from what `part_topk` chose of each `part` scores.

    Arguments: position, part_scores and part_blocks as of `part_topk`; blocks as of `row_topk`.
    """
    cut = {"turns": turns, "part": part, "pdl": pdl}
    return _topk("MergeTopk", config, cut, (*_chosen("in"), _blocks(config)))


_SCORES = Argument("scores", torch.float32, ("rows", "capacity"))


def _topk(
    name: str,
    config: ModelConfig,
    cut: Mapping[str, int | bool],
    operands: tuple[Argument, ...],
) -> Kernel:
    sizes = {"ratio": config.csa_ratio, "topk": config.index_topk}
    position = Argument("position", torch.int32, ("rows",), align=4)
    return kernel("indexer", f"{TOPK}:{name}", {**sizes, **cut}, (position, *operands))


def _chosen(role: Role) -> tuple[Argument, Argument]:
    """What parts choose."""
    return (
        Argument("part_scores", torch.float32, ("rows", "chosen"), role),
        Argument("part_blocks", torch.int32, ("rows", "chosen"), role),
    )


def _blocks(config: ModelConfig) -> Argument:
    return Argument("blocks", torch.int32, ("rows", config.index_topk), "out")


def part_turns(capacity: int) -> int:
    """Of 2048 scores, how many times a part of a row has: 0 where the row is not cut."""
    if capacity <= WHOLE:
        return 0
    return 2 if capacity <= 2 * TURN * PARTS else 8


def chosen_of_parts(config: ModelConfig, capacity: int) -> int:
    """Columns of part_scores and part_blocks."""
    turns = part_turns(capacity)
    return -(-capacity // (turns * TURN)) * config.index_topk if turns else 0


def choice(config: ModelConfig, capacity: int) -> tuple[Launch, ...]:
    """The launches that choose from up to `capacity` scores."""
    turns = part_turns(capacity)
    if not turns:
        return (Launch(row_topk(config, -(-capacity // TURN))),)
    merged = -(-chosen_of_parts(config, capacity) // TURN)
    return (
        Launch(part_topk(config, turns, turns * TURN)),
        Launch(merge_topk(config, merged, turns * TURN)),
    )


def cases(config: ModelConfig, model: str, rows: Sequence[int]) -> Iterator[Case]:
    """At 8k and 128k tokens; values whose scores are exact."""
    for name, context in {"8k": 8192, "128k": 131072}.items():
        for count in rows:
            places = Rows.last(context, count)
            yield case(config, name, model, places, context // config.csa_ratio, coarse)


def checks(config: ModelConfig, model: str) -> Iterator[Case]:
    """Few keys, ties, several sequences, wide values, prefill, a million tokens.

    Also the choice alone, from scores of all kinds, in rows of every length for each capacity.
    """
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
    for capacity in (1024, 2048, 4096, WHOLE, 12288, 32768, 65536, 1 << 18):
        tokens = config.csa_ratio * capacity
        cut = config.csa_ratio * TURN * part_turns(capacity)
        ends = {edge + 3, 2 * edge, tokens // 2 + 5, cut - 1, cut + 3, cut + edge, tokens - 1}
        lengths = [end for end in sorted(ends) if edge <= end < tokens] or [tokens - 1]
        for kind in ("normal", "few values", "extreme", "alike", "ascending"):
            yield choice_case(config, f"choice {kind}", model, lengths, capacity, kind)


def case(
    config: ModelConfig, shape: str, model: str, places: Rows, capacity: int, values: Values
) -> Case:
    """`places` against caches of `capacity` keys."""
    rows = len(places.positions)
    visible = sum((p + 1) // config.csa_ratio for p in places.positions)
    key_bytes = config.index_head_dim // 2 + config.index_head_dim // BLOCK
    chosen = (rows, max(chosen_of_parts(config, capacity), 4))
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


def choice_case(
    config: ModelConfig, shape: str, model: str, positions: Sequence[int], capacity: int, kind: str
) -> Case:
    """The choice alone, from scores that are given (see `hard_scores`)."""
    rows = len(positions)
    parts = (rows, max(chosen_of_parts(config, capacity), 4))

    def make(rng: torch.Generator) -> Buffers:
        device = rng.device
        return {
            "position": torch.tensor(list(positions), dtype=torch.int32, device=device),
            "scores": hard_scores(kind, rows, capacity, rng),
            "blocks": torch.empty(rows, config.index_topk, dtype=torch.int32, device=device),
            "part_scores": torch.empty(parts, device=device),
            "part_blocks": torch.empty(parts, dtype=torch.int32, device=device),
        }

    def reference(buffers: Buffers) -> dict[str, Expected]:
        return {"blocks": chosen(config, buffers["scores"], buffers["position"])}

    return Case(
        "indexer",
        f"{shape} of {capacity}",
        model,
        rows,
        choice(config, capacity),
        rows * 4 * config.index_topk + sum(4 * ((p + 1) // config.csa_ratio) for p in positions),
        make,
        reference,
        note="choice",
    )
