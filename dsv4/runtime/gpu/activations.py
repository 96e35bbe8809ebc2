"""Everything else that launches write: what one kernel hands to the next, and scratch.

A tensor has a row for each token that may be run at once; a pass of fewer takes the first ones.
Steps of few rows and chunks of a prompt share `Activations`, and have scratch of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.ops.attention import contract as attention
from dsv4.kernels.ops.attention.reference import Shape, shapes_of
from dsv4.kernels.ops.experts.contract import COUNTERS
from dsv4.kernels.ops.gemv.contract import MAX_ROWS
from dsv4.kernels.ops.hyper_connections import contract as mhc
from dsv4.kernels.ops.indexer.contract import chosen_of_parts
from dsv4.kernels.ops.router import contract as router
from dsv4.runtime.gpu.caches import entry_capacity

CAPACITIES = (1 << 15, 1 << 17, 1 << 20)  # tokens in a cache that a choice of blocks is made for

Make = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """What is run next, int32 `[T]`: the ids, their positions, the slots of their sequences."""

    ids: Tensor
    position: Tensor
    slot: Tensor

    @classmethod
    def allocate(cls, rows: int, device: torch.device) -> Tokens:
        """All 0."""
        return cls(*(torch.zeros(rows, dtype=torch.int32, device=device) for _ in range(3)))


@dataclasses.dataclass(frozen=True, eq=False)
class Streams:
    """streams: bfloat16 `[T, 4, D]`; post `[T, 4]`, comb `[T, 4, 4]`: float32."""

    streams: Tensor
    post: Tensor
    comb: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Projected:
    """What a compressor pools: kv, gate float32 `[T, c·d]`."""

    kv: Tensor
    gate: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Activations:
    """By the names of the launches that write them; `plan` tells their order.

    streams: those before a sublayer and those behind it, in turns. csa, hca, index: by the kind
    of compressor. chosen: scores and blocks of parts of a row.
    """

    streams: tuple[Streams, Streams]
    x: Tensor
    latent: Tensor
    qr: Tensor
    kv: Tensor
    csa: Projected
    hca: Projected
    index: Projected
    index_query: Tensor
    index_weights: Tensor
    scores: Tensor
    part_scores: Tensor
    part_blocks: Tensor
    blocks: Tensor
    q_raw: Tensor
    q: Tensor
    o: Tensor
    z: Tensor
    u: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    mhc_letters: Tensor
    router_letters: Tensor

    @classmethod
    def allocate(
        cls, config: ModelConfig, rows: int, capacity: int, device: torch.device
    ) -> Activations:
        """For passes of up to `rows` tokens and caches of `capacity` tokens; zeroed."""
        c, wide, half, number = config, torch.float32, torch.bfloat16, torch.int32
        heads, hidden, chosen = c.num_attention_heads, c.hidden_size, chosen_blocks(c, capacity)

        def new(*shape: int, dtype: torch.dtype = wide) -> Tensor:
            return torch.zeros((rows, *shape), dtype=dtype, device=device)

        def streams() -> Streams:
            count = mhc.STREAMS
            return Streams(new(count, hidden, dtype=half), new(count), new(count, count))

        def projected(channels: int) -> Projected:
            return Projected(new(channels), new(channels))

        return cls(
            streams=(streams(), streams()),
            x=new(hidden, dtype=half),
            latent=new(c.q_lora_rank),
            qr=new(c.q_lora_rank, dtype=half),
            kv=new(c.head_dim),
            csa=projected(2 * c.head_dim),
            hca=projected(c.head_dim),
            index=projected(2 * c.index_head_dim),
            index_query=new(c.index_n_heads * c.index_head_dim),
            index_weights=new(c.index_n_heads),
            scores=new(entry_capacity(capacity, c.csa_ratio)),
            part_scores=new(chosen),
            part_blocks=new(chosen, dtype=number),
            blocks=new(c.index_topk, dtype=number),
            q_raw=new(heads * c.head_dim),
            q=new(heads, c.head_dim, dtype=half),
            o=new(heads, c.head_dim, dtype=half),
            z=new(c.o_groups * c.o_lora_rank, dtype=half),
            u=new(hidden, dtype=half),
            topk_idx=new(c.num_experts_per_tok, dtype=number),
            topk_weights=new(c.num_experts_per_tok),
            mhc_letters=new(mhc.Shape.of(c).workers, mhc.LETTER),
            router_letters=new(router.Shape.of(c, hashed=False).parts, c.n_routed_experts),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class StepScratch:
    """Of steps: at most MAX_ROWS rows. sums, statistics: of an attention kernel's parts, as one
    dimension, since kinds of layers cut differently; h: of the experts; routed, shared: what they
    leave where the shared one has launches of its own, and gate, up, shared_h of that one; logits
    float32 `[T, V]`.
    """

    sums: Tensor
    statistics: Tensor
    h: Tensor
    counters: Tensor
    routed: Tensor
    shared: Tensor
    gate: Tensor
    up: Tensor
    shared_h: Tensor
    logits: Tensor

    @classmethod
    def allocate(cls, config: ModelConfig, device: torch.device) -> StepScratch:
        """Zeroed."""
        c, rows = config, MAX_ROWS
        shapes = list(shapes_of(c).values())
        if c.dspark_block_size is not None:  # a block sees its own rows beside the window
            window = c.sliding_window + c.dspark_block_size
            shapes.append(
                Shape("none", c.num_attention_heads, c.head_dim, c.qk_rope_head_dim, window)
            )
        parts = max(
            attention.parts(one, attention.tuned(one, rows)["most_splits"]) for one in shapes
        )
        vectors = rows * parts * c.num_attention_heads
        activated = rows * (c.num_experts_per_tok + 1), c.moe_intermediate_size
        return cls(
            torch.zeros(vectors * c.head_dim, device=device),
            torch.zeros(vectors * 2, device=device),
            torch.zeros(activated, dtype=torch.bfloat16, device=device),
            torch.zeros(COUNTERS, dtype=torch.int32, device=device),
            torch.zeros((rows, c.hidden_size), device=device),
            torch.zeros((rows, c.hidden_size), device=device),
            torch.zeros((rows, c.moe_intermediate_size), device=device),
            torch.zeros((rows, c.moe_intermediate_size), device=device),
            torch.zeros((rows, c.moe_intermediate_size), dtype=torch.bfloat16, device=device),
            torch.zeros((rows, c.vocab_size), device=device),
        )

    def first(self, rows: int) -> StepScratch:
        """With the first `rows` rows of what a shared expert's own launches write."""
        return _first_rows(self, rows)


