"""A step, top to bottom, as the kernels compute it.

    ids -> [connect, attend, connect, route, mix experts] per layer -> connect -> head -> draw

A sublayer reads x and leaves u; hyper-connections take u to the next x, and the residual streams
from one set of tensors to the other. `prefill_plan` is the same for a chunk of a prompt.

Functions launch kernels through a `Pass`, and return the tensors that these write. Nothing here
needs a GPU: tensors of the device "meta" tell what is launched.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from dsv4.formats.model.config import AttentionKind, ModelConfig
from dsv4.kernels.core.signature import Kernel
from dsv4.kernels.ops.attention import contract as attention
from dsv4.kernels.ops.attention.reference import Shape
from dsv4.kernels.ops.hyper_connections import contract as mhc
from dsv4.kernels.reference.sampling import Parameters
from dsv4.runtime.gpu.activations import (
    Activations,
    StepScratch,
    Streams,
    Tokens,
    choice_entries,
    shaped,
)
from dsv4.runtime.gpu.caches import LayerCaches
from dsv4.runtime.gpu.expert_memory import ExpertMemory
from dsv4.runtime.gpu.operands import (
    Attention,
    Compressor,
    Connection,
    Experts,
    Layer,
    MatrixOperand,
    Model,
)
from dsv4.runtime.gpu.plan_kernels import (
    append_of,
    attention_of,
    choice_of,
    experts_of,
    fetch_of,
    gemv_of,
    index_scores_of,
    mhc_of,
    q_rope_of,
    routed_of,
    router_of,
    sampling_of,
    swiglu_of,
)
from dsv4.runtime.gpu.program import Between, Launch
from dsv4.runtime.positions import RopeTable, RopeTables

Product = tuple[MatrixOperand, Tensor]
"""A matrix, and where its product with x goes."""


class Observer(Protocol):
    """What draft layers keep of the tokens of a pass (`draft_plan.Observed`)."""

    def layer(self, run: Pass, index: int, streams: Tensor) -> None:
        """Layer `index` has left `streams` `[T, 4, D]`, which later launches write over."""

    def end(self, run: Pass, caches: Sequence[LayerCaches]) -> None:
        """All layers have been seen."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pass(abc.ABC):
    """Some tokens on their way through the layers.

    tokens, a: of as many rows as there are tokens. capacity: tokens that the caches hold. memory:
    see `DeviceWeights`. between: has a function called between the launches before it and those
    after it: of the host, or in a step one that only launches something, which a graph records.
    observer: where draft layers are loaded.
    """

    config: ModelConfig
    launch: Launch
    tokens: Tokens
    a: Activations
    tables: RopeTables
    capacity: int
    memory: ExpertMemory | None
    between: Between
    observer: Observer | None

    @property
    def rows(self) -> int:
        """The number of tokens."""
        return self.tokens.ids.shape[0]

    @property
    def tuned_rows(self) -> int:
        """What kernels are chosen for."""
        return self.rows

    @property
    def block_end(self) -> Tensor | None:
        """The position up to which rows see, int32 `[T]`, where that is not each row's own."""
        return None

    @abc.abstractmethod
    def multiply(self, x: Tensor, products: Sequence[Product]) -> None:
        """Every matrix times x bfloat16 `[T, ...]`."""

    @abc.abstractmethod
    def parts_scratch(self, splits: int) -> dict[str, Tensor]:
        """What an attention kernel hands to the one that joins its `splits` parts."""

    @abc.abstractmethod
    def mix_experts(self, layer: Layer, x: Tensor) -> tuple[Tensor, ...]:
        """x and the router's choice -> u `[T, D]`, or two parts of it in float32."""


