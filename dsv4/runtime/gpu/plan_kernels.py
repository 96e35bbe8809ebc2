"""The kernels that a plan launches, by what they compute.

Each is made once: a plan of many layers is then put together quickly.
"""

from __future__ import annotations

import functools

from dsv4.formats.model.config import AttentionKind, ModelConfig
from dsv4.kernels.core.signature import Kernel
from dsv4.kernels.ops.attention import contract as attention
from dsv4.kernels.ops.attention.reference import Shape
from dsv4.kernels.ops.experts import contract as experts
from dsv4.kernels.ops.experts import fetch_contract
from dsv4.kernels.ops.gemv import contract as gemv
from dsv4.kernels.ops.gemv.contract import Weight
from dsv4.kernels.ops.hyper_connections import contract as mhc
from dsv4.kernels.ops.indexer import contract as indexer
from dsv4.kernels.ops.kv_cache import contract as append
from dsv4.kernels.ops.kv_cache import q_rope_contract
from dsv4.kernels.ops.prefill.swiglu_contract import swiglu
from dsv4.kernels.ops.router import contract as router
from dsv4.kernels.ops.sampling import contract as sampling


@functools.cache
def gemv_of(weights: tuple[Weight, ...], out: str) -> Kernel:
    """Products of few rows with weights that read the same input. out: a dtype's name."""
    return gemv.gemv(weights, out)


@functools.cache
def mhc_of(config: ModelConfig, place: str, output: mhc.Output) -> Kernel:
    """Hyper-connections at a place, behind a sublayer that leaves `output`."""
    return mhc.mhc(mhc.Shape.of(config), place, output)


@functools.cache
def append_of(config: ModelConfig, kind: AttentionKind) -> Kernel:
    """What writes the tokens of a layer of `kind` into its caches."""
    return append.append(append.Layer.of(config, kind))


@functools.cache
def q_rope_of(config: ModelConfig) -> Kernel:
    """Norm and rotation of the queries."""
    return q_rope_contract.q_rope(config)


@functools.cache
def index_scores_of(config: ModelConfig) -> Kernel:
    """Scores of the blocks of a CSA layer."""
    return indexer.index_scores(config)


@functools.cache
def choice_of(config: ModelConfig, entries: int) -> tuple[Kernel, ...]:
    """The choice among `entries` scores, launch by launch."""
    return tuple(launch.kernel for launch in indexer.choice(config, entries))


@functools.cache
def attention_of(
    shape: Shape, tuning: tuple[tuple[str, int | bool], ...], turned: bool
) -> tuple[Kernel, ...]:
    """Attention, and what joins its parts. turned: see `attention`."""
    return attention.attention(shape, 1, dict(tuning), turned=turned)


@functools.cache
def router_of(config: ModelConfig, hashed: bool, kind: str) -> Kernel:
    """The choice of experts, by a gate of `kind` or a table."""
    return router.router(router.Shape.of(config, hashed, kind))


@functools.cache
def experts_of(config: ModelConfig) -> Kernel:
    """The experts of a step with the shared one."""
    return experts.experts(experts.Shape.of(config, shared=True), "bfloat16")


@functools.cache
def fetch_of(record_nbytes: int, experts: int) -> Kernel:
    """What brings the experts of a step that are absent."""
    return fetch_contract.fetch(record_nbytes, experts)


@functools.cache
def routed_of(config: ModelConfig) -> Kernel:
    """The experts of a step without the shared one."""
    return experts.experts(experts.Shape.of(config), "float32")


@functools.cache
def swiglu_of(config: ModelConfig) -> Kernel:
    """The gate of a shared expert that has launches of its own."""
    return swiglu(config)


@functools.cache
def sampling_of(vocab: int) -> Kernel:
    """The draw."""
    return sampling.sampling(vocab)