@dataclasses.dataclass(frozen=True, eq=False)
class ChunkScratch:
    """Of chunks. arranged: what packed weights are multiplied with, in one dimension; entries,
    places, weights, h, partial: of the experts' list, a row for each choice; offsets `[E + 1]`;
    routed, shared: what experts leave, float32 `[T, D]`; gate, up, shared_h: of the shared expert.
    """

    arranged: Tensor
    entries: Tensor
    places: Tensor
    weights: Tensor
    offsets: Tensor
    h: Tensor
    partial: Tensor
    routed: Tensor
    shared: Tensor
    gate: Tensor
    up: Tensor
    shared_h: Tensor

    @classmethod
    def allocate(cls, config: ModelConfig, rows: int, device: torch.device) -> ChunkScratch:
        """For chunks of up to `rows` tokens; zeroed."""
        c, number, half = config, torch.int32, torch.bfloat16
        choices, inter, hidden = (
            rows * c.num_experts_per_tok,
            c.moe_intermediate_size,
            c.hidden_size,
        )
        latent = c.o_groups * c.o_lora_rank
        taps = hidden * len(c.dspark_target_layer_ids or ())
        heads = c.num_attention_heads * c.head_dim
        widest = max(hidden, c.q_lora_rank, heads, latent, inter, taps)

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            arranged=new(rows * widest, dtype=half),
            entries=new(choices, dtype=number),
            places=new(choices, dtype=number),
            weights=new(choices),
            offsets=new(c.n_routed_experts + 1, dtype=number),
            h=new(choices, inter, dtype=half),
            partial=new(choices, hidden, dtype=half),
            routed=new(rows, hidden),
            shared=new(rows, hidden),
            gate=new(rows, inter),
            up=new(rows, inter),
            shared_h=new(rows, inter, dtype=half),
        )

    def first(self, rows: int) -> ChunkScratch:
        """With the first `rows` rows of what has a row for each token."""
        return _first_rows(self, rows)


Scratch = TypeVar("Scratch", StepScratch, ChunkScratch)


def _first_rows(scratch: Scratch, rows: int) -> Scratch:
    by_token = ("routed", "shared", "gate", "up", "shared_h")
    found = {name: getattr(scratch, name)[:rows] for name in by_token}
    return dataclasses.replace(scratch, **found)


Group = TypeVar("Group", Tokens, Activations)


def first(group: Group, rows: int) -> Group:
    """The first `rows` rows of every tensor."""
    found: Group = _first(group, rows)
    return found


def _first(group: Any, rows: int) -> Any:
    if isinstance(group, Tensor):
        return group[:rows]
    if isinstance(group, tuple):
        return tuple(_first(one, rows) for one in group)
    fields = (field.name for field in dataclasses.fields(group))
    return dataclasses.replace(group, **{n: _first(getattr(group, n), rows) for n in fields})


def shaped(buffer: Tensor, *shape: int) -> Tensor:
    """The front part of scratch, in a shape: each kernel takes what it needs from the start."""
    return buffer.view(-1)[: math.prod(shape)].view(shape)


def choice_entries(config: ModelConfig, capacity: int) -> int:
    """Entries that the choice is made for: few kernels serve caches of all sizes."""
    most = next((enough for enough in CAPACITIES if capacity <= enough), capacity)
    return most // config.csa_ratio


def chosen_blocks(config: ModelConfig, capacity: int) -> int:
    """Columns of part_scores and part_blocks: at least 1."""
    return max(chosen_of_parts(config, choice_entries(config, capacity)), 1)
