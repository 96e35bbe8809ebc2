"""Every launch of a step, in order: a list that needs no GPU, for the build and for the runtime.

    embed -> [mHC, attention, mHC, router, experts] per layer -> mHC, head

A sublayer reads x and leaves u; hyper-connections take u to the next x, and the residual streams
from one set of buffers to the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import Kind, parameters
from dsv4.kernels.core.contract import Launch
from dsv4.kernels.core.signature import Kernel
from dsv4.kernels.ops.experts import contract as experts
from dsv4.kernels.ops.experts.reference import SLABS
from dsv4.kernels.ops.gemv.contract import MAX_ROWS, Weight, gemv
from dsv4.kernels.ops.hyper_connections import contract as mhc
from dsv4.kernels.ops.router import contract as router
from dsv4.kernels.ops.sampling import contract as sampling
from dsv4.runtime.gpu.attention_plan import CAPACITIES, LayerWeights, attention_launches

MATRIX = ("codes", "scales", "global_scale")
SLABBED = ("attn.wo_b", "ffn.shared_experts.w2")  # matrices that are cut by columns


def step_launches(
    config: ModelConfig,
    layers: Mapping[int, LayerWeights],
    head: Weight,
    rows: int,
    capacity: int,
) -> Iterator[Launch]:
    """A step of `rows` tokens: ids, position, slot int32 `[T]` -> logits float32 `[T, V]`.

    layers: those to run, and the matrices of each, by projection. capacity: tokens that the caches
    hold.
    """
    for layer in layers:
        own = f"layers.{layer}."
        yield connect(config, 2 * layer, f"{own}attn_")
        yield from attention_launches(config, layer, layers[layer], rows, capacity)
        yield connect(config, 2 * layer + 1, f"{own}ffn_")
        yield route(config, layer, layers[layer])
        yield mix_experts(config, own)
    yield connect(config, 2 * config.num_hidden_layers, "head_")
    yield head_launch(head)


def different_layers(
    config: ModelConfig, layers: Mapping[int, LayerWeights]
) -> dict[int, LayerWeights]:
    """The first layer of every kind: together they launch each kernel that `layers` launch."""
    found: dict[object, int] = {}
    for layer, weights in layers.items():
        attention = config.attention_kind(layer), config.compress_ratio(layer)
        key = (layer == 0, attention, config.is_hash_layer(layer), frozenset(weights.items()))
        found.setdefault(key, layer)
    return {layer: layers[layer] for layer in found.values()}


def head_launch(head: Weight) -> Launch:
    """x -> logits."""
    matrix = {f"{part}0": f"head.{part}" for part in MATRIX}
    return Launch(gemv([head]), matrix | {"y0": "logits"})


def connect(config: ModelConfig, sublayer: int, own: str, u: tuple[str, ...] = ("u",)) -> Launch:
    """Hyper-connections before sublayer number `sublayer`, or before the head.

    u: what the sublayer before left, in bfloat16, or two parts of it in float32.
    """
    last = sublayer == 2 * config.num_hidden_layers
    place = "first" if sublayer == 0 else "last" if last else "middle"
    old, new = (sublayer + 1) % 2, sublayer % 2
    binding = {name: own + name for name in ("fn", "base", "scale", "norm")}
    binding |= {name: f"{name}{old}" for name in ("streams", "post", "comb")}
    binding |= {f"new_{name}": f"{name}{new}" for name in ("streams", "post", "comb")}
    binding["letters"] = "mhc_letters"
    output = mhc.PLAIN if len(u) == 1 else mhc.Output("float32", len(u))
    binding |= dict(zip(output.names, u, strict=True))
    return Launch(mhc.mhc(mhc.Shape.of(config), place, output), binding)


def route(config: ModelConfig, layer: int, weights: LayerWeights) -> Launch:
    """Choose the experts of a layer."""
    own = f"layers.{layer}.ffn.gate."
    kind = weights["ffn.gate"].kind
    shape = router.Shape.of(config, config.is_hash_layer(layer), kind)
    binding = {name: own + name for name in (*MATRIX, "bias", "tid2eid")}
    return Launch(router.router(shape), binding | {"letters": "router_letters"})


def mix_experts(config: ModelConfig, own: str) -> Launch:
    """The chosen experts and the shared one."""
    kernel = experts.experts(experts.Shape.of(config, shared=True), "bfloat16")
    activations = ("x", "topk_idx", "topk_weights", "h", "counters", "y", "ctas")
    binding = {
        one.name: f"{own}ffn.{one.name}" for one in kernel.leaves() if one.name not in activations
    }
    return Launch(kernel, binding | {"y": "u"})


def kernels(config: ModelConfig) -> Iterator[Kernel]:
    """What a model of recipe `standard` needs, for every number of rows; some more than once."""
    layers, head = standard_weights(config)
    yield draw(config).kernel
    for rows in range(1, MAX_ROWS + 1):
        for capacity in CAPACITIES:
            for launch in step_launches(config, layers, head, rows, capacity):
                yield launch.kernel


def draw(config: ModelConfig, prefix: str = "") -> Launch:
    """Draw the next token of each row of logits, where the next step reads it, and move its
    position on. prefix: of the two buffers' names.
    """
    binding = {"token": f"{prefix}ids", "position": f"{prefix}position"}
    return Launch(sampling.sampling(config.vocab_size), binding)


def standard_weights(config: ModelConfig) -> tuple[dict[int, LayerWeights], Weight]:
    """Shapes and formats of all matrices as recipe `standard` stores them."""
    layers: dict[int, dict[str, Weight]] = {n: {} for n in range(config.num_hidden_layers)}
    for one in parameters(config):
        prefix, _, rest = one.name.partition(".")
        matrix = one.kind in (Kind.LINEAR, Kind.PLAIN) and len(one.shape) == 2
        if prefix != "layers" or not matrix:
            continue
        layer, _, name = rest.removesuffix(".weight").partition(".")
        kind = "fp8" if one.kind is Kind.LINEAR else "nvfp4" if name == "ffn.gate" else "bf16"
        slabs = SLABS if name in SLABBED else 1
        groups = config.o_groups if name == "attn.wo_a" else 1
        rows, cols = one.shape
        layers[int(layer)][name] = Weight(kind, rows, cols, slabs, groups)
    return dict(layers), Weight("nvfp4", config.vocab_size, config.hidden_size)
