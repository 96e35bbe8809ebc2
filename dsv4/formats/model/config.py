"""The model configuration: one frozen dataclass, read from either dialect of `config.json`.

The hub's files name attention kinds by `compress_ratios` (0 sliding, 4 CSA, 128 HCA) and
RoPE scaling by a flat `rope_scaling`. transformers' `save_pretrained` rewrites them into
`layer_types`, `mlp_layer_types`, `compress_rates` and nested `rope_parameters`. Both end here.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

from dsv4.formats.errors import ConfigError

SUPPORTED_MODEL_TYPE = "deepseek_v4"
MAX_INTEGER = 1 << 31

_TRANSFORMERS_KINDS = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}


class AttentionKind(enum.StrEnum):
    """What a layer attends to besides its sliding window."""

    SLIDING = "sliding"
    CSA = "csa"  # compressed sparse: overlapping blocks, chosen by the Lightning indexer
    HCA = "hca"  # heavily compressed: long blocks, all visible ones attended


@dataclasses.dataclass(frozen=True)
class YarnConfig:
    """YaRN scaling of the compressed layers' RoPE (no mscale: attention factor is 1)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything the forward pass and the tensor inventory need. Field names are the hub's."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    num_hash_layers: int
    compress_ratios: tuple[int, ...]  # one per backbone layer; 0 = sliding window only
    csa_ratio: int = 4
    n_shared_experts: int = 1
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    sliding_window: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    yarn: YarnConfig | None = None
    max_position_embeddings: int = 1048576
    num_draft_layers: int = 0
    dspark_markov_rank: int | None = None
    dspark_block_size: int | None = None
    # Of no store's record, whose bytes they would change: read from the config.json it carries.
    dspark_noise_token_id: int | None = dataclasses.field(default=None, compare=False)
    dspark_target_layer_ids: tuple[int, ...] | None = dataclasses.field(default=None, compare=False)
    bos_token_id: int = 0
    eos_token_ids: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        _check(self)

    def attention_kind(self, layer: int) -> AttentionKind:
        """The attention kind of backbone layer `layer`; draft layers are always SLIDING."""
        ratio = self.compress_ratio(layer)
        if ratio == 0:
            return AttentionKind.SLIDING
        return AttentionKind.CSA if ratio == self.csa_ratio else AttentionKind.HCA

    def compress_ratio(self, layer: int) -> int:
        """Tokens per compressed entry of layer `layer` (0: no compressor)."""
        return self.compress_ratios[layer] if layer < self.num_hidden_layers else 0

    def block_name(self, layer: int) -> str:
        """The hub's name of layer `layer`; the draft layers follow those of the backbone."""
        stage = layer - self.num_hidden_layers
        return f"layers.{layer}" if stage < 0 else f"mtp.{stage}"

    def is_hash_layer(self, layer: int) -> bool:
        """Whether experts of layer `layer` are chosen by token id instead of by score."""
        return layer < self.num_hash_layers

    @property
    def hc_mix(self) -> int:
        """Rows of an mHC mixing matrix: pre + post + comb = (2 + hc_mult)·hc_mult."""
        return (2 + self.hc_mult) * self.hc_mult

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for `from_dict`: all but what `with_draft_of` adds."""
        record = dataclasses.asdict(self)
        return {name: value for name, value in record.items() if name not in _OF_CONFIG_JSON}

    def with_draft_of(self, raw: Mapping[str, Any]) -> ModelConfig:
        """Add what only a `config.json` says of DSpark. Raises ConfigError as `from_hf`."""
        return dataclasses.replace(self, **_draft_fields(raw))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read what `to_dict` wrote. Raises ConfigError on unknown or missing fields."""
        known = {f.name for f in dataclasses.fields(cls)} - {*_OF_CONFIG_JSON}
        if unknown := sorted(set(raw) - known):
            raise ConfigError(f"model config has unknown fields {unknown}; made by another version")
        values = dict(raw)
        try:
            if values.get("yarn") is not None:
                values["yarn"] = YarnConfig(**values["yarn"])
            values["compress_ratios"] = tuple(values["compress_ratios"])
            values["eos_token_ids"] = tuple(values.get("eos_token_ids", (1,)))
            return cls(**values)
        except (TypeError, KeyError) as error:
            raise ConfigError(f"model config is incomplete: {error}") from None

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read a `config.json` in the hub's or in transformers' dialect.

        Raises ConfigError naming the field, what was found and what was expected.
        """
        _refuse_other_models(raw)
        layers = _integer(raw, "num_hidden_layers")
        ratios, csa_ratio, draft_layers = _attention_schedule(raw, layers)
        head_dim = _integer(raw, "head_dim")
        main_theta, compress_theta, yarn = _rope(raw)
        fields: dict[str, Any] = {name: _integer(raw, name) for name in _REQUIRED_INTEGERS}
        for name, read in _OPTIONAL_FIELDS.items():
            if raw.get(name) is not None:
                fields[name] = read(raw, name)
        return cls(
            **fields,
            **_draft_fields(raw),
            num_hidden_layers=layers,
            head_dim=head_dim,
            qk_rope_head_dim=_rope_head_dim(raw, head_dim),
            num_hash_layers=_hash_layers(raw, layers),
            compress_ratios=ratios,
            csa_ratio=csa_ratio,
            num_draft_layers=draft_layers,
            rope_theta=main_theta,
            compress_rope_theta=compress_theta,
            yarn=yarn,
            eos_token_ids=_eos_token_ids(raw),
        )


_OF_CONFIG_JSON = ("dspark_noise_token_id", "dspark_target_layer_ids")


def _draft_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `_OF_CONFIG_JSON` that a config.json has."""
    noise, layers = (raw.get(name) for name in _OF_CONFIG_JSON)
    found: dict[str, Any] = {}
    if noise is not None:
        found["dspark_noise_token_id"] = _integer(raw, "dspark_noise_token_id")
    if layers is not None:
        if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
            raise ConfigError(
                f"config.json: dspark_target_layer_ids is {layers!r:.80}, expected layer numbers"
            )
        found["dspark_target_layer_ids"] = tuple(layers)
    return found


