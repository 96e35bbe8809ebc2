"""The weights of a model as its kernels read them: dataclasses of tensors, by what they are.

`read_model` makes them of any `DeviceWeights`: of a loaded store, or of `StandardWeights`, which
have shapes and formats alone. They are views: no byte is moved or changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from dsv4.formats.errors import RuntimeRefusal
from dsv4.formats.model.config import AttentionKind, ModelConfig
from dsv4.formats.numeric.operands import SLABS, Nvfp4Matrix
from dsv4.kernels.ops.gemv.contract import Weight
from dsv4.runtime.dspark import settings
from dsv4.runtime.gpu.expert_memory import ExpertMemory
from dsv4.runtime.gpu.weights import DeviceWeights, LayerRecords

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class MatrixOperand:
    """A `[out, in]` matrix. scales: of NVFP4 and FP8; global_scale: float32 `[1]`, of NVFP4."""

    weight: Weight
    codes: Tensor
    scales: Tensor | None = None
    global_scale: Tensor | None = None

    def arguments(self, suffix: str = "") -> dict[str, Tensor]:
        """The tensors by the names of `Weight.operands(suffix)`."""
        parts = {"codes": self.codes, "scales": self.scales, "global_scale": self.global_scale}
        return {f"{name}{suffix}": part for name, part in parts.items() if part is not None}


@dataclasses.dataclass(frozen=True, eq=False)
class Connection:
    """Hyper-connections before a sublayer or the head, and the norm of what they hand to it.

    fn: float32 `[24, 4 D]`, before the head `[4, 4 D]`; base, scale; norm: float32 `[D]`.
    """

    fn: Tensor
    base: Tensor
    scale: Tensor
    norm: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Compressor:
    """wkv, wgate: `[c·d, D]`, c = 2 where blocks overlap; ape: `[ratio, c·d]`; norm: `[d]`."""

    wkv: MatrixOperand
    wgate: MatrixOperand
    ape: Tensor
    norm: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Indexer:
    """What a CSA layer chooses blocks by."""

    wq_b: MatrixOperand
    weights_proj: MatrixOperand
    compressor: Compressor


@dataclasses.dataclass(frozen=True, eq=False)
class Attention:
    """An attention sublayer of any kind. wo_a has as many groups of rows as the config's o_groups.

    compressor: of CSA and HCA; indexer: of CSA.
    """

    kind: AttentionKind
    wq_a: MatrixOperand
    q_norm: Tensor
    wq_b: MatrixOperand
    wkv: MatrixOperand
    kv_norm: Tensor
    sinks: Tensor
    wo_a: MatrixOperand
    wo_b: MatrixOperand
    compressor: Compressor | None
    indexer: Indexer | None


@dataclasses.dataclass(frozen=True, eq=False)
class Gate:
    """bias: float32 `[E]`; tid2eid: int64 `[V, k]`, in its place where a table chooses."""

    matrix: MatrixOperand
    bias: Tensor | None
    tid2eid: Tensor | None


@dataclasses.dataclass(frozen=True, eq=False)
class SharedExpert:
    """The expert of every token: w1 and w3 `[I, D]`, w2 `[D, I]`, in any format."""

    w1: MatrixOperand
    w2: MatrixOperand
    w3: MatrixOperand

    @property
    def in_one_launch(self) -> bool:
        """Whether the kernel of a step's experts reads it too: FP8, w2 in slabs."""
        weights = self.w1.weight, self.w3.weight, self.w2.weight
        return [(one.kind, one.slabs) for one in weights] == [
            ("fp8", 1),
            ("fp8", 1),
            ("fp8", SLABS),
        ]


@dataclasses.dataclass(frozen=True, eq=False)
class Experts:
    """The routed experts, found in records by their places, and the shared one."""

    routed: LayerRecords
    shared: SharedExpert

    def arguments(self, *, prompt: bool = False) -> dict[str, Tensor]:
        """Places and records by the names of `experts.Shape.placed`."""
        own = self.routed
        places = own.prompt_places if prompt else own.places
        return {"places": places, "records": own.records}

    def scales(self, *names: str) -> dict[str, Tensor]:
        """Global scales of "13" and "2" by the names of `experts.Shape.global_scale`."""
        found = {"13": self.routed.global_scale13, "2": self.routed.global_scale2}
        return {f"global_scale{name}": found[name] for name in names}


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """Layer `index` of the model."""

    index: int
    before_attention: Connection
    attention: Attention
    before_experts: Connection
    gate: Gate
    experts: Experts


