"""Every tensor of a checkpoint explained, or the checkpoint refused.

The entries are grouped into logical tensors whatever their dialect (`dialects`), and held against
the parameters that the configuration implies (`inventory`): nothing missing, nothing extra, every
shape as expected, every encoding one that this kind of tensor can have. Whether a tensor is MXFP4,
NVFP4, FP8 or plain is its own affair: dialects mix within one file.

Left behind, with a notice: tensors that serve images only, scales of activations and of k/v
caches, and the copies of the embedding and the head that some writers put beside the draft layers.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from dsv4.formats.errors import SourceError
from dsv4.formats.model.closest_name import closest_name
from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.dialects import group
from dsv4.formats.model.inventory import DraftKind, Kind, Parameter, detect_draft, parameters
from dsv4.formats.model.safetensors_header import TensorEntry
from dsv4.formats.model.source_tensor import FLOATS, INTEGERS, Encoding, SourceTensor

NAMES_SHOWN = 3

_VISION = re.compile(r"(?:model\.)?(?:(?:vision|aligner)\..*|image_[a-z]+|.*\.ffn\.gate\.bias_vl)")
_ROUTER_BIAS = ".ffn.gate.bias"
_DRAFT_COPY = re.compile(r"mtp\.\d+\.(?:emb\.tok_emb|embed|embed_tokens|(?P<head>(?:lm_)?head))")

# Where in an attention module a tool hangs its quantisers is the tool's affair: `k_proj.k_scale`,
# `attn.k_scale`, `kv_cache.k_scale`, ...
_ACTIVATION_SCALE = re.compile(
    r"(?:model\.)?(?:layers|mtp)\.\d+\.(?:self_)?attn\.(?:\w+\.)*"
    r"(?:[kvq]|kv|kv_cache|prob|input|output)_scale"
)

_PLAIN = (Encoding.PLAIN,)
_MATRIX = (Encoding.FP8, Encoding.NVFP4, Encoding.PLAIN)
_ENCODINGS: Mapping[Kind, tuple[Encoding, ...]] = {
    Kind.EXPERT: (Encoding.MXFP4, *_MATRIX),
    Kind.LINEAR: _MATRIX,
    Kind.PLAIN: _MATRIX,
    Kind.FLOAT32: _PLAIN,
    Kind.TABLE: _PLAIN,
}


@dataclasses.dataclass(frozen=True)
class Inventory:
    """What a checkpoint holds, once every tensor in it is explained.

    by_name: the logical tensors, in the order of the files. by_dtype: safetensors dtype ->
    (entries, bytes) of the language model and its draft layers, scales of activations included.
    vision: entries that serve images only. copies: draft copies of embedding and head -> the name
    they must equal. Neither is in the counts. attention_scales: scales of activations and caches
    of attention. values: tensors that a kernel takes as BF16 or F32 values, whatever they are here.
    """

    draft: DraftKind
    draft_stages: int
    by_name: Mapping[str, SourceTensor]
    by_dtype: Mapping[str, tuple[int, int]]
    vision: tuple[str, ...] = ()
    copies: tuple[tuple[SourceTensor, str], ...] = ()
    attention_scales: tuple[TensorEntry, ...] = ()
    values: frozenset[str] = frozenset()

    @property
    def tensors(self) -> int:
        """Stored tensors of the language model and its draft layers."""
        return sum(count for count, _ in self.by_dtype.values())

    @property
    def payload_bytes(self) -> int:
        """Their bytes, without file headers."""
        return sum(size for _, size in self.by_dtype.values())

    @property
    def input_scales(self) -> int:
        """Scales of activations and caches: in the counts, but not carried."""
        beside = sum(len(tensor.ignored) for tensor in self.by_name.values())
        return beside + len(self.attention_scales)


def is_vision(name: str) -> bool:
    """Whether a tensor serves images only: tower, aligner, sentinels, the routers' image bias."""
    return _VISION.fullmatch(name) is not None