def _integer(raw: Mapping[str, Any], name: str) -> int:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"config.json: {name} is {value!r:.80}, expected an integer")
    return value


def _number(raw: Mapping[str, Any], name: str) -> float:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"config.json: {name} is {value!r:.80}, expected a finite number")
    return float(value)


def _object(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = raw.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {name} is {value!r:.80}, expected an object")
    return value or {}


def _eos_token_ids(raw: Mapping[str, Any]) -> tuple[int, ...]:
    value = raw.get("eos_token_id", 1)
    ids = value if isinstance(value, list) else [value]
    if not ids or not all(type(token) is int and token >= 0 for token in ids):
        raise ConfigError(f"config.json: eos_token_id is {value!r:.80}, expected token ids")
    return tuple(ids)


_REQUIRED_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "q_lora_rank",
    "o_lora_rank",
    "o_groups",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
)

_OPTIONAL_FIELDS = {
    "n_shared_experts": _integer,
    "routed_scaling_factor": _number,
    "swiglu_limit": _number,
    "sliding_window": _integer,
    "index_n_heads": _integer,
    "index_head_dim": _integer,
    "index_topk": _integer,
    "hc_mult": _integer,
    "hc_sinkhorn_iters": _integer,
    "hc_eps": _number,
    "rms_norm_eps": _number,
    "max_position_embeddings": _integer,
    "dspark_markov_rank": _integer,
    "dspark_block_size": _integer,
    "bos_token_id": _integer,
}


def _refuse_other_models(raw: Mapping[str, Any]) -> None:
    model_type = raw.get("model_type")
    if model_type == "deepseek_v41":
        raise ConfigError(
            "config.json: model_type is 'deepseek_v41', another architecture (shared compressed "
            "KV, Engram tables, 32x32 FP8 blocks); dsv4 handles 'deepseek_v4' only"
        )
    if model_type != SUPPORTED_MODEL_TYPE:
        raise ConfigError(
            f"config.json: model_type is {model_type!r:.80}, expected {SUPPORTED_MODEL_TYPE!r}"
        )
    scoring = raw.get("scoring_func", "sqrtsoftplus")
    if scoring != "sqrtsoftplus":
        raise ConfigError(f"config.json: scoring_func is {scoring!r:.80}, expected 'sqrtsoftplus'")
    if (norm := raw.get("norm_topk_prob", True)) is not True:
        raise ConfigError(f"config.json: norm_topk_prob is {json.dumps(norm):.80}, expected true")
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"config.json: hidden_act is {raw['hidden_act']!r:.80}, expected 'silu'")
    if raw.get("tie_word_embeddings"):
        raise ConfigError("config.json: tie_word_embeddings is true, expected separate matrices")
    heads = raw.get("num_key_value_heads", 1)
    if type(heads) is not int or heads != 1:
        raise ConfigError(f"config.json: num_key_value_heads is {heads!r:.80}, expected 1")
    for flag in ("attention_bias", "mlp_bias"):
        if raw.get(flag):
            raise ConfigError(f"config.json: {flag} is true, expected matrices without biases")