@dataclasses.dataclass(frozen=True, eq=False)
class DSpark:
    """Draft layers of that kind (`runtime.dspark`). block: rows of a proposal; noise: the id of
    those that follow its first; tapped: backbone layers, ascending.

    main_proj: `[D, 3 D]`; main_norm: float32 `[D]`; stages: layers behind those of the backbone;
    markov_w1: bfloat16 `[V, r]`; markov_w2: `[V, r]`; confidence: float32 `[D + r]`.
    """

    block: int
    noise: int
    tapped: tuple[int, ...]
    main_proj: MatrixOperand
    main_norm: Tensor
    stages: tuple[Layer, ...]
    before_head: Connection
    markov_w1: Tensor
    markov_w2: MatrixOperand
    confidence: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """All of it. embed: bfloat16 `[V, D]`. memory: see `DeviceWeights`. draft: where draft layers
    are loaded.
    """

    config: ModelConfig
    embed: Tensor
    layers: tuple[Layer, ...]
    before_head: Connection
    head: MatrixOperand
    memory: ExpertMemory | None = None
    draft: DSpark | None = None

    def different_layers(self) -> Model:
        """With the first layer of every kind alone: they launch each kernel that all launch."""
        found: dict[object, Layer] = {}
        for layer in self.layers:
            formats = tuple(one.weight for one in parts(layer, MatrixOperand))
            kinds = self.config.compress_ratio(layer.index), self.config.is_hash_layer(layer.index)
            found.setdefault((layer is self.layers[0], *kinds, formats), layer)
        return dataclasses.replace(self, layers=tuple(found.values()))


def parts(group: Any, kind: type[T]) -> Iterator[T]:
    """Everything of type `kind` in a dataclass of dataclasses and tuples, in its order."""
    if isinstance(group, kind):
        yield group
    elif isinstance(group, tuple):
        for one in group:
            yield from parts(one, kind)
    elif dataclasses.is_dataclass(group):
        for field in dataclasses.fields(group):
            yield from parts(getattr(group, field.name), kind)


def nbytes(*groups: Any) -> int:
    """Of all tensors in dataclasses; none lies in two places."""
    return sum(one.nbytes for group in groups for one in parts(group, Tensor))


def read_model(
    weights: DeviceWeights, layers: Iterable[int] | None = None, *, drafts: bool = False
) -> Model:
    """The operands of all layers, or of some, and of the head. drafts: of DSpark's as well.

    Raises RuntimeRefusal naming a tensor whose format no kernel reads, and as `dspark.settings`.
    """
    read = _Reader(weights)
    which = range(weights.config.num_hidden_layers) if layers is None else layers
    return Model(
        weights.config,
        read.plain("embed.weight", torch.bfloat16),
        tuple(read.layer(index) for index in which),
        read.connection("hc_head", "norm.weight"),
        read.matrix("head"),
        weights.memory,
        read.dspark() if drafts else None,
    )


