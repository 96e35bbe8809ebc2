"""Every launch of a chunk of a prompt, in order: many tokens at once, by matrix products.

Caches, hyper-connections, router and attention are launched as in a step. A packed weight is
multiplied in another order of columns: what several of them read is arranged once. The experts'
sum and the shared expert's stay two parts in float32, which hyper-connections add.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.core.contract import Launch
from dsv4.kernels.core.signature import Kernel
from dsv4.kernels.ops.experts import contract as experts
from dsv4.kernels.ops.prefill import experts_contract
from dsv4.kernels.ops.prefill.gemm_contract import arrange, gemm, tuned
from dsv4.kernels.ops.prefill.swiglu_contract import swiglu
from dsv4.runtime.gpu.attention_plan import CAPACITIES, LayerWeights, attention_launches
from dsv4.runtime.gpu.plan import MATRIX, connect, route, standard_weights

MOST_ROWS = 2048  # of a chunk: experts are then read once for 48 tokens each
LEAST_ROWS = 32  # below, steps of a few rows take less time
SIZES = LEAST_ROWS, 2 * LEAST_ROWS, 1 << 20  # every cut of a kernel is that of one of these
SCORE_BYTES = 256 << 20  # of the scores of a chunk's rows, whatever the caches hold
PARTS = ("routed", "shared")  # of what the experts leave


def chunk_rows(capacity: int) -> int:
    """Tokens of a chunk, for caches of `capacity` tokens: scratch is bounded."""
    return max(LEAST_ROWS, min(MOST_ROWS, capacity, SCORE_BYTES // capacity))


def chunk_launches(
    config: ModelConfig, layers: Mapping[int, LayerWeights], rows: int, capacity: int
) -> Iterator[Launch]:
    """A chunk of `rows` tokens, many: ids, position, slot int32 `[T]` -> x for the head.

    layers: those to run, and the matrices of each, by projection. rows: what kernels are chosen
    for; any number gives the same bytes. capacity: tokens that the caches hold.
    """
    many = functools.partial(products, rows)
    for layer, weights in layers.items():
        own = f"layers.{layer}."
        yield connect(config, 2 * layer, f"{own}attn_", PARTS if layer else ("u",))
        yield from attention_launches(config, layer, weights, rows, capacity, many)
        yield connect(config, 2 * layer + 1, f"{own}ffn_")
        yield route(config, layer, weights)
        yield from _experts(config, rows, own)
        yield from _shared_expert(config, rows, own, weights)
    yield connect(config, 2 * config.num_hidden_layers, "head_", PARTS)


def products(
    rows: int, own: str, weights: LayerWeights, x: str, outputs: Mapping[str, str], out: str
) -> Iterator[Launch]:
    """A launch for each projection that reads `x`, for many rows."""
    packed = [weights[name] for name in outputs if weights[name].kind != "bf16"]
    if packed:
        arranged = {"x": x, "arranged": f"{x}_arranged"}
        yield Launch(arrange(packed[0].groups, packed[0].k), arranged)
    yield from _multiplied(rows, own, weights, x, outputs, out)


def _multiplied(
    rows: int, own: str, weights: LayerWeights, x: str, outputs: Mapping[str, str], out: str
) -> Iterator[Launch]:
    for projection, activation in outputs.items():
        weight = weights[projection]
        binding = {"x": x if weight.kind == "bf16" else f"{x}_arranged", "y": activation}
        binding |= {part: f"{own}{projection}.{part}" for part in MATRIX}
        yield Launch(gemm(weight, out, tuned(weight, rows)), binding)


def _experts(config: ModelConfig, rows: int, own: str) -> Iterator[Launch]:
    """x, and the router's choice -> routed. Scratch that steps have too has a name of its own."""
    shape = experts.Shape.of(config)
    stacks = {one.name: f"{own}ffn.{one.name}" for name in ("13", "2") for one in shape.stack(name)}
    scratch = {"weights": "choice_weights", "h": "choice_h", "arranged": "x_arranged"}
    for launch in experts_contract.launches(shape, tuning=experts_contract.tuned(shape, rows)):
        binding = {**stacks, **scratch, "y": "routed", **launch.binding}
        if launch.binding.get("x") == "arranged":
            binding["x"] = "x_arranged"
        yield Launch(launch.kernel, binding)


def _shared_expert(
    config: ModelConfig, rows: int, own: str, weights: LayerWeights
) -> Iterator[Launch]:
    """x, arranged already -> shared."""
    prefix = "ffn.shared_experts."
    up = {f"{prefix}w1": "shared_gate", f"{prefix}w3": "shared_up"}
    yield from _multiplied(rows, own, weights, "x", up, "float32")
    gated = {"gate": "shared_gate", "up": "shared_up", "h": "shared_h"}
    yield Launch(swiglu(config), gated)
    yield from products(rows, own, weights, "shared_h", {f"{prefix}w2": "shared"}, "float32")


def kernels(config: ModelConfig) -> Iterator[Kernel]:
    """What a model of recipe `standard` needs for its prompts; some more than once."""
    layers, _ = standard_weights(config)
    for rows in SIZES:
        for capacity in CAPACITIES:
            for launch in chunk_launches(config, layers, rows, capacity):
                yield launch.kernel