@dataclasses.dataclass(frozen=True, eq=False)
class StepPass(Pass):
    """At most MAX_ROWS tokens. ctas: the device's multiprocessors."""

    scratch: StepScratch
    ctas: int

    def multiply(self, x: Tensor, products: Sequence[Product]) -> None:
        """One launch: `gemv` wants its weights numbered, and results of one dtype."""
        weights = tuple(matrix.weight for matrix, _ in products)
        given: dict[str, Tensor] = {}
        for index, (matrix, y) in enumerate(products):
            given |= matrix.arguments(str(index)) | {f"y{index}": y}
        x = x.view(self.rows, weights[0].groups, weights[0].k)
        self.launch(gemv_of(weights, dtype_name(products[0][1])), x=x, **given)

    def parts_scratch(self, splits: int) -> dict[str, Tensor]:
        """See `Pass`."""
        sizes = self.rows, splits, self.config.num_attention_heads
        return {
            "sums": shaped(self.scratch.sums, *sizes, self.config.head_dim),
            "statistics": shaped(self.scratch.statistics, *sizes, 2),
        }

    def mix_experts(self, layer: Layer, x: Tensor) -> tuple[Tensor, ...]:
        """The chosen experts and the shared one: in one launch where that reads its format. Before
        it, what is absent comes.
        """
        own = layer.experts
        if self.memory is not None and self.memory.fetches:
            self._fetch(self.memory, layer.index)
        if own.shared.in_one_launch:
            shared: dict[str, Tensor] = {}
            for name, matrix in (("1", own.shared.w1), ("2", own.shared.w2), ("3", own.shared.w3)):
                found = matrix.arguments()
                shared |= {f"shared_{part}{name}": tensor for part, tensor in found.items()}
            self._launch_experts(experts_of(self.config), own, x, self.a.u, shared)
            return (self.a.u,)
        s = self.scratch.first(self.rows)
        self._launch_experts(routed_of(self.config), own, x, s.routed, {})
        self.multiply(x, [(own.shared.w1, s.gate), (own.shared.w3, s.up)])
        self.launch(swiglu_of(self.config), gate=s.gate, up=s.up, h=s.shared_h)
        self.multiply(s.shared_h, [(own.shared.w2, s.shared)])
        return s.routed, s.shared

    def _launch_experts(
        self, kernel: Kernel, own: Experts, x: Tensor, y: Tensor, shared: dict[str, Tensor]
    ) -> None:
        self.launch(
            kernel,
            x=x,
            topk_idx=self.a.topk_idx,
            topk_weights=self.a.topk_weights,
            **own.arguments(),
            **own.scales("13", "2"),
            **shared,
            h=self.scratch.h,
            counters=self.scratch.counters,
            y=y,
            ctas=self.ctas,
        )

    def _fetch(self, memory: ExpertMemory, layer: int) -> None:
        kernel = fetch_of(memory.records.shape[1], self.config.n_routed_experts)
        given = memory.arguments()
        self.launch(kernel, topk_idx=self.a.topk_idx, layer=layer, **given)


def step(run: StepPass, model: Model, caches: Sequence[LayerCaches]) -> Tensor:
    """A step: `run.tokens` -> logits float32 `[T, V]` of all of them."""
    return head(run, model.head, body(run, model, caches))


def body(run: Pass, model: Model, caches: Sequence[LayerCaches]) -> Tensor:
    """All but the head, of a step or a chunk: -> x bfloat16 `[T, D]` for it."""
    streams, u = layers(run, model, caches)
    streams, x = connect(run, "last", model.before_head, streams, u)
    if run.observer is not None:
        run.observer.layer(run, model.layers[-1].index, streams.streams)
        run.observer.end(run, caches)
    return x


def layers(
    run: Pass, model: Model, caches: Sequence[LayerCaches]
) -> tuple[Streams, tuple[Tensor, ...]]:
    """Embedding and layers; -> the streams before the last sublayer's output, and that output.

    caches: by layer of the whole model, of which `model` may have some only.
    """
    streams, x = embed(run, model)
    u: tuple[Tensor, ...] = ()
    for number, layer in enumerate(model.layers):
        if u:
            streams, x = connect(run, "middle", layer.before_attention, streams, u)
            if run.observer is not None:
                run.observer.layer(run, model.layers[number - 1].index, streams.streams)
        u = (attend(run, layer.attention, caches[layer.index], x),)
        streams, x = connect(run, "middle", layer.before_experts, streams, u)
        route(run, layer, x)
        u = run.mix_experts(layer, x)
    return streams, u


def embed(run: Pass, model: Model) -> tuple[Streams, Tensor]:
    """The tokens' embeddings in every stream; -> the streams, and x of the first sublayer."""
    sources = {"ids": run.tokens.ids, "embed": model.embed}
    return _mix(
        run, mhc_of(run.config, "first", mhc.PLAIN), model.layers[0].before_attention, 0, sources
    )


