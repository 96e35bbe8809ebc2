"""The launches of an attention sublayer, and the buffers in which they meet.

    x   -> latent, kv, compressor, indexer weights     one launch: what reads the same input
        -> qr; caches, compressed entries, index keys  append
    qr  -> q_raw, i_query                              one launch
        -> q; scores, blocks (CSA); o                  q_rope, indexer, attention
    o   -> z -> u                                      wo_a by groups, wo_b

How products are launched depends on the number of rows: `few` here, `prefill_plan` otherwise.

A buffer of one layer is called "layers.3." and what it is; activations are the same in all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from dsv4.formats.model.config import AttentionKind, ModelConfig
from dsv4.kernels.core.contract import Launch
from dsv4.kernels.ops.attention import contract as attention
from dsv4.kernels.ops.attention.reference import Shape
from dsv4.kernels.ops.gemv.contract import Weight, gemv
from dsv4.kernels.ops.indexer import contract as indexer
from dsv4.kernels.ops.kv_cache import contract as append
from dsv4.kernels.ops.kv_cache import q_rope_contract

CAPACITIES = (1 << 15, 1 << 17, 1 << 20)  # tokens in a cache that a choice of blocks is made for

LayerWeights = Mapping[str, Weight]
"""Projection, as "attn.wq_a" -> its shape and format."""


Products = Callable[[str, LayerWeights, str, Mapping[str, str], str], Iterator[Launch]]
"""(prefix of the layer, its matrices, x, projection -> activation, dtype of those) -> launches"""


def few(
    own: str, weights: LayerWeights, x: str, outputs: Mapping[str, str], out: str
) -> Iterator[Launch]:
    """One launch of the projections that read `x`, for few rows.

    gemv wants its weights numbered, and all of a kind of input.
    """
    binding = {"x": x}
    for index, (projection, activation) in enumerate(outputs.items()):
        binding[f"y{index}"] = activation
        for part in ("codes", "scales", "global_scale"):
            binding[f"{part}{index}"] = f"{own}{projection}.{part}"
    yield Launch(gemv([weights[name] for name in outputs], out), binding)


def attention_launches(
    config: ModelConfig,
    layer: int,
    weights: LayerWeights,
    rows: int,
    capacity: int,
    products: Products = few,
) -> Iterator[Launch]:
    """The sublayer of `layer` for `rows` tokens: x bfloat16 `[T, D]` -> u bfloat16 `[T, D]`.

    capacity: tokens that the caches hold.
    """
    kind, own = config.attention_kind(layer), f"layers.{layer}."
    tables = {name: f"{rotation(kind)}.{name}" for name in ("cos", "sin")}
    yield from products(own, weights, "x", first_products(kind), "float32")
    yield _append(config, own, kind, tables)
    yield from products(own, weights, "qr", second_products(kind), "float32")
    yield Launch(q_rope_contract.q_rope(config), {"q": "q_raw", "out": "q", **tables})
    if kind is AttentionKind.CSA:
        keys = {"keys": f"{own}i_entries", "key_scales": f"{own}i_scales"}
        inputs = {"q": "i_query", "weights": "i_weights"}
        yield Launch(indexer.index_scores(config), inputs | keys | tables)
        yield from indexer.choice(config, choice_entries(config, capacity))
    shape = attention_shape(config, layer)
    caches = {
        "window_kv": f"{own}window_kv",
        "window_scales": f"{own}window_scales",
        "compressed_kv": f"{own}c_entries",
        "compressed_scales": f"{own}c_scales",
        "sinks": f"{own}sinks",
    }
    for kernel in attention.attention(shape, rows):
        yield Launch(kernel, caches | tables)
    yield from products(own, weights, "o", {"attn.wo_a": "z"}, "bfloat16")
    yield from products(own, weights, "z", {"attn.wo_b": "u"}, "bfloat16")


def choice_entries(config: ModelConfig, capacity: int) -> int:
    """Entries that the choice is made for: few kernels serve caches of all sizes."""
    most = next((enough for enough in CAPACITIES if capacity <= enough), capacity)
    return most // config.csa_ratio


def attention_shape(config: ModelConfig, layer: int) -> Shape:
    """What the attention kernel reads in `layer`."""
    c, kind = config, config.attention_kind(layer)
    common = c.num_attention_heads, c.head_dim, c.qk_rope_head_dim, c.sliding_window
    match kind:
        case AttentionKind.SLIDING:
            return Shape("none", *common)
        case AttentionKind.CSA:
            return Shape("list", *common, c.csa_ratio, c.index_topk)
        case _:
            return Shape("all", *common, c.compress_ratio(layer))


def rotation(kind: AttentionKind) -> str:
    """Which table of angles a kind of layer turns by."""
    return "sliding" if kind is AttentionKind.SLIDING else "compressed"


def first_products(kind: AttentionKind) -> dict[str, str]:
    """Projection -> activation, of those that read the sublayer's input."""
    found = {"attn.wq_a": "latent", "attn.wkv": "kv"}
    if kind is not AttentionKind.SLIDING:
        found |= {"attn.compressor.wkv": "c_kv", "attn.compressor.wgate": "c_gate"}
    if kind is AttentionKind.CSA:
        indexer_ = "attn.indexer"
        found |= {f"{indexer_}.compressor.wkv": "i_kv", f"{indexer_}.compressor.wgate": "i_gate"}
        found |= {f"{indexer_}.weights_proj": "i_weights"}
    return found


def second_products(kind: AttentionKind) -> dict[str, str]:
    """Projection -> activation, of those that read the low-rank query."""
    found = {"attn.wq_b": "q_raw"}
    return found | ({"attn.indexer.wq_b": "i_query"} if kind is AttentionKind.CSA else {})


def _append(config: ModelConfig, own: str, kind: AttentionKind, tables: dict[str, str]) -> Launch:
    kernel = append.append(append.Layer.of(config, kind))
    shared = {"position", "slot", "latent", "qr", "kv", "c_kv", "c_gate", "i_kv", "i_gate"}
    names = {one.name for one in kernel.leaves()} - shared - set(tables)
    return Launch(kernel, tables | {name: own + name for name in names})
