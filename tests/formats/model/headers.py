"""What each published dialect stores for a parameter, written down from the publishers' own lists.

Headers only: names, dtypes and shapes. Source: the hub's file listings, ModelOpt's exporter
(`examples/deepseek/deepseek_v4/quantize_to_nvfp4.py`), the `-Base` dtype listing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from dsv4.formats.model.config import ModelConfig
from dsv4.formats.model.inventory import DraftKind, Kind, Parameter, parameters
from dsv4.formats.model.safetensors_header import DTYPE_BITS, TensorEntry


class Stored(NamedTuple):
    """One stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]


Dialect = Callable[[Parameter], Iterator[Stored]]
Entries = dict[str, TensorEntry]

_PLAIN = {Kind.PLAIN: "BF16", Kind.FLOAT32: "F32", Kind.TABLE: "I64"}


def _beside(parameter: Parameter, leaf: str) -> str:
    return parameter.name.removesuffix("weight") + leaf


def _tiles(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // 128) for size in shape)


def official(parameter: Parameter) -> Iterator[Stored]:
    """DeepSeek's instruct releases: MXFP4 experts, FP8 dense matrices."""
    name, shape = parameter.name, parameter.shape
    if parameter.kind is Kind.EXPERT:
        rows, cols = shape
        yield Stored(name, "I8", (rows, cols // 2))
        yield Stored(_beside(parameter, "scale"), "F8_E8M0", (rows, cols // 32))
    elif parameter.kind is Kind.LINEAR:
        yield Stored(name, "F8_E4M3", shape)
        yield Stored(_beside(parameter, "scale"), "F8_E8M0", _tiles(shape))
    else:
        yield Stored(name, _PLAIN[parameter.kind], shape)


def base(parameter: Parameter) -> Iterator[Stored]:
    """`-Base`: experts in FP8 like the dense matrices, every scale F32."""
    if parameter.kind in (Kind.EXPERT, Kind.LINEAR):
        yield Stored(parameter.name, "F8_E4M3", parameter.shape)
        yield Stored(_beside(parameter, "scale"), "F32", _tiles(parameter.shape))
    else:
        yield from official(parameter)


def modelopt(parameter: Parameter) -> Iterator[Stored]:
    """NVIDIA's NVFP4: backbone experts in NVFP4, everything else as published."""
    if parameter.kind is not Kind.EXPERT or parameter.name.startswith("mtp."):
        yield from official(parameter)
        return
    rows, cols = parameter.shape
    yield Stored(parameter.name, "U8", (rows, cols // 2))
    yield Stored(_beside(parameter, "weight_scale"), "F8_E4M3", (rows, cols // 16))
    yield Stored(_beside(parameter, "weight_scale_2"), "F32", ())
    yield Stored(_beside(parameter, "input_scale"), "F32", ())


def stored_by(
    config: ModelConfig, draft: DraftKind, stages: int | None = None, dialect: Dialect = official
) -> Iterator[Stored]:
    """Every stored tensor of a checkpoint, in reading order."""
    if stages is None:
        stages = 0 if draft is DraftKind.NONE else config.num_draft_layers
    for parameter in parameters(config, draft, stages):
        yield from dialect(parameter)


def entry(stored: Stored, begin: int = 0, file: str = "model.safetensors") -> TensorEntry:
    """Its header entry, at `begin`."""
    size = math.prod(stored.shape) * DTYPE_BITS[stored.dtype] // 8
    return TensorEntry(stored.name, stored.dtype, stored.shape, begin, begin + size, file)


def entries_of(
    config: ModelConfig, draft: DraftKind, stages: int | None = None, dialect: Dialect = official
) -> Entries:
    """Headers as a complete checkpoint would have them."""
    return {stored.name: entry(stored) for stored in stored_by(config, draft, stages, dialect)}