def connect(
    run: Pass, place: str, own: Connection, old: Streams, u: tuple[Tensor, ...]
) -> tuple[Streams, Tensor]:
    """Hyper-connections before a sublayer, or before the head at the place "last".

    u: what the sublayer before left. -> the next streams, and x bfloat16 `[T, D]`.
    """
    output = mhc.Output(dtype_name(u[0]), len(u))
    sources = {"streams": old.streams, "post": old.post, "comb": old.comb}
    sources |= dict(zip(output.names, u, strict=True))
    new = 1 - run.a.streams.index(old)
    return _mix(run, mhc_of(run.config, place, output), own, new, sources)


def _mix(
    run: Pass, kernel: Kernel, own: Connection, new: int, sources: dict[str, Tensor]
) -> tuple[Streams, Tensor]:
    """new: the set of streams that is written; the last place has no use for post and comb."""
    streams, x = run.a.streams[new], run.a.x
    mixing = {"new_post": streams.post, "new_comb": streams.comb}
    run.launch(
        kernel,
        **sources,
        fn=own.fn,
        base=own.base,
        scale=own.scale,
        norm=own.norm,
        new_streams=streams.streams,
        x=x,
        **({} if dict(kernel.config)["place"] == "last" else mixing),
        letters=run.a.mhc_letters,
    )
    return streams, x


def attend(run: Pass, own: Attention, cache: LayerCaches, x: Tensor) -> Tensor:
    """An attention sublayer; the tokens are appended to its caches. -> u bfloat16 `[T, D]`."""
    a, tokens = run.a, run.tokens
    sliding = own.kind is AttentionKind.SLIDING
    table = run.tables.sliding if sliding else run.tables.compressed

    run.multiply(x, _products_of_x(a, own))
    qr = append_tokens(run, own, cache, table)
    run.multiply(qr, _products_of_qr(a, own))
    run.launch(
        q_rope_of(run.config),
        position=tokens.position,
        cos=table.cos,
        sin=table.sin,
        q=a.q_raw,
        out=a.q,
    )
    blocks = {"blocks": choose_blocks(run, cache, table)} if own.indexer else {}
    o = attend_rows(run, own, cache, table, blocks)
    run.multiply(o, [(own.wo_a, a.z)])
    run.multiply(a.z, [(own.wo_b, a.u)])
    return a.u


def _products_of_x(a: Activations, own: Attention) -> list[Product]:
    found = [(own.wq_a, a.latent), (own.wkv, a.kv)]
    if own.compressor is not None:
        to = a.csa if own.indexer else a.hca
        found += [(own.compressor.wkv, to.kv), (own.compressor.wgate, to.gate)]
    if own.indexer is not None:
        keys = own.indexer.compressor
        found += [(keys.wkv, a.index.kv), (keys.wgate, a.index.gate)]
        found += [(own.indexer.weights_proj, a.index_weights)]
    return found


def _products_of_qr(a: Activations, own: Attention) -> list[Product]:
    found = [(own.wq_b, a.q_raw)]
    return [*found, (own.indexer.wq_b, a.index_query)] if own.indexer else found


def append_tokens(run: Pass, own: Attention, cache: LayerCaches, table: RopeTable) -> Tensor:
    """Write the tokens' rows, and the entries and keys of the blocks they complete.

    -> qr, the normed low-rank query, bfloat16 `[T, q_lora_rank]`.
    """
    a = run.a
    pooled: dict[str, Tensor] = {}
    parts = (
        ("c", own.compressor, cache.entries, a.csa if own.indexer else a.hca),
        ("i", own.indexer.compressor if own.indexer else None, cache.keys, a.index),
    )
    for prefix, compressor, target, projected in parts:
        if compressor is not None and target is not None:
            pooled |= _norm_arguments(compressor, prefix) | target.arguments(prefix)
            pooled |= {f"{prefix}_kv": projected.kv, f"{prefix}_gate": projected.gate}
    run.launch(
        append_of(run.config, own.kind),
        position=run.tokens.position,
        slot=run.tokens.slot,
        cos=table.cos,
        sin=table.sin,
        latent=a.latent,
        q_norm=own.q_norm,
        qr=a.qr,
        kv=a.kv,
        kv_norm=own.kv_norm,
        window_kv=cache.window_kv,
        window_scales=cache.window_scales,
        **pooled,
    )
    return a.qr


def _norm_arguments(own: Compressor, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}_ape": own.ape, f"{prefix}_norm": own.norm}


