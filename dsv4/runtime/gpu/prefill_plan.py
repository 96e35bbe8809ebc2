"""A chunk of a prompt, top to bottom: many tokens at once, by matrix products.

Caches, hyper-connections, router and attention are launched as in a step. A packed weight is
multiplied in another order of columns: what several of them read is arranged once. The experts'
sum and the shared expert's stay two parts in float32, which hyper-connections add.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from torch import Tensor

from dsv4.formats.model.config import ModelConfig
from dsv4.kernels.core.signature import Kernel
from dsv4.kernels.ops.experts import contract as experts
from dsv4.kernels.ops.gemv.contract import Weight
from dsv4.kernels.ops.prefill import experts_contract, gemm_contract
from dsv4.runtime.gpu.activations import ChunkScratch, shaped
from dsv4.runtime.gpu.caches import LayerCaches
from dsv4.runtime.gpu.operands import Layer, MatrixOperand, Model
from dsv4.runtime.gpu.plan import Pass, Product, body, dtype_name
from dsv4.runtime.gpu.plan_kernels import swiglu_of

MOST_ROWS = 2048  # of a chunk: experts are then read once for 48 tokens each
LEAST_ROWS = 32  # below, steps of a few rows take less time
SIZES = LEAST_ROWS, 2 * LEAST_ROWS, 1 << 20  # every cut of a kernel is that of one of these
SCORE_BYTES = 256 << 20  # of the scores of a chunk's rows, whatever the caches hold


def chunk_rows(capacity: int) -> int:
    """Tokens of a chunk, for caches of `capacity` tokens: scratch is bounded."""
    return max(LEAST_ROWS, min(MOST_ROWS, capacity, SCORE_BYTES // capacity))


@dataclasses.dataclass(frozen=True, eq=False)
class ChunkPass(Pass):
    """Any number of tokens; what each of them gives is the same bytes, whatever their number."""

    scratch: ChunkScratch

    @property
    def tuned_rows(self) -> int:
        """What kernels are chosen for: never for so few that they would be those of a step."""
        return max(self.rows, LEAST_ROWS)

    def multiply(self, x: Tensor, products: Sequence[Product]) -> None:
        """A launch for each product, and one that arranges x for packed weights."""
        packed = [matrix.weight for matrix, _ in products if matrix.weight.kind != "bf16"]
        arranged = self.arrange(x, packed[0].groups, packed[0].k) if packed else x
        for matrix, y in products:
            self.multiply_one(x if matrix.weight.kind == "bf16" else arranged, matrix, y)

    def arrange(self, x: Tensor, groups: int, k: int) -> Tensor:
        """x bfloat16 in the order of columns that packed weights are multiplied in: `[T, G, K]`."""
        shape = self.rows, groups, k
        arranged = shaped(self.scratch.arranged, *shape)
        self.launch(_arrange(groups, k), x=x.view(shape), arranged=arranged)
        return arranged

    def multiply_one(self, x: Tensor, matrix: MatrixOperand, y: Tensor) -> None:
        """x: arranged already, unless the matrix is plain."""
        weight = matrix.weight
        x = x.view(self.rows, weight.groups, weight.k)
        kernel = _gemm(weight, dtype_name(y), self.tuned_rows)
        self.launch(kernel, x=x, **matrix.arguments(), y=y)

    def parts_scratch(self, splits: int) -> dict[str, Tensor]:
        """A chunk's attention is one kernel."""
        raise TypeError(f"attention of {self.tuned_rows} tokens has {splits} parts, expected one")

    def mix_experts(self, layer: Layer, x: Tensor) -> tuple[Tensor, ...]:
        """-> what the routed experts leave, and the shared one: float32 `[T, D]` each."""
        s, a, own = self.scratch, self.a, layer.experts
        shared, copies = own.shared, self.memory and self.memory.prompt_copies
        shape = _experts_shape(self.config)
        tuning = experts_contract.tuned(shape, self.tuned_rows)
        routing, up, down, combine = _experts(self.config, tuple(tuning.items()))
        listed = {"entries": s.entries, "offsets": s.offsets, "weights": s.weights}
        self.launch(
            routing, topk_idx=a.topk_idx, topk_weights=a.topk_weights, targets=s.places, **listed
        )
        arranged = self.arrange(x, 1, shape.hidden)
        if copies:
            self.between(functools.partial(copies.arrive, layer.index, a.topk_idx))
        placed = own.arguments(prompt=True)
        self.launch(up, x=arranged, **listed, **placed, **own.scales("13"), h=s.h)
        rows = {"targets": s.places, "offsets": s.offsets}
        self.launch(down, h=s.h, **rows, **placed, **own.scales("2"), partial=s.partial)
        self.launch(combine, partial=s.partial, topk_idx=a.topk_idx, y=s.routed)
        if copies:
            self.between(functools.partial(copies.leave, layer.index))

        for matrix, y in ((shared.w1, s.gate), (shared.w3, s.up)):
            self.multiply_one(x if matrix.weight.kind == "bf16" else arranged, matrix, y)
        self.launch(swiglu_of(self.config), gate=s.gate, up=s.up, h=s.shared_h)
        self.multiply(s.shared_h, [(shared.w2, s.shared)])
        return s.routed, s.shared


def chunk(run: ChunkPass, model: Model, caches: Sequence[LayerCaches]) -> Tensor:
    """A chunk: `run.tokens` -> x bfloat16 `[T, D]` for the head, which is not part of it."""
    if run.memory is not None and run.memory.prompt_copies:
        run.between(run.memory.prompt_copies.begin)
    return body(run, model, caches)


@functools.cache
def _arrange(groups: int, k: int) -> Kernel:
    return gemm_contract.arrange(groups, k)


def _gemm(weight: Weight, out: str, rows: int) -> Kernel:
    return _gemm_cut(weight, out, tuple(_tuned(weight, rows).items()))


@functools.lru_cache(4096)
def _tuned(weight: Weight, rows: int) -> Mapping[str, int]:
    return gemm_contract.tuned(weight, rows)


@functools.cache
def _gemm_cut(weight: Weight, out: str, tuning: tuple[tuple[str, int], ...]) -> Kernel:
    return gemm_contract.gemm(weight, out, dict(tuning))


@functools.cache
def _experts_shape(config: ModelConfig) -> experts.Shape:
    return experts.Shape.of(config)


@functools.cache
def _experts(config: ModelConfig, tuning: tuple[tuple[str, int], ...]) -> tuple[Kernel, ...]:
    """The list of each expert's tokens; w13; w2; the sum."""
    shape = experts.Shape.of(config)
    return (
        experts_contract.route(shape),
        experts_contract.up(shape, dict(tuning)),
        experts_contract.down(shape, dict(tuning)),
        experts_contract.combine(shape, "float32"),
    )