def check_inventory(entries: Mapping[str, TensorEntry], config: ModelConfig) -> Inventory:
    """Explain every tensor of a checkpoint of any dialect, or refuse it.

    Raises SourceError with counts and the first names of what is missing, unexplained, malformed,
    or of another encoding or shape than the configuration implies.
    """
    vision = [name for name in entries if is_vision(name)]
    scales = tuple(entry for entry in entries.values() if _is_attention_scale(entry, config))
    aside = {*vision, *(entry.name for entry in scales)}
    grouped = group({name: entry for name, entry in entries.items() if name not in aside})
    found = dict(grouped.tensors)
    draft, stages = detect_draft([*found, *grouped.problems])
    missing: list[str] = []
    wrong: list[str] = list(grouped.problems.values())
    expected: dict[str, Parameter] = {}
    for parameter in parameters(config, draft, stages):
        expected[parameter.name] = parameter
        tensor = found.get(parameter.name)
        if tensor is not None:
            wrong += _difference(parameter, tensor)
        elif parameter.name not in grouped.problems:
            missing.append(parameter.name)
    rest = {name: tensor for name, tensor in found.items() if name not in expected}
    copies = _draft_copies(rest, expected, draft)
    vision += _image_bias(rest, vision)
    unknown = rest.keys() - {tensor.name for tensor, _ in copies} - set(vision)
    extra = sorted(rest[name].weight.name for name in unknown)
    _refuse_differences(missing, extra, wrong, expected)
    by_name = {name: tensor for name, tensor in found.items() if name in expected}
    totals = _totals(by_name.values(), scales)
    values = frozenset(name for name, one in expected.items() if one.kind is Kind.PLAIN)
    return Inventory(draft, stages, by_name, totals, tuple(vision), copies, scales, values)


def _is_attention_scale(entry: TensorEntry, config: ModelConfig) -> bool:
    """Whether it is a scale of activations or of a cache: one number, or one for each head."""
    return (
        _ACTIVATION_SCALE.fullmatch(entry.name) is not None
        and entry.dtype in FLOATS
        and 0 < math.prod(entry.shape) <= config.num_attention_heads
    )


def _difference(parameter: Parameter, tensor: SourceTensor) -> list[str]:
    """What is wrong with `tensor`, in a sentence, or nothing."""
    kind = parameter.kind
    dtypes = INTEGERS if kind is Kind.TABLE else FLOATS
    dtype_ok = tensor.encoding is not Encoding.PLAIN or tensor.weight.dtype in dtypes
    if tensor.shape == parameter.shape and tensor.encoding in _ENCODINGS[kind] and dtype_ok:
        return []
    plain = tensor.encoding is Encoding.PLAIN
    encodings = ", ".join(str(e) for e in _ENCODINGS[kind] if e is not Encoding.PLAIN)
    return [
        f"{tensor.name} is {tensor.weight.dtype if plain else tensor.encoding} "
        f"{list(tensor.shape)}, expected {encodings + ', ' if encodings else ''}"
        f"{' or '.join(dtypes)} {list(parameter.shape)}"
    ]


def _draft_copies(
    rest: Mapping[str, SourceTensor], expected: Mapping[str, Parameter], draft: DraftKind
) -> tuple[tuple[SourceTensor, str], ...]:
    """Copies of embedding and head beside the draft layers, each with the name it copies."""
    copies = []
    for name, tensor in rest.items():
        match = _DRAFT_COPY.fullmatch(name.removesuffix(".weight"))
        if match and draft is not DraftKind.NONE and tensor.encoding is Encoding.PLAIN:
            original = "head.weight" if match["head"] else "embed.weight"
            if tensor.shape == expected[original].shape and tensor.weight.dtype in FLOATS:
                copies.append((tensor, original))
    return tuple(copies)


def _image_bias(rest: Iterable[str], vision: Iterable[str]) -> list[str]:
    """Router biases of hash-routed layers in a vision checkpoint, which text tokens never use.

    They are the image's only where its own bias stands beside them.
    """
    beside = {name.removeprefix("model.").removesuffix("_vl") for name in vision}
    return [name for name in rest if name.endswith(_ROUTER_BIAS) and name in beside]


def _totals(
    tensors: Iterable[SourceTensor], scales: Sequence[TensorEntry]
) -> dict[str, tuple[int, int]]:
    names: dict[str, set[str]] = {}  # fused experts are many parts of one entry
    sizes: Counter[str] = Counter()
    for entries in (scales, *((*one.entries.values(), *one.ignored) for one in tensors)):
        for entry in entries:
            names.setdefault(entry.dtype, set()).add(entry.name)
            sizes[entry.dtype] += entry.nbytes
    return {dtype: (len(names[dtype]), sizes[dtype]) for dtype in sorted(names)}


def _refuse_differences(
    missing: Sequence[str], extra: Sequence[str], wrong: Sequence[str], expected: Iterable[str]
) -> None:
    known = list(expected)
    problems = [
        f"{len(found)} {what} ({_first(found)})"
        for what, found in (
            ("missing", missing),
            ("unexplained", extra),
            ("malformed or of another dtype or shape", wrong),
        )
        if found
    ]
    if problems:
        closest = closest_name(extra[0], missing or known) if extra else None
        hint = f"; the closest known name is {closest}, for {extra[0]}" if closest else ""
        raise SourceError(
            f"of {len(known)} tensors that config.json implies: {', '.join(problems)}{hint}; check "
            "that every shard arrived and that config.json belongs to this checkpoint"
        )


def _first(found: Sequence[str]) -> str:
    return "; ".join(found[:NAMES_SHOWN]) + ("; ..." if len(found) > NAMES_SHOWN else "")
