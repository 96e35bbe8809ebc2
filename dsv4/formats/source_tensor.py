"""Logical source tensors: a weight together with the scales that give its bytes their meaning.

A checkpoint stores one logical matrix as several safetensors entries. What they are is decided
by the entries themselves (dtype and companions), never by what the config claims.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from dsv4.formats.errors import SourceError
from dsv4.formats.safetensors_header import TensorEntry


class Encoding(enum.StrEnum):
    """How the bytes of a logical tensor are read."""

    MXFP4 = "mxfp4"  # I8-packed E2M1, one E8M0 scale per 32 columns
    FP8 = "fp8"  # E4M3, one scale per 128x128 tile
    PLAIN = "plain"


@dataclasses.dataclass(frozen=True)
class SourceTensor:
    """One logical tensor: hub name, encoding, logical shape, and its entries in the files."""

    name: str
    encoding: Encoding
    shape: tuple[int, ...]
    weight: TensorEntry
    scale: TensorEntry | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all its entries."""
        entries = [self.weight] + ([self.scale] if self.scale else [])
        return sum(entry.end - entry.begin for entry in entries)


def group_official(entries: Mapping[str, TensorEntry]) -> dict[str, SourceTensor]:
    """Group the entries of an official checkpoint (`X.weight` with an optional `X.scale`).

    Raises SourceError for a scale without its weight and a pair of dtypes that has no meaning.
    """
    tensors: dict[str, SourceTensor] = {}
    scales = {name for name in entries if name.endswith(".scale")}
    for name, entry in entries.items():
        if name in scales:
            partner = name.removesuffix("scale") + "weight"
            if partner not in entries:
                raise SourceError(f"{entry.file}: {name} has no {partner} beside it")
            continue
        scale_name = name.removesuffix("weight") + "scale" if name.endswith(".weight") else ""
        tensors[name] = _classify(name, entry, entries.get(scale_name))
    return tensors


def _classify(name: str, weight: TensorEntry, scale: TensorEntry | None) -> SourceTensor:
    pair = (weight.dtype, scale.dtype if scale else None)
    match pair:
        case ("I8", "F8_E8M0"):
            shape = (*weight.shape[:-1], weight.shape[-1] * 2)
            return SourceTensor(name, Encoding.MXFP4, shape, weight, scale)
        case ("F8_E4M3", "F8_E8M0" | "F32" | "BF16"):
            return SourceTensor(name, Encoding.FP8, weight.shape, weight, scale)
        case ("BF16" | "F32" | "I64", None):
            return SourceTensor(name, Encoding.PLAIN, weight.shape, weight)
    found = f"{pair[0]} with " + (f"a {pair[1]} scale" if pair[1] else "no scale")
    raise SourceError(
        f"{weight.file}: {name} is {found}, expected I8 or F8_E4M3 with a scale, "
        f"or BF16, F32 or I64 without"
    )