def _attention_schedule(raw: Mapping[str, Any], layers: int) -> tuple[tuple[int, ...], int, int]:
    """-> (ratio per backbone layer, the CSA ratio, number of draft layers)."""
    ratios = raw.get("compress_ratios")
    if ratios is not None:
        if not isinstance(ratios, list) or not all(type(r) is int for r in ratios):
            raise ConfigError("config.json: compress_ratios is not a list of integers")
        if len(ratios) < layers:
            raise ConfigError(
                f"config.json: compress_ratios has {len(ratios)} entries, expected at least "
                f"num_hidden_layers = {layers}"
            )
        if bad := sorted(set(ratios) - {0, 4, 128}):
            raise ConfigError(
                f"config.json: compress_ratios holds {bad!s:.80}, expected 0, 4 or 128"
            )
        return tuple(ratios[:layers]), 4, len(ratios) - layers
    kinds = raw.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ConfigError(
            "config.json: neither compress_ratios (hub) nor layer_types (transformers) "
            f"with {layers} entries was found"
        )
    rates = dict(_TRANSFORMERS_KINDS) | dict(_object(raw, "compress_rates"))
    table = {name: _integer(rates, name) for name in _TRANSFORMERS_KINDS}
    if bad_kinds := [kind for kind in kinds if not isinstance(kind, str) or kind not in table]:
        raise ConfigError(
            f"config.json: layer_types holds {bad_kinds!s:.80}, expected {sorted(table)}"
        )
    return (
        tuple(table[kind] for kind in kinds),
        table["compressed_sparse_attention"],
        # transformers drops mtp.* on load, so a file it saved has no draft layers.
        0,
    )


def _hash_layers(raw: Mapping[str, Any], layers: int) -> int:
    if raw.get("num_hash_layers") is not None:
        return _integer(raw, "num_hash_layers")
    kinds = raw.get("mlp_layer_types")
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ConfigError(
            "config.json: neither num_hash_layers (hub) nor mlp_layer_types (transformers) "
            f"with {layers} entries was found"
        )
    count = kinds.count("hash_moe")
    if kinds != ["hash_moe"] * count + ["moe"] * (layers - count):
        raise ConfigError(
            f"config.json: mlp_layer_types is {kinds!s:.80}, expected hash_moe layers first, "
            "then moe"
        )
    return count


def _rope_head_dim(raw: Mapping[str, Any], head_dim: int) -> int:
    if raw.get("qk_rope_head_dim") is not None:
        return _integer(raw, "qk_rope_head_dim")
    if raw.get("partial_rotary_factor") is None:
        raise ConfigError(
            "config.json: neither qk_rope_head_dim (hub) nor partial_rotary_factor (transformers) "
            "was found"
        )
    factor = _number(raw, "partial_rotary_factor")
    if not 0.0 < factor <= 1.0:
        raise ConfigError(
            f"config.json: partial_rotary_factor is {factor}, expected a part of head_dim"
        )
    return int(min(head_dim, MAX_INTEGER) * factor)


def _rope(raw: Mapping[str, Any]) -> tuple[float, float, YarnConfig | None]:
    """-> (theta of sliding layers, theta of compressed layers, YaRN of compressed layers)."""
    nested = _object(raw, "rope_parameters")
    main, compress = nested.get("main"), nested.get("compress")
    if isinstance(main, Mapping) and isinstance(compress, Mapping):
        return (
            _number(main, "rope_theta"),
            _number(compress, "rope_theta"),
            _yarn(compress),
        )
    theta = _number(raw, "rope_theta") if "rope_theta" in raw else 10000.0
    compress_theta = (
        _number(raw, "compress_rope_theta") if "compress_rope_theta" in raw else 160000.0
    )
    return theta, compress_theta, _yarn(_object(raw, "rope_scaling") or nested)


