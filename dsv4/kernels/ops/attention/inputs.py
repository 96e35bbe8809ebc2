"""Inputs of sparse attention: caches as a runtime fills them, and everything else poisoned.

Rows that no token may see hold NaN (bytes 0xFF). Some heads look at one row that they see, so that
a row left out or mixed up changes the output by more than its bound; some at the following token,
which lies in the ring and must not be seen; some at nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.numeric.codecs import E4M3_MAX, e4m3_encode
from dsv4.kernels.core.contract import Buffers
from dsv4.kernels.ops.attention.reference import (
    CODES,
    ROW_BYTES,
    SCALE_BYTES,
    Shape,
    dequantize,
    seen_rows,
)
from dsv4.kernels.reference.quant_sim import KV_BLOCK, power_of_two_scale
from dsv4.kernels.reference.rope import inverse_frequencies, rope_table

POISON = 0xFF
SPARE = 8  # places of a ring and entries of a cache that are never written


class Plan(NamedTuple):
    """Tokens: positions and slots. A sequence's tokens stand together, ascending.

    listed: how `blocks` is padded: "visible" as many as there are, "none", "one", "scattered"
    (padding between them). looks: "one" row for most heads, or "equal" scores for all.
    extreme: scales of one slice from 2^-107 to 2^7, in dimensions where queries are 0.
    sinks: "plain", or "far" for +50 and -1e30 by turns. turns: positions of angles, where they are
    others.
    """

    positions: tuple[int, ...]
    slots: tuple[int, ...]
    listed: str = "visible"
    looks: str = "one"
    extreme: bool = False
    sinks: str = "plain"
    turns: tuple[int, ...] = ()


def make(config: ModelConfig, shape: Shape, plan: Plan, rng: torch.Generator) -> Buffers:
    """Buffers for the tokens of a plan."""
    device, count = rng.device, len(plan.positions)
    slots = max(plan.slots) + 2
    places = torch.tensor(plan.positions, dtype=torch.int32, device=device)
    buffers: Buffers = {
        "position": places,
        "slot": torch.tensor(plan.slots, dtype=torch.int32, device=device),
        "o": torch.empty(count, shape.heads, shape.head_dim, dtype=torch.bfloat16, device=device),
    }
    sinks = torch.randn(shape.heads, generator=rng, device=device) * 2
    if plan.sinks == "far":
        sinks[0::2], sinks[1::4] = 50.0, -1.0e30
    buffers["sinks"] = sinks
    theta, yarn = (
        (config.compress_rope_theta, config.yarn) if shape.ratio else (config.rope_theta, None)
    )
    if plan.turns:
        places = torch.tensor(plan.turns, dtype=torch.int32, device=device)
        buffers["turn"] = places
    table = rope_table(inverse_frequencies(shape.rotary, theta, yarn).to(device), places)
    for name, rows in zip(("cos", "sin"), table, strict=True):
        whole = torch.full((max(plan.positions) + 1, shape.rotary // 2), torch.nan, device=device)
        whole[places.to(torch.int64)] = rows
        buffers[name] = whole

    ring = shape.window + count + SPARE
    buffers |= _poisoned("window", slots, ring, device)
    for slot in set(plan.slots):
        own = [p for p, s in zip(plan.positions, plan.slots, strict=True) if s == slot]
        first = max(0, min(own) - shape.window + 1)
        at = torch.arange(first, max(own) + 1, device=device) % ring
        _write(buffers, "window", slot, at, plan.extreme, rng)
    if shape.mode != "none":
        _entries(shape, plan, slots, buffers, rng)
    buffers["q"] = _queries(shape, plan, buffers, rng)
    return buffers


def _poisoned(name: str, slots: int, places: int, device: torch.device) -> Buffers:
    return {
        f"{name}_{part}": torch.full((slots, places, width), POISON, dtype=torch.uint8).to(device)
        for part, width in (("kv", ROW_BYTES), ("scales", SCALE_BYTES))
    }


def _write(
    buffers: Buffers, name: str, slot: int, at: Tensor, extreme: bool, rng: torch.Generator
) -> None:
    kv, scales = random_rows(len(at), rng)
    if extreme:
        scales[:, 1] = torch.randint(20, 135, (len(at),), generator=rng, device=rng.device)
    buffers[f"{name}_kv"][slot, at], buffers[f"{name}_scales"][slot, at] = kv, scales


def random_rows(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows as the cache holds them: kv uint8 `[count, 576]`, scales uint8 `[count, 8]`."""
    device = rng.device
    x = torch.randn(count, CODES // KV_BLOCK, KV_BLOCK, generator=rng, device=device)
    x *= torch.randn(count, CODES // KV_BLOCK, 1, generator=rng, device=device).exp()
    scale = power_of_two_scale(x.abs().amax(-1, keepdim=True), E4M3_MAX)
    codes = e4m3_encode(x / scale).view(torch.uint8).flatten(1)
    rotary = torch.randn(count, ROW_BYTES // 2 - CODES // 2, generator=rng, device=device)
    exponents = (scale.view(torch.int32) >> 23).squeeze(-1).to(torch.uint8)
    kv = torch.cat((codes, rotary.to(torch.bfloat16).view(torch.uint8)), 1)
    return kv, torch.nn.functional.pad(exponents, (0, 1))


def _entries(shape: Shape, plan: Plan, slots: int, buffers: Buffers, rng: torch.Generator) -> None:
    device = rng.device
    capacity = (max(plan.positions) + 1) // shape.ratio + SPARE
    buffers |= _poisoned("compressed", slots, capacity, device)
    if shape.mode == "all":
        for slot in set(plan.slots):
            last = max(p for p, s in zip(plan.positions, plan.slots, strict=True) if s == slot)
            at = torch.arange((last + 1) // shape.ratio, device=device)
            _write(buffers, "compressed", slot, at, plan.extreme, rng)
        return
    lists = []
    for place, slot in zip(plan.positions, plan.slots, strict=True):
        visible = (place + 1) // shape.ratio
        order = torch.randperm(visible, generator=rng, device=device)
        wanted = {"none": 0, "one": 1, "scattered": shape.topk // 3}.get(plan.listed, shape.topk)
        chosen = order[:wanted].sort().values
        row = torch.full((shape.topk,), -1, dtype=torch.int32, device=device)
        where = torch.arange(len(chosen), device=device)
        if plan.listed == "scattered":
            where = torch.randperm(shape.topk, generator=rng, device=device)[: len(chosen)]
        row[where.sort().values] = chosen.to(torch.int32)
        lists.append(row)
        _write(buffers, "compressed", slot, chosen, plan.extreme, rng)
    buffers["blocks"] = torch.stack(lists)


def _queries(shape: Shape, plan: Plan, buffers: Buffers, rng: torch.Generator) -> Tensor:
    device, width = rng.device, shape.head_dim
    heads = torch.arange(shape.heads, device=device)
    queries = []
    for token, (place, slot) in enumerate(zip(plan.positions, plan.slots, strict=True)):
        q = torch.randn(shape.heads, width, generator=rng, device=device)
        rows = torch.cat(seen_rows(shape, buffers, token)).to(torch.float32)
        if plan.extreme:
            rows[:, KV_BLOCK : 2 * KV_BLOCK] = 0
        aim = rows[torch.randint(len(rows), (shape.heads,), generator=rng, device=device)]
        at = (place + 1) % buffers["window_kv"].shape[1]
        after = dequantize(
            *(buffers[f"window_{part}"][slot, at][None] for part in ("kv", "scales"))
        )
        if not after.isnan().any():
            aim[3::4] = after.to(torch.float32)
        strength = torch.where(heads % 4 == 0, 0.0, 0.3 + 0.1 * (heads % 4))
        q += aim / aim.norm(dim=1, keepdim=True) * (strength * width**0.5)[:, None]
        if plan.extreme:
            q[:, KV_BLOCK : 2 * KV_BLOCK] = 0
        if plan.looks == "equal":
            q.zero_()
        queries.append(q * (q.square().mean(1, keepdim=True) + 1e-12).rsqrt())
    return torch.stack(queries).to(torch.bfloat16)