def choose_blocks(run: Pass, cache: LayerCaches, table: RopeTable) -> Tensor:
    """The blocks that each token of a CSA layer attends to: int32 `[T, index_topk]`."""
    a, tokens, keys = run.a, run.tokens, cache.keys
    assert keys is not None
    run.launch(
        index_scores_of(run.config),
        position=tokens.position,
        slot=tokens.slot,
        cos=table.cos,
        sin=table.sin,
        q=a.index_query,
        weights=a.index_weights,
        keys=keys.entries,
        key_scales=keys.scales,
        scores=a.scores,
    )
    parts = {"part_scores": a.part_scores, "part_blocks": a.part_blocks}
    every = {"position": tokens.position, "scores": a.scores, **parts, "blocks": a.blocks}
    for kernel in choice_of(run.config, choice_entries(run.config, run.capacity)):
        run.launch(kernel, **{leaf.name: every[leaf.name] for leaf in kernel.leaves()})
    return a.blocks


def attend_rows(
    run: Pass, own: Attention, cache: LayerCaches, table: RopeTable, blocks: dict[str, Tensor]
) -> Tensor:
    """q over the window and the entries that a token sees -> o bfloat16 `[T, H, head_dim]`."""
    a, position = run.a, run.tokens.position
    ratio = own.compressor.ape.shape[0] if own.compressor else 0
    shape = _attention_shape(run.config, own.kind, ratio)
    turned = {}
    if run.block_end is not None:  # all rows see the window before the first of them, and all rows
        shape = shape._replace(window=shape.window + run.rows)
        position, turned = run.block_end, {"turn": position}
    reads = {"q": a.q, "window_kv": cache.window_kv, "window_scales": cache.window_scales}
    reads |= {"position": position, "slot": run.tokens.slot, **blocks}
    if cache.entries is not None:
        reads["compressed_kv"] = cache.entries.entries
        reads["compressed_scales"] = cache.entries.scales
    end = {"sinks": own.sinks, "cos": table.cos, "sin": table.sin, "o": a.o}
    tuning = attention.tuned(shape, run.tuned_rows)
    whole, *join = attention_of(shape, tuple(tuning.items()), bool(turned))
    if not join:
        run.launch(whole, **reads, **end)
        return a.o
    parts = run.parts_scratch(attention.parts(shape, tuning["most_splits"]))
    run.launch(whole, **reads, **parts)
    run.launch(join[0], **parts, position=position, **turned, **end)
    return a.o


def route(run: Pass, layer: Layer, x: Tensor) -> None:
    """x -> the experts of each token and their weights, in the activations topk_idx, -weights."""
    gate, a = layer.gate, run.a
    choice = {"bias": gate.bias} if gate.bias is not None else {}
    if gate.tid2eid is not None:
        choice = {"ids": run.tokens.ids, "tid2eid": gate.tid2eid}
    run.launch(
        router_of(run.config, gate.tid2eid is not None, gate.matrix.weight.kind),
        x=x,
        **gate.matrix.arguments(),
        **choice,
        topk_idx=a.topk_idx,
        topk_weights=a.topk_weights,
        letters=a.router_letters,
    )


def head(run: StepPass, matrix: MatrixOperand, x: Tensor) -> Tensor:
    """x -> logits float32 `[T, V]`."""
    logits = run.scratch.logits[: x.shape[0]]
    run.multiply(x, [(matrix, logits)])
    return logits


def draw(run: StepPass, logits: Tensor, parameters: Parameters, to: Tokens) -> None:
    """Draw the next token of each row of logits into `to.ids`, and move `to.position` on."""
    kernel = sampling_of(run.config.vocab_size)
    given = parameters._asdict()
    run.launch(kernel, logits=logits, **given, position=to.position, token=to.ids)


def attention_shape(config: ModelConfig, layer: int) -> Shape:
    """What the attention kernel reads in `layer`."""
    return _attention_shape(config, config.attention_kind(layer), config.compress_ratio(layer))


@functools.cache
def _attention_shape(config: ModelConfig, kind: AttentionKind, ratio: int) -> Shape:
    c = config
    common = c.num_attention_heads, c.head_dim, c.qk_rope_head_dim, c.sliding_window
    match kind:
        case AttentionKind.SLIDING:
            return Shape("none", *common)
        case AttentionKind.CSA:
            return Shape("list", *common, ratio, c.index_topk)
        case _:
            return Shape("all", *common, ratio)


def dtype_name(tensor: Tensor) -> str:
    """As kernels' configurations write it: "float32" or "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")