def _yarn(raw: Mapping[str, Any]) -> YarnConfig | None:
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigError(f"config.json: rope scaling is {kind!r:.80}, expected 'yarn' or none")
    if raw.get("attention_factor") not in (None, 1.0):
        raise ConfigError(
            f"config.json: attention_factor is {raw['attention_factor']!r:.80}, expected 1.0"
        )
    return YarnConfig(
        factor=_number(raw, "factor"),
        original_max_position_embeddings=_integer(raw, "original_max_position_embeddings"),
        beta_fast=_number({"beta_fast": 32.0, **raw}, "beta_fast"),
        beta_slow=_number({"beta_slow": 1.0, **raw}, "beta_slow"),
    )


_MAY_BE_ZERO = ("num_hash_layers", "num_draft_layers", "bos_token_id", "dspark_noise_token_id")


def _check(c: ModelConfig) -> None:
    """Refuse contradictions here, so that nothing later has to."""
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        zero_ok = field.name in _MAY_BE_ZERO
        if type(value) is int and (value < 0 or (value == 0 and not zero_ok)):
            raise ConfigError(f"config: {field.name} is {value}, expected a positive integer")
        if type(value) is int and value > MAX_INTEGER:
            raise ConfigError(f"config: {field.name} is {value}, larger than any real model's")
        if type(value) is float and value < 0:
            raise ConfigError(f"config: {field.name} is {value}, expected a positive number")
    for name, value in ({} if c.yarn is None else dataclasses.asdict(c.yarn)).items():
        if not 0 < value <= MAX_INTEGER:
            raise ConfigError(f"config: {name} of YaRN is {value}, expected a positive number")
    if bad := [ratio for ratio in c.compress_ratios if not 0 <= ratio <= 1 << 16]:
        raise ConfigError(f"config: compress_ratios holds {bad[0]}, expected 0 or a block length")
    if len(c.compress_ratios) != c.num_hidden_layers:
        raise ConfigError(
            f"config: {len(c.compress_ratios)} compress ratios for {c.num_hidden_layers} layers"
        )
    if c.num_hash_layers > c.num_hidden_layers:
        raise ConfigError(
            f"config: num_hash_layers {c.num_hash_layers} exceeds {c.num_hidden_layers} layers"
        )
    if c.num_experts_per_tok > c.n_routed_experts:
        raise ConfigError(
            f"config: num_experts_per_tok {c.num_experts_per_tok} exceeds "
            f"n_routed_experts {c.n_routed_experts}"
        )
    if c.n_shared_experts != 1:
        raise ConfigError(f"config: n_shared_experts is {c.n_shared_experts}, expected 1")
    if c.num_attention_heads % c.o_groups:
        raise ConfigError(
            f"config: {c.num_attention_heads} heads do not divide into {c.o_groups} o_groups"
        )
    for name in ("head_dim", "index_head_dim"):
        if getattr(c, name) < c.qk_rope_head_dim:
            raise ConfigError(
                f"config: {name} {getattr(c, name)} is smaller than "
                f"qk_rope_head_dim {c.qk_rope_head_dim}"
            )
    if c.qk_rope_head_dim % 2:
        raise ConfigError(f"config: qk_rope_head_dim {c.qk_rope_head_dim} is odd")
    if c.index_head_dim & (c.index_head_dim - 1):
        raise ConfigError(
            f"config: index_head_dim {c.index_head_dim} is no power of two (Hadamard rotation)"
        )
    _check_dspark(c)


def _check_dspark(c: ModelConfig) -> None:
    noise, layers = c.dspark_noise_token_id, c.dspark_target_layer_ids
    if noise is not None and noise >= c.vocab_size:
        raise ConfigError(
            f"config: dspark_noise_token_id is {noise}, expected one of {c.vocab_size} ids"
        )
    if layers is None:
        return
    ascending = all(low < high for low, high in itertools.pairwise((-1, *layers)))
    if not ascending or not layers or layers[-1] >= c.num_hidden_layers:
        raise ConfigError(
            f"config: dspark_target_layer_ids is {list(layers)!s:.80}, expected ascending layers "
            f"below num_hidden_layers = {c.num_hidden_layers}"
        )
