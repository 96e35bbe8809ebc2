"""The official checkpoint dialect: which stored tensors each parameter becomes, and the check.

Stored form of each kind:
    EXPERT   `.weight` I8 `[out, in/2]`, two E2M1 codes a byte, low nibble = even column;
             `.scale` F8_E8M0 `[out, in/32]`
    LINEAR   `.weight` F8_E4M3 `[out, in]`; `.scale` F8_E8M0 `[ceil(out/128), ceil(in/128)]`
    PLAIN    BF16        FLOAT32  F32        TABLE  I64
Another dialect is another function from a Parameter to the tensors that store it.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from dsv4.formats.config import ModelConfig
from dsv4.formats.errors import SourceError
from dsv4.formats.inventory import DraftKind, Kind, Parameter, detect_draft, parameters
from dsv4.formats.safetensors_header import TensorEntry

FP4_BLOCK = 32
FP8_BLOCK = 128
NAMES_SHOWN = 3

_VISION = re.compile(r"(?:vision|aligner)\..*|image_[a-z]+|.*\.ffn\.gate\.bias_vl")
_ROUTER_BIAS = ".ffn.gate.bias"


@dataclasses.dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """A stored tensor a dialect expects: hub name, acceptable safetensors dtypes, stored shape."""

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


Dialect = Callable[[Parameter], Iterator[ExpectedTensor]]


@dataclasses.dataclass(frozen=True)
class Inventory:
    """What a checkpoint holds, once every tensor in it is explained.

    by_dtype: safetensors dtype -> (tensors, bytes). skipped: vision tensors, which dsv4 leaves
    behind; they are in none of the counts.
    """

    draft: DraftKind
    draft_stages: int
    by_dtype: Mapping[str, tuple[int, int]]
    skipped: tuple[str, ...]

    @property
    def tensors(self) -> int:
        """Stored tensors of the language model and its draft layers."""
        return sum(count for count, _ in self.by_dtype.values())

    @property
    def payload_bytes(self) -> int:
        """Their bytes, without file headers."""
        return sum(size for _, size in self.by_dtype.values())


def scale_name(weight_name: str) -> str:
    """The block scales' name of a quantised weight: `X.weight` -> `X.scale`."""
    return weight_name.removesuffix("weight") + "scale"


def official(parameter: Parameter) -> Iterator[ExpectedTensor]:
    """The stored tensors of one parameter in the official dialect.

    Raises SourceError when an expert's columns do not divide into FP4 blocks.
    """
    name, shape = parameter.name, parameter.shape
    if parameter.kind is Kind.EXPERT:
        rows, cols = shape
        if cols % FP4_BLOCK:
            raise SourceError(
                f"{name} has {cols} columns, expected a multiple of {FP4_BLOCK} for FP4 blocks"
            )
        yield ExpectedTensor(name, ("I8",), (rows, cols // 2))
        yield ExpectedTensor(scale_name(name), ("F8_E8M0",), (rows, cols // FP4_BLOCK))
    elif parameter.kind is Kind.LINEAR:
        tiles = tuple(-(-size // FP8_BLOCK) for size in shape)
        yield ExpectedTensor(name, ("F8_E4M3",), shape)
        yield ExpectedTensor(scale_name(name), ("F8_E8M0",), tiles)
    else:
        yield ExpectedTensor(name, (_PLAIN_DTYPES[parameter.kind],), shape)


_PLAIN_DTYPES = {Kind.PLAIN: "BF16", Kind.FLOAT32: "F32", Kind.TABLE: "I64"}


def expected_tensors(
    config: ModelConfig,
    draft: DraftKind = DraftKind.NONE,
    stages: int | None = None,
    dialect: Dialect = official,
) -> Iterator[ExpectedTensor]:
    """Every stored tensor of a checkpoint, in reading order.

    stages: draft stages; the configuration's number when not given.
    Raises ConfigError or SourceError when the configuration cannot be stored in the dialect.
    """
    if stages is None:
        stages = 0 if draft is DraftKind.NONE else config.num_draft_layers
    for parameter in parameters(config, draft, stages):
        yield from dialect(parameter)


def is_vision(name: str) -> bool:
    """Whether a tensor serves images only: tower, aligner, sentinels, the routers' image bias."""
    return _VISION.fullmatch(name) is not None


def check_inventory(
    entries: Mapping[str, TensorEntry], config: ModelConfig, dialect: Dialect = official
) -> Inventory:
    """Explain every tensor of a checkpoint, or refuse it.

    Raises SourceError with counts and the first names of what is missing, unexplained, or of
    another dtype or shape than the configuration implies.
    """
    draft, stages = detect_draft(entries)
    missing: list[str] = []
    wrong: list[str] = []
    totals: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    expected_names: set[str] = set()
    for expected in expected_tensors(config, draft, stages, dialect):
        expected_names.add(expected.name)
        entry = entries.get(expected.name)
        if entry is None:
            missing.append(expected.name)
        elif entry.dtype not in expected.dtypes or entry.shape != expected.shape:
            wrong.append(
                f"{expected.name} is {entry.dtype} {list(entry.shape)}, expected "
                f"{' or '.join(expected.dtypes)} {list(expected.shape)}"
            )
        else:
            totals[entry.dtype] += 1
            sizes[entry.dtype] += entry.nbytes
    skipped, extra = _split_rest(entries, expected_names)
    _refuse_differences(missing, extra, wrong, len(expected_names))
    by_dtype = {dtype: (totals[dtype], sizes[dtype]) for dtype in sorted(totals)}
    return Inventory(draft, stages, by_dtype, tuple(skipped))


def _split_rest(entries: Iterable[str], expected: set[str]) -> tuple[list[str], list[str]]:
    """-> (vision tensors, unexplained tensors) among the names that were not expected."""
    rest = sorted(set(entries) - expected)
    # Vision checkpoints also give hash-routed layers a router bias, which text tokens never use;
    # it is theirs only where the image bias stands beside it.
    vision = {
        name
        for name in rest
        if is_vision(name) or (name.endswith(_ROUTER_BIAS) and f"{name}_vl" in entries)
    }
    return sorted(vision), [name for name in rest if name not in vision]


def _refuse_differences(
    missing: list[str], extra: list[str], wrong: list[str], expected: int
) -> None:
    problems = [
        f"{len(found)} {what} ({_first(found)})"
        for what, found in (
            ("missing", missing),
            ("unexplained", extra),
            ("of another dtype or shape", wrong),
        )
        if found
    ]
    if problems:
        raise SourceError(
            f"of {expected} tensors that config.json implies: {', '.join(problems)}; check that "
            "every shard arrived and that config.json belongs to this checkpoint"
        )


def _first(found: list[str]) -> str:
    return "; ".join(found[:NAMES_SHOWN]) + ("; ..." if len(found) > NAMES_SHOWN else "")