@dataclasses.dataclass(frozen=True)
class _Reader:
    weights: DeviceWeights

    def dspark(self) -> DSpark:
        c = self.weights.config
        block, _, noise, tapped = settings(c)
        last = f"mtp.{c.num_draft_layers - 1}"
        return DSpark(
            block,
            noise,
            tapped,
            self.matrix("mtp.0.main_proj"),
            self.parameter("mtp.0.main_norm.weight"),
            tuple(self.layer(c.num_hidden_layers + stage) for stage in range(c.num_draft_layers)),
            self.connection(f"{last}.hc_head", f"{last}.norm.weight"),
            self.plain(f"{last}.markov_head.markov_w1.weight", torch.bfloat16),
            self.matrix(f"{last}.markov_head.markov_w2"),
            self.parameter(f"{last}.confidence_head.proj.weight").flatten(),
        )

    def layer(self, index: int) -> Layer:
        own = f"{self.weights.config.block_name(index)}."
        return Layer(
            index,
            self.connection(f"{own}hc_attn", f"{own}attn_norm.weight"),
            self.attention(f"{own}attn.", self.weights.config.attention_kind(index)),
            self.connection(f"{own}hc_ffn", f"{own}ffn_norm.weight"),
            self.gate(f"{own}ffn.gate", self.weights.config.is_hash_layer(index)),
            self.experts(f"{own}ffn.", index),
        )

    def connection(self, prefix: str, norm: str) -> Connection:
        fn, base, scale = (self.parameter(f"{prefix}_{name}") for name in ("fn", "base", "scale"))
        return Connection(fn, base, scale, self.parameter(norm))

    def attention(self, own: str, kind: AttentionKind) -> Attention:
        wo_a = self.matrix(f"{own}wo_a")
        grouped = wo_a.weight._replace(groups=self.weights.config.o_groups)
        sliding, csa = kind is AttentionKind.SLIDING, kind is AttentionKind.CSA
        return Attention(
            kind,
            wq_a=self.matrix(f"{own}wq_a"),
            q_norm=self.parameter(f"{own}q_norm.weight"),
            wq_b=self.matrix(f"{own}wq_b"),
            wkv=self.matrix(f"{own}wkv"),
            kv_norm=self.parameter(f"{own}kv_norm.weight"),
            sinks=self.parameter(f"{own}attn_sink"),
            wo_a=dataclasses.replace(wo_a, weight=grouped),
            wo_b=self.matrix(f"{own}wo_b"),
            compressor=None if sliding else self.compressor(f"{own}compressor."),
            indexer=self.indexer(f"{own}indexer.") if csa else None,
        )

    def indexer(self, own: str) -> Indexer:
        products = self.matrix(f"{own}wq_b"), self.matrix(f"{own}weights_proj")
        return Indexer(*products, self.compressor(f"{own}compressor."))

    def compressor(self, own: str) -> Compressor:
        products = self.matrix(f"{own}wkv"), self.matrix(f"{own}wgate")
        return Compressor(
            *products, self.parameter(f"{own}ape"), self.parameter(f"{own}norm.weight")
        )

    def gate(self, own: str, hashed: bool) -> Gate:
        matrix = self.matrix(own)
        if hashed:
            table = self.weights.tensor(f"{own}.tid2eid").to(torch.int64)
            return Gate(matrix, None, table)
        return Gate(matrix, self.parameter(f"{own}.bias"), None)

    def experts(self, own: str, index: int) -> Experts:
        return Experts(
            self.weights.layer_records(index),
            SharedExpert(*(self.matrix(f"{own}shared_experts.{n}") for n in ("w1", "w2", "w3"))),
        )

    def parameter(self, name: str) -> Tensor:
        """A small parameter as float32, whatever it was stored in."""
        return self.weights.tensor(name).to(torch.float32)

    def plain(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self.weights.tensor(name)
        if tensor.dtype != dtype:
            raise RuntimeRefusal(f"{name} is {tensor.dtype}, kernels read {dtype}")
        return tensor

    def matrix(self, name: str) -> MatrixOperand:
        found = self.weights.matrix(f"{name}.weight")
        if isinstance(found, Tensor):
            if found.dtype != torch.bfloat16:
                raise RuntimeRefusal(f"{name}.weight is {found.dtype}, kernels read bfloat16")
            return MatrixOperand(Weight("bf16", *found.shape), found)
        codes, slabs = found.codes.view(torch.uint8), found.codes.shape[0]
        if isinstance(found, Nvfp4Matrix):
            weight = Weight("nvfp4", found.rows, found.cols, slabs)
            return MatrixOperand(weight, codes, found.scales, found.global_scales)
        if found.scales.dtype != torch.float8_e8m0fnu:
            raise RuntimeRefusal(
                f"{name}.weight has {found.scales.dtype} scales, kernels read E8M0"
            )
        weight = Weight("fp8", found.rows, found.cols, slabs)
        return MatrixOperand(weight, codes, found.scales.view(torch.uint8))
