"""Every parameter a DeepSeek-V4 of a given configuration has, by its name on the hub.

This is the model as it was trained, before any dialect decides how a matrix is stored: a linear
layer is one `Parameter` here, and a pair (weight, scale) on disk. Matrices are `[out, in]`.
Reading order is the order of the data: embedding, layers, head, draft layers.

Draft layers come in two flavours. MTP: one block that mixes the next token's embedding with the
hidden state. DSpark: a chain of blocks fed by three backbone layers, with a low-rank Markov head
and a confidence head behind the last one.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterable, Iterator

from dsv4.formats.errors import ConfigError, SourceError
from dsv4.formats.model.config import AttentionKind, ModelConfig

MAX_PARAMETERS = 2_000_000  # ten times the largest release; a hostile config must not hang us
DSPARK_TAPS = 3  # backbone layers whose hidden states feed `main_proj`
MAX_DRAFT_STAGES = 16

_STAGE = re.compile(r"mtp\.(0|[1-9]\d{0,3})\.")


class DraftKind(enum.StrEnum):
    """Which draft module a checkpoint carries, as told by its tensor names."""

    NONE = "none"
    MTP = "mtp"
    DSPARK = "dspark"


class Kind(enum.StrEnum):
    """What a parameter is to a number format; a dialect maps each kind to stored tensors."""

    EXPERT = "expert"  # routed expert matrix [out, in]: MXFP4 in the official dialect
    LINEAR = "linear"  # dense matrix [out, in]: FP8 in 128x128 tiles in the official dialect
    PLAIN = "plain"  # embedding, head, router, compressor, norm: BF16
    FLOAT32 = "float32"  # mHC, sink, ape, router bias: float32 by necessity
    TABLE = "table"  # token id -> expert ids: integers


@dataclasses.dataclass(frozen=True, slots=True)
class Parameter:
    """One trained tensor: its hub name, what it is, and its logical shape."""

    name: str
    kind: Kind
    shape: tuple[int, ...]


def detect_draft(names: Iterable[str]) -> tuple[DraftKind, int]:
    """-> (draft flavour, number of stages `mtp.0` ... `mtp.N-1`), from tensor names alone.

    Raises SourceError when draft tensors are of no known flavour or a stage is missing.
    """
    kind = DraftKind.NONE
    stages: set[int] = set()
    for name in names:
        if match := _STAGE.match(name):
            stages.add(int(match[1]))
            if name == "mtp.0.e_proj.weight":
                kind = DraftKind.MTP
            elif name == "mtp.0.main_proj.weight":
                kind = DraftKind.DSPARK
    if not stages:
        return DraftKind.NONE, 0
    if kind is DraftKind.NONE:
        raise SourceError(
            "tensors mtp.* are present, but neither mtp.0.e_proj.weight (MTP) nor "
            "mtp.0.main_proj.weight (DSpark); a shard is missing or the draft flavour is unknown"
        )
    if stages != set(range(len(stages))) or len(stages) > MAX_DRAFT_STAGES:
        raise SourceError(
            f"draft stages are mtp.{sorted(stages)[: MAX_DRAFT_STAGES + 1]}, expected a gapless "
            f"run from mtp.0 of at most {MAX_DRAFT_STAGES}; a shard is missing"
        )
    return kind, len(stages)


def parameters(
    config: ModelConfig, draft: DraftKind = DraftKind.NONE, stages: int = 0
) -> Iterator[Parameter]:
    """Every parameter of the model: embedding, layers, head, then `stages` draft stages.

    Raises ConfigError when the configuration asks for an impossible number of them, or says
    nothing of a DSpark head that is there.
    """
    if (draft is DraftKind.NONE) != (stages == 0):
        raise ConfigError(f"{stages} draft stages do not go with a draft of kind '{draft}'")
    blocks = config.num_hidden_layers + stages
    if blocks * (3 * config.n_routed_experts + 64) > MAX_PARAMETERS:
        raise ConfigError(
            f"config: {blocks} layers of {config.n_routed_experts} experts are more than "
            f"{MAX_PARAMETERS} parameters, larger than any real model"
        )
    return _parameters(config, draft, stages)


def _parameters(config: ModelConfig, draft: DraftKind, stages: int) -> Iterator[Parameter]:
    table = (config.vocab_size, config.hidden_size)
    yield Parameter("embed.weight", Kind.PLAIN, table)
    for layer in range(config.num_hidden_layers):
        yield from _block(f"layers.{layer}", config, layer)
    yield from _collapse("", config)
    yield Parameter("head.weight", Kind.PLAIN, table)
    for stage in range(stages):
        yield from _block(f"mtp.{stage}", config, config.num_hidden_layers + stage)
        if draft is DraftKind.MTP:
            yield from _mtp(f"mtp.{stage}", config)
        else:
            yield from _dspark(f"mtp.{stage}", config, stage, stages)


def _block(at: str, config: ModelConfig, layer: int) -> Iterator[Parameter]:
    """One transformer block; draft blocks slide only and always have a score router."""
    hidden, streams = config.hidden_size, config.hc_mult * config.hidden_size
    yield Parameter(f"{at}.attn_norm.weight", Kind.PLAIN, (hidden,))
    yield Parameter(f"{at}.ffn_norm.weight", Kind.PLAIN, (hidden,))
    for sublayer in ("attn", "ffn"):
        yield Parameter(f"{at}.hc_{sublayer}_fn", Kind.FLOAT32, (config.hc_mix, streams))
        yield Parameter(f"{at}.hc_{sublayer}_base", Kind.FLOAT32, (config.hc_mix,))
        yield Parameter(f"{at}.hc_{sublayer}_scale", Kind.FLOAT32, (3,))
    yield from _attention(f"{at}.attn", config)
    if ratio := config.compress_ratio(layer):
        overlap = 2 if config.attention_kind(layer) is AttentionKind.CSA else 1
        yield from _compressor(f"{at}.attn.compressor", config, ratio, overlap, config.head_dim)
        if overlap == 2:
            yield from _indexer(f"{at}.attn.indexer", config, ratio)
    yield from _moe(f"{at}.ffn", config, hashed=config.is_hash_layer(layer))


def _attention(at: str, config: ModelConfig) -> Iterator[Parameter]:
    heads, group = config.num_attention_heads, config.num_attention_heads // config.o_groups
    hidden, head_dim, q_lora = config.hidden_size, config.head_dim, config.q_lora_rank
    o_rank = config.o_groups * config.o_lora_rank
    yield Parameter(f"{at}.attn_sink", Kind.FLOAT32, (heads,))
    yield Parameter(f"{at}.q_norm.weight", Kind.PLAIN, (q_lora,))
    yield Parameter(f"{at}.kv_norm.weight", Kind.PLAIN, (head_dim,))
    yield Parameter(f"{at}.wq_a.weight", Kind.LINEAR, (q_lora, hidden))
    yield Parameter(f"{at}.wq_b.weight", Kind.LINEAR, (heads * head_dim, q_lora))
    yield Parameter(f"{at}.wkv.weight", Kind.LINEAR, (head_dim, hidden))
    yield Parameter(f"{at}.wo_a.weight", Kind.LINEAR, (o_rank, group * head_dim))
    yield Parameter(f"{at}.wo_b.weight", Kind.LINEAR, (hidden, o_rank))


def _compressor(
    at: str, config: ModelConfig, ratio: int, overlap: int, width: int
) -> Iterator[Parameter]:
    yield Parameter(f"{at}.ape", Kind.FLOAT32, (ratio, overlap * width))
    yield Parameter(f"{at}.norm.weight", Kind.PLAIN, (width,))
    yield Parameter(f"{at}.wkv.weight", Kind.PLAIN, (overlap * width, config.hidden_size))
    yield Parameter(f"{at}.wgate.weight", Kind.PLAIN, (overlap * width, config.hidden_size))


def _indexer(at: str, config: ModelConfig, ratio: int) -> Iterator[Parameter]:
    heads, width = config.index_n_heads, config.index_head_dim
    yield Parameter(f"{at}.wq_b.weight", Kind.LINEAR, (heads * width, config.q_lora_rank))
    yield Parameter(f"{at}.weights_proj.weight", Kind.PLAIN, (heads, config.hidden_size))
    yield from _compressor(f"{at}.compressor", config, ratio, 2, width)


def _moe(at: str, config: ModelConfig, *, hashed: bool) -> Iterator[Parameter]:
    experts, topk = config.n_routed_experts, config.num_experts_per_tok
    yield Parameter(f"{at}.gate.weight", Kind.PLAIN, (experts, config.hidden_size))
    if hashed:
        yield Parameter(f"{at}.gate.tid2eid", Kind.TABLE, (config.vocab_size, topk))
    else:
        yield Parameter(f"{at}.gate.bias", Kind.FLOAT32, (experts,))
    yield from _swiglu(f"{at}.shared_experts", config, Kind.LINEAR)
    for expert in range(experts):
        yield from _swiglu(f"{at}.experts.{expert}", config, Kind.EXPERT)


def _swiglu(at: str, config: ModelConfig, kind: Kind) -> Iterator[Parameter]:
    """w1 is the gate, w3 the up, w2 the down projection."""
    hidden, inter = config.hidden_size, config.moe_intermediate_size
    yield Parameter(f"{at}.w1.weight", kind, (inter, hidden))
    yield Parameter(f"{at}.w2.weight", kind, (hidden, inter))
    yield Parameter(f"{at}.w3.weight", kind, (inter, hidden))


def _collapse(at: str, config: ModelConfig) -> Iterator[Parameter]:
    """From the residual streams back to one vector, and its norm; `at` ends with '.' or is ''."""
    streams = config.hc_mult * config.hidden_size
    yield Parameter(f"{at}hc_head_fn", Kind.FLOAT32, (config.hc_mult, streams))
    yield Parameter(f"{at}hc_head_base", Kind.FLOAT32, (config.hc_mult,))
    yield Parameter(f"{at}hc_head_scale", Kind.FLOAT32, (1,))
    yield Parameter(f"{at}norm.weight", Kind.PLAIN, (config.hidden_size,))


def _mtp(at: str, config: ModelConfig) -> Iterator[Parameter]:
    hidden = config.hidden_size
    yield Parameter(f"{at}.e_proj.weight", Kind.LINEAR, (hidden, hidden))
    yield Parameter(f"{at}.h_proj.weight", Kind.LINEAR, (hidden, hidden))
    yield Parameter(f"{at}.enorm.weight", Kind.PLAIN, (hidden,))
    yield Parameter(f"{at}.hnorm.weight", Kind.PLAIN, (hidden,))
    yield from _collapse(f"{at}.", config)


def _dspark(at: str, config: ModelConfig, stage: int, stages: int) -> Iterator[Parameter]:
    hidden, rank = config.hidden_size, config.dspark_markov_rank
    if rank is None:
        raise ConfigError(
            "config.json: dspark_markov_rank is missing, expected an integer since the checkpoint "
            "holds DSpark draft layers"
        )
    if stage == 0:
        yield Parameter(f"{at}.main_proj.weight", Kind.LINEAR, (hidden, DSPARK_TAPS * hidden))
        yield Parameter(f"{at}.main_norm.weight", Kind.PLAIN, (hidden,))
    if stage == stages - 1:
        yield from _collapse(f"{at}.", config)
        for factor in ("markov_w1", "markov_w2"):
            name = f"{at}.markov_head.{factor}.weight"
            yield Parameter(name, Kind.PLAIN, (config.vocab_size, rank))
        yield Parameter(f"{at}.confidence_head.proj.weight", Kind.PLAIN, (1, hidden + rank))
